"""A GGUF file as it lies on disk: metadata, tensors and their values, read without trust.

The file is mapped, so that opening a model of any size costs no memory of its own. Every count,
length, size and offset is checked against the file before it is used: a file that lies gives one
typed error that names the lie. Knows nothing of architectures or of what the keys mean; the
format is that of github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tsugiki.errors import ModelError
from tsugiki.formats.ggml_types import PLAIN, TYPE_CODES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
ALIGNMENT_KEY = "general.alignment"
# Far above any real model (about 100 keys, 10,000 tensors, 262,144 tokens with as many merges),
# and low enough that a hostile file is refused or read in well under two seconds.
KEY_LIMIT = 20_000
TENSOR_LIMIT = 50_000
STRINGS_LIMIT = 2_000_000  # strings in all arrays together
TEXT_LIMIT = 16 << 20  # bytes of one string
NAME_LIMIT = 63  # bytes of a tensor's name (GGML_MAX_NAME less the end)
DIMENSIONS = 4
SIZE_LIMIT = 1 << 63  # bytes, elements

STRING, ARRAY = 8, 9
SCALARS: dict[int, str] = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool",
    10: "u64", 11: "i64", 12: "f64",
}  # fmt: skip
NUMPY: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("<u1"), "i8": np.dtype("<i1"), "u16": np.dtype("<u2"), "i16": np.dtype("<i2"),
    "u32": np.dtype("<u4"), "i32": np.dtype("<i4"), "f32": np.dtype("<f4"),
    "bool": np.dtype("<u1"), "u64": np.dtype("<u8"), "i64": np.dtype("<i8"),
    "f64": np.dtype("<f8"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; its bytes are file[begin:end].

    shape: slowest dimension first, as in numpy and torch; GGUF itself stores the reverse.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin

    @property
    def columns(self) -> int:
        """Elements of a row, GGUF's first dimension."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        count = 1
        for n in self.shape[:-1]:
            count *= n
        return count


@dataclass(frozen=True)
class _Entry:
    """Where one metadata value lies: file[begin:end] with its key, its value from `value` on."""

    kind: str  # u32, str, [f32], [str] …
    count: int
    begin: int
    value: int
    end: int


class Metadata(Mapping[str, Any]):
    """Keys in the file's order; values are decoded when asked for.

    A value is an int, float, bool or str, a read-only numpy array, or a list of str. Bytes that
    are not UTF-8 survive as surrogate escapes.
    """

    def __init__(self, data: mmap.mmap, entries: dict[str, _Entry]) -> None:
        self._data = data
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        kind = entry.kind.strip("[]")
        if kind != "str":
            array = np.frombuffer(self._data, NUMPY[kind], entry.count, entry.value)
            array = array != 0 if kind == "bool" else array
            return array if entry.kind[0] == "[" else array[0].item()
        texts, at = [], entry.value
        for _ in range(entry.count):
            (length,) = _U64.unpack_from(self._data, at)
            raw = self._data[at + 8 : at + 8 + length]
            texts.append(raw.decode("utf-8", errors="surrogateescape"))
            at += 8 + length
        return texts if entry.kind[0] == "[" else texts[0]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def kind(self, key: str) -> str:
        """The stored type of a value: u32, f32, bool, str …, in brackets for an array."""
        return self._entries[key].kind

    def raw(self, key: str) -> bytes:
        """The bytes of key and value as they are stored (the same in versions 2 and 3)."""
        entry = self._entries[key]
        return self._data[entry.begin : entry.end]


@dataclass(frozen=True)
class GgufFile:
    """What a file holds. Arrays that it gives are views on the mapped file, valid while it is."""

    path: Path
    version: int
    alignment: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    _data: mmap.mmap

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor, (rows, bytes of a row), read-only."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.nbytes, info.begin)
        return flat.reshape(info.rows, info.type.row_bytes(info.columns))

    def values(self, name: str, begin: int = 0, end: int | None = None) -> NDArray[np.float32]:
        """Rows [begin, end) of a tensor as the numbers that they stand for.

        Returns:
            float32 (rows, columns); of all rows, in the tensor's own shape.

        Raises:
            ModelError: a type whose numbers cannot be told.
        """
        info = self.tensors[name]
        some = self.raw(name)[begin:end]
        numbers = decode_numbers(some, info.type, info.columns)
        if numbers is None:
            raise ModelError(
                f"the values of {name} in {self.path} cannot be read",
                got=f"type {info.type.name}",
                allowed="F32, F16, BF16 and the quantised types of gguf-py",
            )
        return numbers.reshape(info.shape) if len(some) == info.rows else numbers


