"""A Ctrl-C in work that cannot go on from its middle: what stopped, what is whole, how to go on.

Writers leave nothing half-written however they end (files.py); this only says so. Training, which
saves and resumes, has signals of its own (training/signals.py). Knows nothing of what is done.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

from tsugiki.errors import Interrupted

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
    try:
        yield
    except KeyboardInterrupt:
        whole = ", ".join(str(path) for path in outputs if path.exists())
        kept = f"; whole, not proven: {whole}" if whole else ""
        rest = f"remove it, or leave it out, and {AGAIN}" if whole else AGAIN
        raise Interrupted(
            f"{work} was stopped; nothing half-written is left{kept}", signal.SIGINT, again or rest
        ) from None
    finally:
        _outputs.reset(before)


def will_write(paths: Iterable[Path]) -> None:
    """Tell the stoppable work around, if any, what it is about to write.

    What is there already is not its own, and is left out.
    """
    outputs = _outputs.get()
    if outputs is not None:
        outputs += [path for path in paths if not path.exists()]
