"""Streams answers to the terminal until they end or Ctrl-C stops them.

Knows requests and where text goes; knows no adapters by name and no conversation.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType

from tsugiki.engine.engine import Engine, Finish, Request


@dataclass
class Spoken:
    """An answer so far. finish: None while it runs, "cancelled" when it was stopped."""

    text: str = ""
    tokens: int = 0
    finish: Finish | None = None


def speak(
    engine: Engine, requests: Sequence[Request], show: Callable[[int, str], None]
) -> list[Spoken]:
    """Answer all requests side by side; `show(index, piece)` gets text as it comes.

    Ctrl-C ends the answers, not the program: what was said until then is returned. A second one
    while the first still waits for the step to end raises KeyboardInterrupt.
    """
    answers = [Spoken() for _ in requests]
    with interruptible() as stopped, closing(engine.generate(requests)) as events:
        for event in events:
            answer = answers[event.request]
            answer.text += event.text
            answer.tokens += event.token is not None
            answer.finish = event.finish
            if event.text:
                show(event.request, event.text)
            if stopped():
                break
    for answer in answers:
        answer.finish = answer.finish or "cancelled"
    return answers


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function true."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    hit = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)


def harmless(text: str) -> str:
    """Without control characters, which could command the terminal that shows a model's text."""
    return "".join(c for c in text if c in "\n\t" or not _commands(c))


def _commands(character: str) -> bool:
    code = ord(character)
    return code < 0x20 or 0x7F <= code < 0xA0
