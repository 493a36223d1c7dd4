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
    """Lines in order, without steps that a later segment wrote again."""
    lines = [line for line in read_lines(folder / name) if isinstance(line, dict)]
    kept: list[dict[str, Any]] = []
    first: int | None = None  # first step of the segments seen so far, from the end
    segment: int | None = None
    pending: int | None = None
    for line in reversed(lines):
        step = int(line.get("step", 0))
        if line.get("segment") != segment:
            segment = line.get("segment")
            first = pending if first is None or (pending is not None and pending < first) else first
        if first is None or step < first:
            kept.append(line)
            pending = step if pending is None else min(pending, step)
    return kept[::-1]


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
