"""A model's safetensors files as they lie on disk: names, types, shapes and byte ranges.

Tensors are views on mapped files, so reading a model of any size costs no memory of its own; a
file is written piece by piece and hashed as it goes. Imports no transformers; knows no
architecture beyond the names of its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsugiki.errors import ModelError, TsugikiError
from tsugiki.models.hub import QUANTIZED_RECORD, refuse_no_config

AHEAD = 4  # pieces that wait to be written
HEADER_LIMIT = 100 << 20  # bytes, the format's own cap
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file; its bytes are file[begin:end]."""

    name: str
    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes, and its metadata."""

    path: Path
    tensors: tuple[Stored, ...]
    metadata: dict[str, str]


def read_shard(path: Path, error: type[TsugikiError] = ModelError) -> Shard:
    """Read a header without trusting it.

    Raises:
        error: cut short, header too large or not JSON, offsets outside the file, a size that does
            not fit its shape, a type that is not known. The tensor is named.
    """
    if not path.is_file():
        raise error(f"there is no file {path}")
    size = path.stat().st_size

    def bad(why: str) -> Exception:
        fix = "copy or download it again"
        return error(f"{path} is not a whole safetensors file: {why}", fix=fix)

    with open(path, "rb") as stream:
        head = stream.read(8)
        if len(head) < 8:
            raise bad(f"{size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(HEADER_LIMIT, size - 8):
            raise bad(f"its header claims {length:,} bytes of {size:,}")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise bad("its header is not JSON") from None
    if not isinstance(header, dict):
        raise bad("its header is not an object")
    metadata = header.pop("__metadata__", None) or {}
    start, found = 8 + length, []
    for name, entry in header.items():
        try:
            begin, end = (int(n) for n in entry["data_offsets"])
            shape = tuple(int(n) for n in entry["shape"])
            dtype = DTYPES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise bad(f"the entry of {name[:80]!r} cannot be read") from None
        if dtype is None:
            raise bad(f"{name[:80]!r} has the unknown type {entry['dtype']!r}")
        count = 1
        for n in shape:
            count *= n
        if min(shape, default=0) < 0 or begin < 0 or start + end > size:
            raise bad(f"the entry of {name[:80]!r} lies outside the file ({size:,} bytes)")
        if end - begin != count * dtype.itemsize:
            raise bad(f"{name[:80]!r} claims {end - begin:,} bytes for shape {list(shape)}")
        found.append(Stored(name, path, entry["dtype"], shape, start + begin, start + end))
    found.sort(key=lambda tensor: (tensor.begin, tensor.end))
    text = {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}
    return Shard(path, tuple(found), text)


def shard_files(folder: Path) -> list[Path]:
    """model.safetensors, else the files that the index names, else all that there are.

    The order is transformers': beside a whole model lies the same in another form, as Mistral's.

    Raises:
        ModelError: a damaged index, or one that names files outside the folder.
    """
    index = folder / INDEX
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read: {error}") from None
    outside = [name for name in names if name.startswith("/") or ".." in Path(name).parts]
    if outside or not names:
        raise ModelError(f"{index} names no files of its folder", got=", ".join(outside[:3]))
    return [folder / name for name in sorted(names)]


@dataclass
class StoredModel:
    """A model folder: config.json as it is, and every tensor by its disk name.

    through: what is done to a tensor's numbers when they are read (models/kept.py); shape and type
    stay. kept: how the projections are then seen: none (as they are), nf4 or int8.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: dict[str, Stored]
    through: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict, repr=False)
    kept: str = "none"
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    @property
    def model_type(self) -> str:
        """The architecture as config.json names it."""
        return str(self.config.get("model_type"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def setting(self, name: str) -> Any:
        """A value of config.json, looked up in its text part first."""
        text = self.config.get("text_config")
        if isinstance(text, dict) and name in text:
            return text[name]
        return self.config.get(name)

    def bytes_of(self, stored: Stored) -> memoryview:
        """A tensor's bytes, read from the mapped file."""
        if stored.name in self.through:
            return as_bytes(self.tensor(stored.name))
        return memoryview(self._map(stored.file))[stored.begin : stored.end]

    def tensor(self, name: str) -> Tensor:
        """A view on the mapped file where nothing is done to it; never write to it."""
        found = view(self._map(self.tensors[name].file), self.tensors[name])
        return self.through[name](found) if name in self.through else found

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor brought in; its views stay right."""
        release(self._map(self.tensors[name].file), self.tensors[name])

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]


def map_file(path: Path) -> mmap.mmap:
    """The file as memory; private, since torch wants a buffer that it could write."""
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def release(mapped: mmap.mmap, stored: Stored) -> None:
    """Let go of the memory that reading a tensor of a mapped file brought in."""
    begin = -(-stored.begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and stored.end - begin >= mmap.PAGESIZE:
        mapped.madvise(mmap.MADV_DONTNEED, begin, stored.end - begin)


def view(mapped: mmap.mmap, stored: Stored) -> Tensor:
    """One tensor of a mapped file, without a copy."""
    if stored.nbytes == 0:
        return torch.empty(stored.shape, dtype=stored.dtype)
    count = stored.nbytes // stored.dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=stored.begin)
    return flat.reshape(stored.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json as it is.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = folder / "config.json"
    refuse_no_config(folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} cannot be read: not a JSON object")
    return config


def read_generation(folder: Path) -> dict[str, Any]:
    """A model folder's generation_config.json; empty where there is none, or it cannot be read:
    it proposes, and a chat format has stops of its own."""
    try:
        found = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def stops_in(folder: Path, otherwise: Any) -> list[int]:
    """Ids that end an answer: generation_config.json's, or the config's where that is not there."""
    said = read_generation(folder)
    known = said.get("eos_token_id", None if said else otherwise)
    listed = known if isinstance(known, list) else [known]
    return [index for index in listed if isinstance(index, int)]


def stops_of(model: StoredModel) -> list[int]:
    """Ids that end an answer, as a base's own files say."""
    return stops_in(model.folder, model.setting("eos_token_id"))


def whole_shards(folder: Path) -> tuple[Shard, ...]:
    """The headers of a model's safetensors files; no tensor is touched.

    Raises:
        ModelError: no such file or only pickled ones, a shard missing, a file that lies, a tensor
            in two files.
    """
    files = shard_files(folder)
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise ModelError(
                f"{folder} has only pickled weights, which can run code when loaded",
                got=", ".join(pickled[:5]),
                allowed="*.safetensors",
                fix="get the safetensors version of this model, or convert it in a place you trust",
            )
        fix = "copy the model's *.safetensors there"
        raise ModelError(f"{folder} has no weights", allowed="*.safetensors", fix=fix)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ModelError(
            f"{folder} lacks shards that its index names",
            got=", ".join(absent),
            fix="run the download again: it goes on where it stopped",
        )
    shards = tuple(read_shard(file) for file in files)
    seen: set[str] = set()
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in seen:
            raise ModelError(f"{tensor.name} is stored twice in {folder}")
        seen.add(tensor.name)
    return shards


def open_model(folder: Path) -> StoredModel:
    """Read config and headers of a model folder.

    Raises:
        ModelError: as `read_config` and `whole_shards`; or weights in few bits.
    """
    if (folder / QUANTIZED_RECORD).is_file():
        raise ModelError(
            f"{folder} holds a quantised base, not its 16-bit weights",
            fix="--model with the base that it was made of",
        )
    config, shards = read_config(folder), whole_shards(folder)
    return StoredModel(folder, config, shards, {t.name: t for s in shards for t in s.tensors})


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, without a copy where it is contiguous."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Blocks that fit a core's cache, one after the other: a core outruns the disk.

    More threads would meet after each block, and on a busy machine wait for each other: writing a
    GGUF took 16 times as long as copying it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ShardWriter:
    """One safetensors file, written by one thread and hashed by another while the caller computes
    what comes next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash = hashlib.sha256()
        self._begun: deque[tuple[Future[None], Future[None]]] = deque()

    def __enter__(self) -> ShardWriter:
        self._stream = open(self.path, "wb", buffering=0)
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._begun and kind is None:
                self._settle()
        finally:
            for pool in (self._writing, self._hashing):
                pool.shutdown(cancel_futures=True)
            self._stream.close()

    @property
    def digest(self) -> str:
        """SHA-256 of everything written."""
        return self._hash.hexdigest()

    def header(self, layout: list[Stored], metadata: dict[str, str]) -> None:
        """Names, types, shapes and offsets, padded to eight bytes as the format wants."""
        entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        for tensor in layout:
            entries[tensor.name] = {
                "dtype": tensor.code,
                "shape": list(tensor.shape),
                "data_offsets": [tensor.begin, tensor.end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.write(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, piece: memoryview) -> None:
        """Append bytes, which must not change before the file is closed.

        Raises:
            OSError: an earlier piece could not be written; that of the last ones comes at the end.
        """
        if len(self._begun) == AHEAD:
            self._settle()
        hashed = self._hashing.submit(self._hash.update, piece)
        self._begun.append((self._writing.submit(self._put, piece), hashed))

    def _put(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            done += self._stream.write(piece[done:])

    def _settle(self) -> None:
        for part in self._begun.popleft():
            part.result()
