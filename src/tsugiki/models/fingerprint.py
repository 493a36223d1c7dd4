"""Who a base is: a digest over its tensors, the same however the files are laid out.

SHA-256 over the sorted (module path, shape, dtype, stored bytes) of each tensor; a stored tied
copy equal to its partner and buffers are left out. `rounded` is the same after rounding to bf16,
so that a base that differs only in its type is recognised. Knows nothing of adapters.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from tsugiki.errors import TsugikiError
from tsugiki.files import atomic_write, cache_folder
from tsugiki.models.shards import Stored, map_file, read_shard, release, shard_files, view

VERSION = 1
THREADS = 2
BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq", "inv_freq")


@dataclass(frozen=True)
class Fingerprint:
    """exact: over the stored bytes. rounded: the same after rounding to bf16."""

    exact: str
    rounded: str


class Names(Protocol):
    """What has to be known of names: `NameMap` from a module tree, or a family's table."""

    def to_module(self, disk: str) -> str | None:
        """The parameter path that a stored name means; None for buffers."""

    def partner(self, path: str) -> str | None:
        """The parameter that this one is tied to."""


def fingerprint_folder(folder: Path, meta_model: nn.Module) -> Fingerprint:
    """Identity of a model folder; computed once and cached beside size and time of its files."""
    from tsugiki.models.spec import NameMap  # imports transformers, which merging does without

    return fingerprint_stored(folder, NameMap(meta_model))


def fingerprint_stored(folder: Path, names: Names) -> Fingerprint:
    """The same with names that need no module tree."""
    files = shard_files(folder)
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    cache = _cache_file(folder)
    try:
        known = json.loads(cache.read_text())
        if known["stamp"] == stamp and known["version"] == VERSION:
            return Fingerprint(known["exact"], known["rounded"])
    except (OSError, ValueError, KeyError, TypeError):
        pass

    result = fingerprint_tensors(_tensors_of(files), names)
    content = {"version": VERSION, "stamp": stamp, **result.__dict__}
    with contextlib.suppress(TsugikiError):  # a cache that cannot be written only costs time
        atomic_write(cache, json.dumps(content))
    return result


def _tensors_of(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor; memory that reading one brought in is let go of a few tensors later."""
    for file in files:
        mapped = map_file(file)
        read: deque[Stored] = deque()
        for stored in read_shard(file).tensors:
            yield stored.name, view(mapped, stored)
            read.append(stored)
            if len(read) > THREADS:
                release(mapped, read.popleft())


def fingerprint_tensors(tensors: Iterable[tuple[str, Tensor]], names: Names) -> Fingerprint:
    """Identity of (disk name, tensor) pairs, in any order."""
    lines: dict[str, tuple[str, str]] = {}
    wanted = (
        (names.to_module(disk) or disk, tensor)
        for disk, tensor in tensors
        if not (names.to_module(disk) is None and disk.endswith(BUFFERS))
    )
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        waiting: deque[Future[tuple[str, str, str]]] = deque()
        for path, tensor in wanted:
            waiting.append(pool.submit(_one, path, tensor))
            if len(waiting) > THREADS:  # few tensors in memory at a time
                path, exact, rounded = waiting.popleft().result()
                lines[path] = (exact, rounded)
        for future in waiting:
            path, exact, rounded = future.result()
            lines[path] = (exact, rounded)
    for path in list(lines):
        partner = names.partner(path)
        if partner is None:
            continue
        if partner not in lines:
            lines[partner] = lines.pop(path)
        elif lines[partner] == lines[path]:
            del lines[path]
    ordered = sorted(lines.items())
    return Fingerprint(
        *(
            hashlib.sha256("\n".join(f"{p} {v[which]}" for p, v in ordered).encode()).hexdigest()
            for which in (0, 1)
        )
    )


def _one(path: str, tensor: Tensor) -> tuple[str, str, str]:
    shape = "x".join(str(n) for n in tensor.shape)
    kind = str(tensor.dtype).removeprefix("torch.")
    exact = f"{shape} {kind} {_digest(tensor)}"
    if not tensor.is_floating_point():
        return path, exact, exact
    same = tensor.dtype == torch.bfloat16
    low = exact.split()[-1] if same else _digest(tensor.to(torch.bfloat16))
    return path, exact, f"{shape} {low}"


def _digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _cache_file(folder: Path) -> Path:
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache_folder("fingerprints") / f"{key}.json"
