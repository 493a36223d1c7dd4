"""Frames on a pipe: a JSON header and raw bytes, each with its length first.

What the llama.cpp process and its parent speak; nothing is pickled, nothing is run. Knows nothing
of what the headers mean.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from typing import Any

_LENGTHS = struct.Struct("<IQ")  # bytes of the header, bytes of the payload
HEADER_LIMIT = 1 << 30


class Silence(Exception):
    """Nothing came for the time allowed."""


def send(handle: int, header: dict[str, Any], payload: Any = b"") -> None:
    """Write one frame; `payload` is anything with a buffer."""
    text = json.dumps(header).encode()
    view = memoryview(payload).cast("B") if len(payload) else memoryview(b"")
    _write(handle, memoryview(_LENGTHS.pack(len(text), len(view)) + text))
    _write(handle, view)


def receive(handle: int, seconds: float | None = None) -> tuple[dict[str, Any], bytearray]:
    """Read one frame.

    Args:
        seconds: how long the other side may be silent; None: for ever.

    Raises:
        EOFError: the other side has closed, or its frame is none.
        Silence: it said nothing for `seconds`.
    """
    head, size = _LENGTHS.unpack(_read(handle, _LENGTHS.size, seconds))
    if head > HEADER_LIMIT:
        raise EOFError
    text = _read(handle, head, seconds)
    return json.loads(text.decode()), _read(handle, size, seconds)


def _write(handle: int, view: memoryview) -> None:
    while view:
        view = view[os.write(handle, view) :]


def _read(handle: int, count: int, seconds: float | None) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        if seconds is not None and not _ready(handle, seconds):
            raise Silence
        done = os.readv(handle, [view])
        if done == 0:
            raise EOFError
        view = view[done:]
    return data


def _ready(handle: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN | select.POLLHUP)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            return True
    return False
