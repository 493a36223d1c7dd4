"""Rows quantised by ggml, on several threads, in memory or from file to file.

Runs in the worker process. A row is quantised alone, so the bytes are the same whatever the number
of threads, and the same as llama.cpp's own. Knows no names: what becomes which type is told.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsugiki.formats.llama_cpp.library import F32, TO_FLOAT, Library, Refused

# Elements that a thread takes at once: their fp32 form (2 MB) stays in its cache.
CHUNK = 1 << 19

Frame = tuple[dict[str, Any], Any]


def quantise_rows(
    library: Library, payload: bytearray, type: int, rows: int, columns: int, threads: int
) -> Iterator[Frame]:
    """fp32 rows in the payload → one frame with their quantised bytes."""
    width = library.ggml_row_size(type, columns)
    out = np.empty(rows * width, np.uint8)
    source = np.frombuffer(payload, np.float32)
    at_once = max(1, CHUNK // columns)

    def chunk(row: int) -> None:
        count = min(at_once, rows - row)
        given = source[row * columns : (row + count) * columns]
        if not library.ggml_validate_row_data(F32, given.ctypes.data, given.nbytes):
            raise Refused("source", "a tensor")
        place = out[row * width : (row + count) * width]
        _quantise(library, type, given.ctypes.data, place, count, columns)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(chunk, range(0, rows, at_once)):
            pass
    yield {}, out


def quantise_file(
    library: Library, payload: bytearray, source: str, target: str, jobs: list[Any], threads: int
) -> Iterator[Frame]:
    """Quantise or copy tensors from one file to their places in another.

    jobs: [name, type there, type here, rows, columns, begin there, begin here] of each tensor, in
    bytes from the files' starts. The target exists in its full size. Yields how many bytes of the
    source are done, as they are done.
    """
    with (
        open(source, "rb") as stream,
        open(target, "r+b", buffering=0) as out,
        ThreadPoolExecutor(threads) as pool,
    ):
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        work = _Work(library, np.frombuffer(mapped, np.uint8), out.fileno())
        pieces = (
            (job, row, min(at_once, job[3] - row))
            for job in jobs
            for at_once in (max(1, CHUNK // max(1, job[4])),)
            for row in range(0, job[3], at_once)
        )
        waiting: set[Future[int]] = set()
        try:
            while waiting := waiting | {
                pool.submit(work.piece, *piece)
                for piece in islice(pieces, 4 * threads - len(waiting))
            }:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield {"bytes": sum(future.result() for future in done)}, b""
        finally:
            pool.shutdown(cancel_futures=True)


class _Work:
    """Two files, and the memory of each thread."""

    def __init__(self, library: Library, source: NDArray[np.uint8], target: int) -> None:
        self.library = library
        self.source = source
        self.target = target
        self.local = threading.local()

    def piece(self, job: list[Any], row: int, rows: int) -> int:
        """Rows [row, row + rows) of a tensor; returns the bytes read."""
        name, there, here, _, columns, begin, place = job
        library = self.library
        width = library.ggml_row_size(there, columns)
        stored = self.source[begin + row * width :][: rows * width]
        data = stored.ctypes.data
        if not library.ggml_validate_row_data(there, data, stored.nbytes):
            raise Refused("source", name)
        if there == here:
            self.write(stored, place + row * width)
            return int(stored.nbytes)
        if there != F32:
            numbers = self.memory("numbers", rows * columns * 4)
            getattr(library, TO_FLOAT[there])(data, numbers.ctypes.data, rows * columns)
            data = numbers.ctypes.data
        new = library.ggml_row_size(here, columns)
        done = self.memory("done", rows * new)
        try:
            _quantise(library, here, data, done, rows, columns)
        except Refused:
            raise Refused("target", name) from None
        self.write(done, place + row * new)
        return int(stored.nbytes)

    def memory(self, name: str, size: int) -> NDArray[np.uint8]:
        """The thread's own memory of that name, `size` bytes of it."""
        have: NDArray[np.uint8] | None = getattr(self.local, name, None)
        if have is None or have.nbytes < size:
            have = np.empty(size, np.uint8)
            setattr(self.local, name, have)
        return have[:size]

    def write(self, data: NDArray[np.uint8], place: int) -> None:
        """Write at a place of the target."""
        view = data.data
        while len(view):
            done = os.pwrite(self.target, view, place)
            view, place = view[done:], place + done


def _quantise(
    library: Library, type: int, source: int, out: NDArray[np.uint8], rows: int, columns: int
) -> None:
    """`rows` finite fp32 rows at an address → `out`; refuses what became NaN or infinite."""
    size = library.ggml_quantize_chunk(type, source, out.ctypes.data, 0, rows, columns, None)
    assert size == out.nbytes, "ggml's own row size"
    if not library.ggml_validate_row_data(type, out.ctypes.data, out.nbytes):
        raise Refused("target", "a tensor")
