"""Ctrl-C and SIGTERM end a run after the step that is running; a second Ctrl-C at once.

Work that changes nothing (a held-out loss, samples) is broken off where it stands. Knows nothing
of training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

WATCHED = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """Raised by a signal inside `Signals.breaking_off`; not an Exception, so nobody swallows it."""


class Signals:
    """While open, `received` is the first signal's number or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._breaks_off = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in WATCHED:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Around work that changes nothing: a signal raises `Stopped` in the middle of it.

        Raises:
            Stopped: on a signal, also on one that came before.
        """
        try:
            self._breaks_off = True
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._breaks_off = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(128 + number)
        first = self.received is None
        self.received = self.received or number
        if first and self._breaks_off:
            raise Stopped