def decode_numbers(
    raw: NDArray[np.uint8], kind: GgmlType, columns: int
) -> NDArray[np.float32] | None:
    """Stored rows (rows, bytes of a row) → the numbers (rows, columns) that they stand for.

    None where a type's numbers cannot be told.
    """
    if kind.name in PLAIN:
        return raw.view(PLAIN[kind.name]).astype(np.float32, copy=False)
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if raw.size == 0:
        return np.empty((len(raw), columns), np.float32)
    from gguf import GGMLQuantizationType, dequantize

    try:
        code = GGMLQuantizationType(kind.code)
        with np.errstate(all="ignore"):  # a hostile scale may overflow; inf is what it stands for
            return np.asarray(dequantize(raw, code), np.float32)
    except (ValueError, NotImplementedError):
        return None


_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_U64 = struct.Struct("<Q")


class _Cursor:
    """A place in the file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def bad(self, why: str) -> NoReturn:
        raise ModelError(f"{self.path} is not a whole GGUF file: {why}")

    def need(self, count: int, what: str) -> int:
        """Step over `count` bytes; returns where they begin."""
        begin = self.at
        if count > len(self.data) - begin:
            self.bad(f"it ends within {what} (byte {len(self.data):,})")
        self.at += count
        return begin

    def number(self, form: struct.Struct, what: str) -> int:
        """One integer."""
        (value,) = form.unpack_from(self.data, self.need(form.size, what))
        return int(value)

    def text(self, what: str, limit: int) -> str:
        """A string that must be UTF-8, as names are."""
        length = self.number(_U64, what)
        if length > limit:
            self.bad(f"{what} claims {length:,} bytes (at most {limit:,})")
        begin = self.need(length, what)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            self.bad(f"{what} is not UTF-8")


def open_gguf(path: Path) -> GgufFile:
    """Map a file and read its header; no tensor is touched.

    Raises:
        ModelError: not there, not GGUF, cut short, or lying about a count, length, type, shape,
            offset or alignment; names what is wrong.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    try:
        with open(path, "rb") as stream:
            head = stream.read(24)
            if len(head) < 24 or head[:4] != MAGIC:
                why = "it does not begin with GGUF" if head[:4] != MAGIC else f"{len(head)} bytes"
                raise ModelError(f"{path} is not a whole GGUF file: {why}")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    cursor = _Cursor(path, data)
    cursor.need(4, "the magic")
    version = cursor.number(_U32, "the version")
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0 and version != 0
        cursor.bad("it is big-endian" if swapped else f"version {version}; 2 and 3 are known")
    tensor_count = cursor.number(_U64, "the number of tensors")
    key_count = cursor.number(_U64, "the number of keys")
    for count, limit, what in (
        (tensor_count, TENSOR_LIMIT, "tensors"),
        (key_count, KEY_LIMIT, "keys"),
    ):
        if count > limit:
            cursor.bad(f"it claims {count:,} {what} (at most {limit:,})")
    metadata = Metadata(data, _read_keys(cursor, key_count))
    alignment = DEFAULT_ALIGNMENT
    if ALIGNMENT_KEY in metadata:
        if metadata.kind(ALIGNMENT_KEY) != "u32":
            cursor.bad(f"{ALIGNMENT_KEY} is {metadata.kind(ALIGNMENT_KEY)}, not u32")
        alignment = metadata[ALIGNMENT_KEY]
        if alignment == 0 or alignment & (alignment - 1):
            cursor.bad(f"{ALIGNMENT_KEY} is {alignment}, not a power of two")
    return GgufFile(
        path, version, alignment, metadata, _read_tensors(cursor, tensor_count, alignment), data
    )


