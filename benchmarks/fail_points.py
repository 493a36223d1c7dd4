"""Kills a training process by SIGKILL before the n-th step of writing inside its saves.

A step is what changes the disk: open for writing, half of a file, fsync, mkdir, rename, chmod,
removal; audit hooks and a patched os.fsync see them, in the child that trains alone. Between two
steps nothing changes on the disk but the content of an open file, of which `torn` is the half.
Knows tests/runs.py's tiny runs, and no checkpoint.
"""

from __future__ import annotations

import collections
import functools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki import supervise

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {
    "os.mkdir": "mkdir", "os.rename": "rename", "os.chmod": "chmod", "os.remove": "remove",
    "os.rmdir": "rmdir", "shutil.rmtree": "rmtree",
}  # fmt: skip
HOLDERS = ("os.remove", "os.rmdir")  # their second argument is the open folder that holds the name


SHORT = ("--max-steps", "9")  # an evaluation and a checkpoint at 6, another checkpoint at the end


@dataclass(frozen=True)
class Point:
    """The `nth` step of a kind inside a process's saves of one sort, counted from 1.

    start: "fresh" (the first adapter and checkpoint) or "again" (a run that goes on: an adapter and
        a checkpoint that are replaced, a checkpoint that pushes an old one out).
    save: adapter or checkpoint.
    kind: open, torn, fsync, mkdir, rename, chmod, remove, rmdir or rmtree.
    what: the file or folder, from the run's folder; only to be read.
    """

    start: str
    save: str
    kind: str
    nth: int
    what: str = field(default="", compare=False)


