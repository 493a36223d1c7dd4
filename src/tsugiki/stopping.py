"""A Ctrl-C in work that cannot go on from its middle: what stopped, what is whole, how to go on.

Writers leave nothing half-written however they end (files.py); this only says so, and tells the
parent (supervise.py), which says it of a work that the kernel killed. Training, which saves and
resumes, has signals of its own (training/signals.py). Knows nothing of what is done.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from tsugiki.errors import Interrupted
from tsugiki.files import sweep_left_over
from tsugiki.supervise import tell_parent

AGAIN = "run the same command again"
_outputs: ContextVar[list[Path] | None] = ContextVar("outputs", default=None)


@contextlib.contextmanager
def stoppable(work: str, again: str = "") -> Iterator[None]:
    """Around work that a Ctrl-C ends; may stand inside another.

    Args:
        work: what is told to have stopped.
        again: how to do the rest; the same command, without what is whole, when empty.

    Raises:
        Interrupted: on a Ctrl-C.
    """
    outputs: list[Path] = []
    before = _outputs.set(outputs)
    tell_parent(work=work, again=again)
    try:
        yield
    except KeyboardInterrupt:
        left, rest = what_is_left(outputs)
        raise Interrupted(f"{work} was stopped; {left}", signal.SIGINT, again or rest) from None
    finally:
        _outputs.reset(before)


def verify_command(a: str | Path, b: str | Path, model: str | None, accept_base: bool) -> str:
    """What proves b to be a, as it would be typed."""
    base = ["--model", model] if model else []
    accept = ["--accept-base"] if accept_base else []
    return shlex.join(["tsugiki", "verify", str(a), str(b), *base, *accept])


def will_write(paths: Iterable[Path]) -> None:
    """Tell the stoppable work around, if any, what it is about to write.

    What is there already is not its own, and is left out. What killed writers left of the rest is
    removed, before anybody counts the space on the disk.
    """
    new = [path for path in paths if not path.exists()]
    for path in new:
        sweep_left_over(path)
    outputs = _outputs.get()
    if outputs is not None:
        outputs += new
        tell_parent(outputs=[str(path) for path in outputs])


def what_is_left(outputs: Iterable[Path]) -> tuple[str, str]:
    """What is told of outputs whose making ended in the middle, and how to do the rest."""
    whole = ", ".join(str(path) for path in outputs if path.exists())
    kept = f"; whole, not proven: {whole}" if whole else ""
    rest = f"remove it, or leave it out, and {AGAIN}" if whole else AGAIN
    return f"nothing half-written is left{kept}", rest
