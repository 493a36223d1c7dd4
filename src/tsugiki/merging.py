"""Writes a base and an adapter as one model folder, as a stream of tensors.

Untouched tensors are copied byte for byte; changed ones are computed in fp32 by blocks and rounded
once. Shards, index, tokenizer and templates stay as they are. The folder appears whole or not at
all. Imports no transformers, holds no model, and proves nothing: that is `proof/`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tsugiki import __version__
from tsugiki.adapters.algebra import Changes, merged_blocks
from tsugiki.adapters.joined import Joined, join
from tsugiki.adapters.record import BaseIdentity
from tsugiki.errors import ModelError, UsageError
from tsugiki.files import (
    atomic_folder,
    read_json,
    refuse_existing,
    require_space,
    sha256_file,
)
from tsugiki.models.families import HEAD, disk_name, embedding_name
from tsugiki.models.shards import (
    DTYPES,
    INDEX,
    Shard,
    ShardWriter,
    Stored,
    StoredModel,
    as_bytes,
    one_thread,
)

RECORD = "tsugiki.json"
CHUNK = 8 << 20  # bytes copied at once
# Of the base alone: its card, and what tells how its own weights were trained.
OF_THE_BASE = (
    "README.md", "__init__.py", "growth.json", "training_info.json", "trainer_state.json",
    "train_results.json", "eval_results.json", "all_results.json",
)  # fmt: skip
TYPES = {
    "f32": "F32", "float32": "F32", "bf16": "BF16", "bfloat16": "BF16", "f16": "F16",
    "float16": "F16",
}  # fmt: skip
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".lock",
)  # fmt: skip


@dataclass(frozen=True)
class MergePlan:
    """Everything decided before a byte is written.

    The base may be seen as it was kept in few bits (models/kept.py): its numbers are written then.

    dtype: code of the type that every float tensor gets, None to keep each one's own.
    need: bytes that the new folder takes.
    """

    joined: Joined
    changes: Changes
    dtype: str | None
    need: int

    @property
    def base(self) -> StoredModel:
        """The model that is changed."""
        return self.joined.base

    @property
    def identity(self) -> BaseIdentity | None:
        """Who the base is."""
        return self.joined.identity

    @property
    def untie(self) -> bool:
        """Whether the head is written apart from the embedding."""
        return self.joined.untie

    @property
    def notes(self) -> list[str]:
        """What people should know of the pair."""
        return self.joined.notes


@dataclass(frozen=True)
class Merged:
    """What was written: changed tensors, all tensors, bytes."""

    folder: Path
    changed: int
    tensors: int
    nbytes: int


def plan_merge(
    adapter: Path,
    base: Path,
    *,
    name: str | None = None,
    commit: str | None = None,
    dtype: str | None = None,
    untie: bool = False,
    accept_base: bool = False,
) -> MergePlan:
    """Read the adapter and the base's headers, compare their identities, count bytes.

    Args:
        name, commit: what the base is called, for the record.
        dtype: f32, bf16 or f16 for every float tensor; each tensor's own when None.
        untie: write the head apart where the adapter changes only it or only the embedding.
        accept_base: merge into another base of the same shapes.

    Raises:
        UsageError: a type that is not known.
        ModelError, AdapterError: a folder that cannot be used, another base, a tied embedding.
    """
    code = None if dtype is None else type_code(dtype)
    joined = join(base, adapter, name=name, commit=commit, untie=untie, accept_base=accept_base)
    assert joined.changes is not None
    side = sum(file.stat().st_size for file in _beside(base))
    plan = MergePlan(joined, joined.changes, code, 0)
    weights = sum(t.end - t.begin for shard in plan.base.shards for t in _layout(plan, shard))
    return MergePlan(joined, joined.changes, code, weights + side + (1 << 20))


def type_code(dtype: str) -> str:
    """A type as users write it → as files name it.

    Raises:
        UsageError: not a type that weights are merged in.
    """
    if dtype not in TYPES:
        raise UsageError(
            f"--dtype {dtype} is not a type to merge in",
            allowed="f32, bf16, f16; or nothing, for the base's own",
        )
    return TYPES[dtype]


def require_place(plan: MergePlan, output: Path) -> None:
    """Refuse a folder that exists, or a disk that cannot hold the model.

    Raises:
        RunError: the folder exists. DiskError: too little space.
    """
    refuse_existing(output)
    require_space(output, plan.need, "the merged model")


def write_merged(plan: MergePlan, output: Path) -> Merged:
    """Write the merged folder; a killed writer leaves nothing under this name.

    Raises:
        RunError: the folder exists. DiskError: too little space (told before), or none left.
        ModelError: a weight that the type cannot hold; the tensor is named.
    """
    require_place(plan, output)
    with atomic_folder(output) as temporary, one_thread():
        for file in _beside(plan.base.folder):
            shutil.copyfile(file, temporary / file.name)
        digests: dict[str, str] = {}
        weight_map: dict[str, str] = {}
        total = count = 0
        for shard in plan.base.shards:
            layout = _layout(plan, shard)
            with ShardWriter(temporary / shard.path.name) as writer:
                writer.header(layout, shard.metadata)
                for tensor in layout:
                    for piece in _pieces(plan, tensor):
                        writer.write(piece)
            digests[shard.path.name] = writer.digest
            weight_map |= {tensor.name: shard.path.name for tensor in layout}
            total += sum(tensor.nbytes for tensor in layout)
            count += len(layout)
        _write_index(plan.base.folder / INDEX, temporary / INDEX, weight_map, total)
        _write_config(plan, temporary / "config.json")
        _write_chat(plan, temporary)
        _write_record(plan, temporary, digests)
    changed = {*plan.changes.by_name, *plan.base.through}
    return Merged(output, len(changed), count, total)


def _layout(plan: MergePlan, shard: Shard) -> list[Stored]:
    """The tensors of a new shard with their offsets counted from its first data byte."""
    wanted = list(shard.tensors)
    if plan.untie and disk_name(HEAD, plan.base.tensors) is None:
        wanted += [
            Stored(HEAD, t.file, t.code, t.shape, t.begin, t.end)
            for t in shard.tensors
            if t.name == embedding_name(plan.base)
        ]
    placed, at = [], 0
    for tensor in wanted:
        code = _code(plan, tensor)
        size = tensor.nbytes // tensor.dtype.itemsize * DTYPES[code].itemsize
        placed.append(Stored(tensor.name, tensor.file, code, tensor.shape, at, at + size))
        at += size
    return placed


def _code(plan: MergePlan, tensor: Stored) -> str:
    return plan.dtype if plan.dtype and tensor.dtype.is_floating_point else tensor.code


def merged_tensor(plan: MergePlan, name: str) -> torch.Tensor:
    """One tensor whole, as `write_merged` would write it.

    Raises:
        ModelError: a weight that the type cannot hold.
    """
    source, change = _source(plan, name), plan.changes.by_name.get(name)
    code = _code(plan, source)
    try:
        blocks = list(merged_blocks(plan.base.tensor(source.name), change, DTYPES[code]))
    except OverflowError as error:
        raise _does_not_fit(name, code, error) from None
    return torch.cat(blocks).view(source.shape)


def _does_not_fit(name: str, code: str, error: OverflowError) -> ModelError:
    half = code == "F16"
    return ModelError(
        f"{name} does not fit {NAMES.get(code, code)}",
        got=f"a weight of size {error}",
        allowed="up to 65504" if half else "finite numbers",
        fix="--dtype bf16" if half else "look at the adapter: its product is not finite",
    )


def _source(plan: MergePlan, name: str) -> Stored:
    """Where a tensor's numbers come from: a head that is written apart has the embedding's."""
    tensors = plan.base.tensors
    return tensors[name if name in tensors else embedding_name(plan.base) or ""]


def _pieces(plan: MergePlan, placed: Stored) -> Iterator[memoryview]:
    """The bytes of one new tensor."""
    name = placed.name
    source = _source(plan, name)
    change = plan.changes.by_name.get(name)
    if change is None and placed.code == source.code:
        content = plan.base.bytes_of(source)
        yield from (content[at : at + CHUNK] for at in range(0, len(content), CHUNK))
        return
    try:
        for block in merged_blocks(plan.base.tensor(source.name), change, placed.dtype):
            yield as_bytes(block)
    except OverflowError as error:
        raise _does_not_fit(name, placed.code, error) from None


def _beside(folder: Path) -> list[Path]:
    """What travels with new weights: configs, tokenizer, templates, licence; no training record."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name[0] != "."
        and not file.name.endswith(NOT_COPIED)
        and file.name not in (INDEX, RECORD, *OF_THE_BASE)
    ]


