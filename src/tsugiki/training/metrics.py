"""The run's own records: append-only JSON lines, each with the segment since the last start.

After a resume some steps are written again; readers drop what a later segment repeats. Knows no
training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tsugiki.files import append_line, read_lines

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


def write(folder: Path, name: str, segment: int, kind: str, **values: Any) -> None:
    """One line."""
    line = {"kind": kind, "segment": segment, **values}
    append_line(folder / name, json.dumps(line, ensure_ascii=False))


def read(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Lines in order, without what a later segment wrote again."""
    lines = [line for line in read_lines(folder / name) if isinstance(line, dict)]
    kept: list[dict[str, Any]] = []
    first: tuple[int, int] | None = None  # where the segments seen so far began, from the end
    segment: int | None = None
    pending: tuple[int, int] | None = None
    for line in reversed(lines):
        moment = _moment(line)
        if line.get("segment") != segment:
            segment = line.get("segment")
            first = pending if first is None or (pending is not None and pending < first) else first
        if first is None or moment < first:
            kept.append(line)
            pending = moment if pending is None else min(pending, moment)
    return kept[::-1]


def _moment(line: dict[str, Any]) -> tuple[int, int]:
    """When a line was written: a step is made before what is due at it, in the loop's order.

    A run that was stopped between the two does only the rest of that step again.
    """
    due = ("held_out", "sample", "gradients")
    kind = line.get("kind")
    return int(line.get("step", 0)), 1 + due.index(kind) if kind in due else 0


def next_segment(folder: Path) -> int:
    """Number of the segment that begins now.

    A line that a crash tore is closed first, or the next one would be lost with it.
    """
    lines = []
    for path in (folder / METRICS, folder / SAMPLES):
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            append_line(path, "")
        lines += read_lines(path)
    return 1 + max(
        (int(line.get("segment", 0)) for line in lines if isinstance(line, dict)), default=-1
    )