def _read_keys(cursor: _Cursor, count: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    strings = 0
    for number in range(count):
        begin = cursor.at
        key = cursor.text(f"key {number}", 65535)
        if not key or key in entries:
            cursor.bad(f"key {key!r} is there twice" if key else f"key {number} is empty")
        code = cursor.number(_U32, f"the type of {key!r}")
        array, length = code == ARRAY, 1
        if array:
            code = cursor.number(_U32, f"the type of {key!r}")
            length = cursor.number(_U64, f"the length of {key!r}")
        kind = "str" if code == STRING else SCALARS.get(code)
        if kind is None:
            cursor.bad(f"{key!r} has the unknown type {code}")
        value = cursor.at
        if kind == "str":
            strings += length if array else 0
            if strings > STRINGS_LIMIT:
                cursor.bad(f"{key!r} makes {strings:,} strings (at most {STRINGS_LIMIT:,})")
            _skip_strings(cursor, key, length)
        else:
            cursor.need(length * NUMPY[kind].itemsize, f"the value of {key!r}")
        entries[key] = _Entry(f"[{kind}]" if array else kind, length, begin, value, cursor.at)
    return entries


def _skip_strings(cursor: _Cursor, key: str, count: int) -> None:
    """Step over strings one by one: each begins where the last one ends."""
    data, at, size, unpack = cursor.data, cursor.at, len(cursor.data), _U64.unpack_from
    if count * 8 > size - at:
        cursor.bad(f"it ends within the value of {key!r} (byte {size:,})")
    for _ in range(count):
        if at > size - 8:
            cursor.bad(f"it ends within the value of {key!r} (byte {size:,})")
        length = unpack(data, at)[0]
        at += 8 + length
        if length > TEXT_LIMIT or at > size:
            cursor.bad(f"a string of {key!r} claims {length:,} bytes")
    cursor.at = at


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    # Data follows the last entry, so places are only known at the end: (name, type, shape, size).
    found: dict[str, tuple[GgmlType, tuple[int, ...], int, int]] = {}
    for number in range(count):
        name = cursor.text(f"the name of tensor {number}", NAME_LIMIT)
        if name in found:
            cursor.bad(f"tensor {name!r} is there twice")
        dimensions = cursor.number(_U32, f"the shape of {name!r}")
        if dimensions > DIMENSIONS:
            cursor.bad(f"{name!r} has {dimensions} dimensions (at most {DIMENSIONS})")
        sizes = [cursor.number(_U64, f"the shape of {name!r}") for _ in range(dimensions)]
        code = cursor.number(_I32, f"the type of {name!r}")
        offset = cursor.number(_U64, f"the offset of {name!r}")
        kind = TYPE_CODES.get(code)
        if kind is None:
            cursor.bad(f"{name!r} has the unknown type {code}")
        elements = 1
        for n in sizes:
            elements *= n
        if max(sizes, default=0) >= SIZE_LIMIT or elements >= SIZE_LIMIT:
            cursor.bad(f"{name!r} has the impossible shape {sizes[::-1]}")
        columns = sizes[0] if sizes else 1
        if columns % kind.block:
            cursor.bad(f"{name!r} has rows of {columns}, no multiple of {kind.name}'s {kind.block}")
        found[name] = (kind, tuple(sizes[::-1]), offset, elements // kind.block * kind.nbytes)
    start = cursor.at + -cursor.at % alignment
    expected, size, tensors = 0, len(cursor.data), {}
    for name, (kind, shape, offset, nbytes) in found.items():
        if offset != expected:
            cursor.bad(f"{name!r} lies at offset {offset:,}, not {expected:,}")
        begin, end = start + offset, start + offset + nbytes
        if end > size:
            cursor.bad(f"{name!r} ends at byte {end:,} of {size:,}")
        tensors[name] = TensorInfo(name, kind, shape, begin, end)
        expected += nbytes + -nbytes % alignment
    return tensors