def _write_index(old: Path, new: Path, weight_map: dict[str, str], total: int) -> None:
    if not old.is_file():
        return
    index = read_json(old)
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    index["weight_map"] = dict(sorted(weight_map.items()))
    _dump(new, index)


def _write_config(plan: MergePlan, path: Path) -> None:
    """config.json with the type and the tie that were written; untouched where both stay."""
    if plan.dtype is None and not plan.untie:
        return
    config = read_json(path)
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    if plan.dtype is not None:
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = NAMES[plan.dtype]
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = NAMES[plan.dtype]
    if plan.untie:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    _dump(path, config)


def _write_chat(plan: MergePlan, folder: Path) -> None:
    """The chat template and stop tokens that training used, where the base brings others."""
    template = plan.joined.template()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    more, stops = plan.joined.stops()
    if more:
        path = folder / "generation_config.json"
        config = read_json(path) if path.is_file() else {}
        config["eos_token_id"] = [*more, *stops]
        _dump(path, config)


def _write_record(plan: MergePlan, folder: Path, digests: dict[str, str]) -> None:
    """Where the model came from, and the digest of each file."""
    files = {
        file.name: digests.get(file.name) or sha256_file(file) for file in sorted(folder.iterdir())
    }
    record = {
        "format_version": 1,
        "kind": "merged",
        "base": plan.identity.__dict__ if plan.identity else None,
        "base_kept": plan.base.kept,
        "adapter": {"folder": str(plan.changes.folder), "weights_sha256": plan.changes.digest},
        "dtype": plan.dtype and NAMES[plan.dtype],
        "untied": plan.untie,
        "chat": plan.changes.chat,
        "versions": {"tsugiki": __version__, "torch": torch.__version__},
        "files": files,
    }
    _dump(folder / RECORD, record)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
