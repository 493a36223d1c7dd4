"""Writes a base and an adapter as one model folder, as a stream of tensors.

Untouched tensors are copied byte for byte; changed ones are computed in fp32 by blocks and rounded
once. Shards, index, tokenizer and templates stay as they are. The folder appears whole or not at
all. Imports no transformers, holds no model, and proves nothing: that is `proof/`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tsugiki import __version__
from tsugiki.adapters.algebra import Changes, Replaced, merged_blocks, read_changes
from tsugiki.adapters.origin import identify
from tsugiki.adapters.record import BaseIdentity, check_base
from tsugiki.data.templates import FALLBACKS
from tsugiki.errors import AdapterError, ModelError, RunError, UsageError
from tsugiki.files import atomic_folder, read_json, require_space, sha256_file
from tsugiki.models.families import (
    HEAD,
    disk_name,
    embedding_name,
    is_tied,
)
from tsugiki.models.shards import (
    DTYPES,
    INDEX,
    Shard,
    ShardWriter,
    Stored,
    StoredModel,
    as_bytes,
    open_model,
)

RECORD = "tsugiki.json"
CHUNK = 8 << 20  # bytes copied at once
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

    dtype: code of the type that every float tensor gets, None to keep each one's own.
    untie: the head is written apart from the embedding.
    need: bytes that the new folder takes.
    """

    base: StoredModel
    identity: BaseIdentity | None
    changes: Changes
    dtype: str | None
    untie: bool
    need: int
    notes: list[str] = field(default_factory=list)


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
    model = open_model(base)
    if model.config.get("quantization_config"):
        raise ModelError(
            f"{base} is quantised: its stored numbers are codes, not weights",
            fix="--model with the 16-bit original of this model",
        )
    changes = read_changes(adapter, model)
    notes = list(changes.notes)
    identity = identify(model, name or str(base), commit)
    if changes.record is None:
        notes.append(
            "base not verified: the adapter comes from elsewhere, only shapes were checked"
        )
    else:
        notes += check_base(changes.record.get("base"), identity, adapter, accept_base=accept_base)
    apart = _must_untie(model, changes)
    if apart and not untie:
        what, other = ("head", "embedding") if HEAD in apart else ("embedding", "head")
        raise AdapterError(
            f"{adapter} changes the {what} ({apart}), which this base ties to its {other}: "
            "one stored tensor cannot be both",
            fix="--untie writes the two apart, which is exactly what the adapter computes",
        )
    if apart:
        notes.append("the head is written apart from the embedding (tie_word_embeddings: false)")
    plan = MergePlan(model, identity, changes, code, bool(apart), 0, notes)
    side = sum(file.stat().st_size for file in _beside(base))
    weights = sum(t.end - t.begin for shard in model.shards for t in _layout(plan, shard))
    return MergePlan(model, identity, changes, code, bool(apart), weights + side + (1 << 20), notes)


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


def write_merged(plan: MergePlan, output: Path) -> Merged:
    """Write the merged folder; a killed writer leaves nothing under this name.

    Raises:
        RunError: the folder exists. DiskError: too little space (told before), or none left.
        ModelError: a weight that the type cannot hold; the tensor is named.
    """
    if output.exists():
        raise RunError(f"{output} exists already", fix="choose another --output, or remove it")
    sweep_left_over(output)
    require_space(output, plan.need, "the merged model")
    with atomic_folder(output) as temporary, _held(temporary), _one_thread():
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
    return Merged(output, len(plan.changes.by_name), count, total)


def sweep_left_over(output: Path) -> None:
    """Remove what killed writers of this folder left beside it; one still at work is left alone."""
    for left in (
        sorted(output.parent.glob(f".{output.name}.*.tmp")) if output.parent.is_dir() else ()
    ):
        handle = os.open(left, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on the folder while it is written, freed by the kernel however the writer ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One core outruns the disk here, the next one hashes; more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _must_untie(model: StoredModel, changes: Changes) -> str | None:
    """The name whose change the tied partner must not see; None where nothing is torn apart."""
    if not is_tied(model):
        return None
    head = disk_name(HEAD, model.tensors) or HEAD
    embedding = embedding_name(model)
    ours, theirs = changes.by_name.get(head), changes.by_name.get(embedding or "")
    if ours is None and theirs is None:
        return None
    if (
        isinstance(ours, Replaced)
        and isinstance(theirs, Replaced)
        and torch.equal(ours.value, theirs.value)
    ):
        return None
    return head if ours is not None else embedding


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


def _pieces(plan: MergePlan, placed: Stored) -> Iterator[memoryview]:
    """The bytes of one new tensor."""
    name = placed.name
    if name not in plan.base.tensors:
        source = plan.base.tensors[embedding_name(plan.base) or ""]
    else:
        source = plan.base.tensors[name]
    change = plan.changes.by_name.get(name)
    if change is None and placed.code == source.code:
        content = plan.base.bytes_of(source)
        yield from (content[at : at + CHUNK] for at in range(0, len(content), CHUNK))
        return
    try:
        for block in merged_blocks(plan.base.tensor(source.name), change, placed.dtype):
            yield as_bytes(block)
    except OverflowError as error:
        kind = NAMES.get(placed.code, placed.code)
        half = placed.code == "F16"
        raise ModelError(
            f"{name} does not fit {kind}",
            got=f"a weight of size {error}",
            allowed="up to 65504" if half else "finite numbers",
            fix="--dtype bf16" if half else "look at the adapter: its product is not finite",
        ) from None


def _beside(folder: Path) -> list[Path]:
    """Everything of a model folder that is not weights: configs, tokenizer, templates, licence."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.name[0] != "."
        and not file.name.endswith(NOT_COPIED)
        and file.name not in (INDEX, RECORD, "README.md", "__init__.py")
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
    chat = plan.changes.chat or {}
    template = FALLBACKS.get(str(chat.get("format")))
    if template is not None:
        starts = "true" if _starts_with_bos(folder) else "false"
        template = f"{{%- set starts_with_bos = {starts} -%}}{template}"
    else:
        template = _template_of(plan.changes.folder)
    if template is not None and template != _template_of(folder):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    known = config.get("eos_token_id", None if config else plan.base.setting("eos_token_id"))
    stops = [] if known is None else known if isinstance(known, list) else [known]
    more = [i for i in chat.get("stop_ids", []) if i not in stops]
    if more:
        config["eos_token_id"] = [*more, *stops]
        _dump(path, config)


def _template_of(folder: Path) -> str | None:
    """The chat template beside a tokenizer, in either of the places where it may be."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if config.is_file():
        found = read_json(config).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def _starts_with_bos(folder: Path) -> bool:
    """Whether this tokenizer puts its BOS token before a text; our templates follow it."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() or not config.is_file():
        return False
    bos = read_json(config).get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    tokenizer = Tokenizer.from_file(str(file))
    return text is not None and tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(text)]


def _write_record(plan: MergePlan, folder: Path, digests: dict[str, str]) -> None:
    """Where the model came from, and the digest of each file."""
    files = {
        file.name: digests.get(file.name) or sha256_file(file) for file in sorted(folder.iterdir())
    }
    record = {
        "format_version": 1,
        "kind": "merged",
        "base": plan.identity.__dict__ if plan.identity else None,
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