def watch_steps(run: str, trace: str, kill_at: tuple[str, str, int] | None) -> None:
    """Write every step of the supervised child to `trace`, and kill it before one of them.

    Args:
        run: the folder whose saves are watched.
        trace: gets a line a step.
        kill_at: save, kind and how many of them; None: never.
    """
    seen = _Seen(Path(run).absolute(), trace, kill_at)
    fsync = os.fsync

    def heard(event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if isinstance(path, str | bytes | os.PathLike) and flags & WRITES:
                seen.step("open", path)
        elif event in EVENTS:
            seen.step(EVENTS[event], given[0], given[1] if event in HOLDERS else -1)

    def synced(handle: int) -> None:
        seen.step("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    os.fsync = synced
    for name in ("write_text", "write_bytes"):
        setattr(Path, name, functools.partialmethod(_torn_file, seen, getattr(Path, name)))
    from tsugiki.training import checkpoint

    checkpoint.save_file = functools.partial(  # safetensors writes outside of Python
        _torn_tensors, seen, checkpoint.save_file
    )
    sys.addaudithook(heard)


class _Seen:
    """Counts steps inside saves."""

    def __init__(self, run: Path, trace: str, kill_at: tuple[str, str, int] | None) -> None:
        self.run, self.trace, self.kill_at = run, trace, kill_at
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.last, self.busy = "", False

    def step(self, kind: str, path: Any, holder: int = -1) -> None:
        """About to be done."""
        if self.busy or not supervise.is_worker():
            return
        self.busy = True
        try:
            place = os.fsdecode(path)
            if holder >= 0:
                place = os.path.join(os.readlink(f"/proc/self/fd/{holder}"), place)
            what = os.path.relpath(os.path.abspath(place), self.run)
            self.last = save = _save(what, kind, self.last)
            if not save:
                return
            self.counts[save, kind] += 1
            nth = self.counts[save, kind]
            with open(self.trace, "a") as stream:
                stream.write(f"{save}\t{kind}\t{nth}\t{what}\n")
            if (save, kind, nth) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            self.busy = False


def _save(what: str, kind: str, last: str) -> str:
    """Which save a step belongs to; empty: none."""
    first = what.split(os.sep)[0]
    if first == "checkpoints":
        return "checkpoint"
    if first == "adapter" or first.startswith(".adapter."):
        return "adapter"
    # The run's own folder, made durable after the adapter was renamed in it.
    return last if first == "." and kind == "fsync" and last == "adapter" else ""


def _torn_file(path: Path, seen: _Seen, real: Callable[..., Any], content: Any, **more: Any) -> Any:
    _half(seen, path, content.encode() if isinstance(content, str) else content)
    return real(path, content, **more)


def _torn_tensors(seen: _Seen, real: Callable[..., Any], tensors: Any, path: Path) -> None:
    real(tensors, path)
    _half(seen, path, path.read_bytes())
    real(tensors, path)


def _half(seen: _Seen, path: Path, content: bytes) -> None:
    """As a kill in the middle of writing would leave it."""
    busy, seen.busy = seen.busy, True
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(handle, content[: len(content) // 2])
    os.close(handle)
    seen.busy = busy
    seen.step("torn", path)


def go_on_stopped(place: Path) -> None:
    """`stopped`, where runs "again" begin: at a step whose held-out loss is still to be done."""
    import runs

    from tsugiki.errors import Interrupted
    from tsugiki.training import loop

    real, calls = loop.held_out_loss, []

    def stops(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    loop.held_out_loss = stops
    try:
        runs.in_process(place, "stopped")
    except Interrupted:
        return
    finally:
        loop.held_out_loss = real
    raise AssertionError("it was not stopped")


def make_place(place: Path) -> list[Point]:
    """A model, rows, `whole` and `stopped`; every step of the saves that can be killed.

    Of a run from its start the first adapter and checkpoint, which are new; of one that goes on
    both replaced, the adapter once more, and the next checkpoint, which pushes an old one out.
    """
    import runs

    def traced(folder: Path, name: str) -> Any:
        return _begin(folder, "fresh", name, place / "fresh.trace", None)

    runs.make_place(place, traced)
    go_on_stopped(place)
    runs.finish(_begin(place, "again", "again", place / "again.trace", None))
    assert runs.result(place / "again") == runs.result(place / "whole")
    return [*_first_saves(place, "fresh", 2), *_first_saves(place, "again", 4)]


def _first_saves(place: Path, start: str, wanted: int) -> list[Point]:
    lines = [x.split("\t") for x in (place / f"{start}.trace").read_text().splitlines()]
    points = [Point(start, save, kind, int(nth), what) for save, kind, nth, what in lines]
    begun: list[str] = []  # the temporary folders in turn
    for number, point in enumerate(points):
        made = point.kind == "mkdir" and point.what.endswith(".tmp")
        if made and point.what not in begun:
            if len(begun) == wanted:
                return points[:number]
            begun.append(point.what)
    return points


def survive(place: Path, point: Point) -> None:
    """Kill a run there, and let it go on by itself: the same bytes, one interval lost at most."""
    import runs

    from tsugiki import files
    from tsugiki.training import metrics

    name = f"{point.start}-{point.save}-{point.kind}-{point.nth}"
    run, trace = place / name, place / f"{name}.trace"
    process = _begin(place, point.start, name, trace, (point.save, point.kind, point.nth))
    assert process.wait(timeout=600) == 137, process.said()
    last = trace.read_text().splitlines()[-1].split("\t")
    assert last[:3] == [point.save, point.kind, str(point.nth)], "it was killed elsewhere"
    before = runs.steps_written(run)
    runs.finish(runs.forked(place, name, resume=True))
    assert runs.result(run) == runs.result(place / "whole")
    lines = [x for x in files.read_lines(run / metrics.METRICS) if x["kind"] == "train"]
    went_on = min(x["step"] for x in lines if x["segment"] == lines[-1]["segment"]) - 1
    assert before - went_on <= runs.SAVE_EVERY, "more than a save interval is lost"
    left = [path.name for path in run.rglob(".*.tmp")]
    assert not left, left
    shutil.rmtree(run)


def _begin(
    place: Path, start: str, name: str, trace: Path, kill_at: tuple[str, str, int] | None
) -> Any:
    import runs

    if start == "again":
        shutil.copytree(place / "stopped", place / name)
    watch = functools.partial(watch_steps, str(place / name), str(trace), kill_at)
    return runs.forked(place, name, resume=start == "again", first=watch, more=SHORT)


def spread(points: Iterable[Point], most: int) -> list[Point]:
    """At most so many, of every start, save and kind in turn: renames first, then by rarity."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.start, point.save, point.kind), []).append(point)
    turns = sorted(groups.values(), key=lambda group: (group[0].kind != "rename", len(group)))
    chosen: list[Point] = []
    while any(turns) and len(chosen) < most:
        for left in turns:
            if left and len(chosen) < most:
                chosen.append(left.pop(-1 if len(chosen) % 2 else 0))
    return chosen
