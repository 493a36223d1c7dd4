"""A GGUF file quantised to another, byte for byte as llama.cpp's own quantiser writes it.

Types are chosen by `mixes`, numbers are made by ggml in its own process, from file to file in
chunks of rows; the result appears whole or not at all, and what is reported was read back from it.
Knows nothing of where the source came from.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tsugiki.errors import ModelError
from tsugiki.files import atomic_file, require_space
from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_file import MAGIC, GgufFile, open_gguf
from tsugiki.formats.llama_cpp.library import F32, TO_FLOAT
from tsugiki.formats.llama_cpp.process import LlamaCpp, require_library
from tsugiki.formats.mixes import Kind, choose_types, find_kind

VERSION_KEY, TYPE_KEY = "general.quantization_version", "general.file_type"
QUANTISATION_VERSION = 2  # GGML_QNT_VERSION
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
SOURCES = ("F32", "F16", "BF16")
READABLE = tuple(name for name, kind in TYPES.items() if kind.code in (F32, *TO_FLOAT))
U32 = 4  # the metadata type


@dataclass(frozen=True)
class Quantised:
    """What was written, as read back from the file.

    types: of each tensor. bytes_before, bytes_after: of all tensors.
    """

    path: Path
    kind: str
    types: dict[str, str]
    bytes_before: int
    bytes_after: int

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have which type, most frequent first."""
        return dict(Counter(self.types.values()).most_common())


def quantise_file(
    source: Path,
    target: Path,
    kind: str,
    threads: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Quantised:
    """Write `source` again with its matrices in the types of the mix `kind`.

    Args:
        source: a GGUF file in F32, F16 or BF16; tensors that have their type already are copied.
        kind: one of `mixes.KINDS`, as q4_k_m.
        progress: called with bytes of the source done and of all.

    Raises:
        UsageError: an unknown kind; `[gguf]` is not installed.
        ModelError: not a whole GGUF file, an architecture not known here, already quantised,
            numbers that are not finite or not in the range of the type written.
        DiskError: too little space (told before), disk full.
        RunError: `target` exists.
    """
    chosen = find_kind(kind)
    require_library()
    file = open_gguf(source)
    types = choose_types(file, chosen)
    _only_from(SOURCES, file, types, "quantise the f32, f16 or bf16 file that it was made from")
    return _write(file, target, chosen, types, threads, progress)


def dequantise_file(
    source: Path,
    target: Path,
    threads: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Quantised:
    """Write `source` again with the numbers of its matrices, as they are, in F32.

    llama.cpp rounds what it multiplies with an F16, BF16 or quantised matrix to a type like the
    matrix's; with F32 that rounding is gone, and its logits can be held to a reference.

    Raises:
        As `quantise_file`.
    """
    require_library()
    file = open_gguf(source)
    kind = find_kind("f32")
    types = choose_types(file, kind)
    _only_from(READABLE, file, types, None)
    return _write(file, target, kind, types, threads, progress)


def _only_from(
    kinds: tuple[str, ...], file: GgufFile, types: dict[str, GgmlType], fix: str | None
) -> None:
    for name, here in types.items():
        there = file.tensors[name].type
        if there != here and there.name not in kinds:
            raise ModelError(
                f"{file.path} cannot be written in other types: {name} is {there.name}",
                allowed=" ".join(kinds),
                fix=fix,
            )


def _write(
    file: GgufFile,
    target: Path,
    kind: Kind,
    types: dict[str, GgmlType],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Quantised:
    head = _header(file, types, kind)
    before = sum(info.nbytes for info in file.tensors.values())
    places, size = _places(file, types, len(head))
    require_space(target, size, f"the {kind.name} model")
    jobs = [
        [name, info.type.code, types[name].code, info.rows, info.columns, info.begin, places[name]]
        for name in types
        if (info := file.tensors[name]).nbytes
    ]
    with atomic_file(target) as temporary, LlamaCpp(threads) as llama:
        with open(temporary, "r+b") as out:
            reserve(out.fileno(), size)
            out.write(head)
        done = 0
        for more in llama.quantise_file(file.path, temporary, jobs):
            done += more
            if progress is not None:
                progress(done, before)
    written = open_gguf(target)
    return Quantised(
        target,
        kind.name,
        {name: info.type.name for name, info in written.tensors.items()},
        before,
        sum(info.nbytes for info in written.tensors.values()),
    )


def reserve(handle: int, size: int) -> None:
    """Give a file its size, with the blocks where the system can: a full disk shows now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def _header(file: GgufFile, types: dict[str, GgmlType], kind: Kind) -> bytes:
    """Everything before the data: metadata as it was, with the two keys that say the types last."""
    kept = [key for key in file.metadata if key not in (VERSION_KEY, TYPE_KEY, *SPLIT_KEYS)]
    parts = [MAGIC, struct.pack("<IQQ", 3, len(types), len(kept) + 2)]
    parts += [file.metadata.raw(key) for key in kept]
    for key, value in ((VERSION_KEY, QUANTISATION_VERSION), (TYPE_KEY, kind.file_type)):
        parts.append(_text(key) + struct.pack("<II", U32, value))
    offset = 0
    for name, here in types.items():
        info = file.tensors[name]
        sizes = list(info.shape[::-1]) or [1]
        while len(sizes) > 1 and sizes[-1] == 1:
            sizes.pop()  # ggml counts no trailing ones
        form = f"<I{len(sizes)}QIQ"
        parts.append(_text(name) + struct.pack(form, len(sizes), *sizes, here.code, offset))
        offset += _padded(info.rows * here.row_bytes(info.columns), file.alignment)
    head = b"".join(parts)
    return head + bytes(-len(head) % file.alignment)


def _places(file: GgufFile, types: dict[str, GgmlType], begin: int) -> tuple[dict[str, int], int]:
    """Where each tensor's data begins in the new file, and the file's size."""
    places = {}
    for name, here in types.items():
        info = file.tensors[name]
        places[name] = begin
        begin += _padded(info.rows * here.row_bytes(info.columns), file.alignment)
    return places, begin


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
