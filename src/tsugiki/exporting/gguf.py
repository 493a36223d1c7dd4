"""Writes a model, or a base with an adapter on it, as GGUF files without llama.cpp.

A stream of tensors: each is read from the mapped file, the adapter's part added in fp32, laid out
as its family's table says and rounded once. No merged folder is needed and no model is held. What
was written is read back from the file. Proves nothing: that is `proof/`'s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tsugiki.adapters.algebra import FLOATS, Change, float_blocks
from tsugiki.adapters.joined import Joined
from tsugiki.errors import ModelError
from tsugiki.exporting.describe import general_metadata
from tsugiki.exporting.vocabulary import vocabulary_metadata
from tsugiki.files import atomic_file, require_space
from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_encode import (
    DIRECT,
    DTYPES,
    Metadata,
    encode_header,
    encode_numbers,
    lay_out,
    padding,
    type_for,
)
from tsugiki.formats.gguf_file import TensorInfo, open_gguf
from tsugiki.formats.gguf_settings import limits, misfits, model_metadata
from tsugiki.formats.gguf_tensors import (
    Place,
    extra_tensors,
    family_of,
    is_image_part,
    place_of,
)
from tsugiki.formats.mixes import KINDS
from tsugiki.models.families import BUFFERS, HEAD, embedding_name, is_tied, module_path
from tsugiki.models.shards import Stored, as_bytes, one_thread
from tsugiki.models.spec import load_config

CHUNK = 8 << 20  # bytes copied at once


@dataclass(frozen=True)
class Source:
    """One tensor to write: stored numbers with their change, or a value of its own."""

    place: Place
    stored: Stored | None
    change: Change | None = None
    value: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As it will lie in the file."""
        if self.value is not None:
            return tuple(self.value.shape)
        assert self.stored is not None
        return self.place.shape(self.stored.shape)

    def type(self, wanted: GgmlType) -> GgmlType:
        """The type that it gets in a file of the wanted type."""
        return TYPES["F32"] if self.place.plain else type_for(self.shape, wanted)


@dataclass(frozen=True)
class ExportPlan:
    """Everything decided before a byte is written, but the type of the numbers."""

    joined: Joined
    metadata: Metadata
    sources: tuple[Source, ...]
    notes: list[str] = field(default_factory=list)

    def infos(self, dtype: str) -> list[TensorInfo]:
        """The tensors of a file of that type, offsets counted from the first."""
        wanted = KINDS[dtype].main
        return lay_out([(s.place.name, s.shape, s.type(wanted)) for s in self.sources])

    def header(self, dtype: str) -> bytes:
        """Everything before the first number."""
        typed = {**self.metadata, "general.file_type": KINDS[dtype].file_type}
        return encode_header(typed, self.infos(dtype))

    def need(self, dtype: str) -> int:
        """Bytes that a file of that type takes."""
        end = self.infos(dtype)[-1].end
        return self._head + end + padding(end)

    @cached_property
    def _head(self) -> int:
        """Bytes before the first number, the same for every type."""
        return len(self.header("f32"))

    def exact_type(self) -> str:
        """The narrowest type that holds every number as it is: the source for quantising.

        A merged number is a sum in fp32; rounded to 16 bits first, a quantiser would round twice.
        """
        if any(source.change is not None for source in self.sources):
            return "f32"
        stored = {s.stored.dtype for s in self.sources if s.stored and not s.place.plain}
        fits = [name for name in DIRECT if {DTYPES.get(KINDS[name].main.name)} == stored]
        return fits[0] if fits else "f32"


@dataclass(frozen=True)
class Written:
    """A finished file: types as read back from it (name → how many tensors), and its bytes."""

    path: Path
    dtype: str
    types: dict[str, int]
    nbytes: int


def plan_export(joined: Joined, name: str) -> ExportPlan:
    """Read settings and tokenizer, place every tensor, refuse what llama.cpp computes otherwise.

    Args:
        name: what the model will be called in the file.

    Raises:
        ModelError: an architecture, setting, tensor or tokenizer that cannot be written.
    """
    base = joined.base
    family = family_of(base.model_type)
    config = load_config(base.folder)
    text = config.get_text_config()
    settings = text.to_dict()
    try:
        wrong = misfits(base.model_type, settings)
        shaped = model_metadata(base.model_type, settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{base.folder / 'config.json'} is damaged", got=f"{type(error).__name__}: {error}"
        ) from None
    if wrong:
        raise ModelError(
            f"llama.cpp would compute another model than {base.folder}",
            got="; ".join(wrong),
            fix="use the merged Hugging Face folder (tsugiki merge)",
        )
    sources = _sources(joined, settings)
    embedding = next(s for s in sources if s.place.name == "token_embd.weight")
    vocabulary, notes = vocabulary_metadata(joined, embedding.shape[0])
    if any(is_image_part(module_path(disk, base.model_type)) for disk in base.tensors):
        notes.append("what reads pictures is left out: the file holds the language model")
    total = sum(torch.Size(source.shape).numel() for source in sources)
    metadata: Metadata = {
        **general_metadata(joined, family.arch, name, total),
        **shaped,
        **vocabulary,
    }
    if family.arch == "llama":
        metadata["llama.vocab_size"] = embedding.shape[0]
    return ExportPlan(
        joined, metadata, tuple(sources), [*notes, *limits(base.model_type, settings)]
    )


def _sources(joined: Joined, settings: dict[str, object]) -> list[Source]:
    """Every tensor and its place, in the order of the base's files.

    Raises:
        ModelError: tensors that the family does not know, or lacks; codes instead of numbers.
    """
    base = joined.base
    family = family_of(base.model_type)
    changes = joined.changes.by_name if joined.changes else {}
    tied = is_tied(base) and not joined.untie
    found = [
        Source(Place(name, plain=True), None, value=value)
        for name, value in extra_tensors(base.model_type, settings).items()
    ]
    unknown, codes, odd = [], [], []
    for disk, stored in base.tensors.items():
        path = module_path(disk, base.model_type)
        if BUFFERS.search(disk) or is_image_part(path) or (path == HEAD and tied):
            continue
        place = place_of(path, family, settings)
        if place is None:
            unknown.append(disk)
        elif stored.dtype not in FLOATS:
            codes.append(f"{disk} ({stored.code})")
        elif place.heads and stored.shape[0] % (2 * place.heads):
            odd.append(f"{disk} ({stored.shape[0]} rows for {place.heads} heads)")
        else:
            found.append(Source(place, stored, changes.get(disk)))
    names = {source.place.name for source in found}
    if joined.untie and "output.weight" not in names:
        embedding = embedding_name(base)
        assert embedding is not None
        found.append(Source(Place("output.weight"), base.tensors[embedding], changes.get(HEAD)))
    lost = _missing(names, int(str(settings.get("num_hidden_layers") or settings.get("n_layer"))))
    for what, items in (
        (f"holds tensors that a GGUF of {family.arch} has no place for", unknown),
        ("holds codes, not numbers", codes),
        ("does not fit its config.json", odd),
    ):
        if items:
            raise ModelError(
                f"{base.folder} {what}",
                got=", ".join(items[:6]) + (f" and {len(items) - 6} more" * (len(items) > 6)),
            )
    if lost:
        raise ModelError(f"{base.folder} lacks tensors of its own layers", got=", ".join(lost[:6]))
    return found


def _missing(names: set[str], layers: int) -> list[str]:
    """Tensors without which llama.cpp would not load the file."""
    inner = {name.partition(".")[2].partition(".")[2] for name in names if name[:4] == "blk."}
    wanted = {f"blk.{i}.{name}" for i in range(layers) for name in inner}
    return sorted((wanted | {"token_embd.weight", "output_norm.weight"}) - names)


def write_gguf(plan: ExportPlan, dtype: str, output: Path) -> Written:
    """Write one file of a type in `DIRECT`; a killed writer leaves nothing under its name.

    Raises:
        RunError: the file exists. DiskError: too little space (told before), or none left.
        ModelError: a weight that the type cannot hold; the tensor is named.
    """
    require_space(output, plan.need(dtype), f"the {dtype} file")
    infos = plan.infos(dtype)
    with atomic_file(output) as temporary, one_thread():
        with open(temporary, "wb", buffering=0) as stream:
            write_all(stream.fileno(), memoryview(plan.header(dtype)))
            for source, info in zip(plan.sources, infos, strict=True):
                for piece in encoded(plan, source, info.type):
                    write_all(stream.fileno(), piece)
                write_all(stream.fileno(), memoryview(bytes(padding(info.nbytes))))
        found = open_gguf(temporary).tensors
        asked = {info.name: (info.type.name, info.shape) for info in infos}
        assert {name: (i.type.name, i.shape) for name, i in found.items()} == asked
    types = Counter(info.type.name for info in found.values())
    return Written(output, dtype, dict(types.most_common()), output.stat().st_size)


def encoded(plan: ExportPlan, source: Source, kind: GgmlType) -> Iterator[memoryview]:
    """The bytes of one tensor in F32, F16, BF16 or Q8_0, in the order of the file.

    Raises:
        ModelError: a weight that the type cannot hold; the tensor is named.
    """
    place, stored = source.place, source.stored
    if source.value is not None:
        yield as_bytes(source.value)
        return
    assert stored is not None
    weight = plan.joined.base.tensor(stored.name)
    if source.change is None and DTYPES.get(kind.name) == stored.dtype and not place.shift:
        if place.reorders:
            yield as_bytes(place.apply(weight))
        else:
            content = plan.joined.base.bytes_of(stored)
            yield from (content[at : at + CHUNK] for at in range(0, len(content), CHUNK))
        return
    blocks = source.change.blocks(weight) if source.change else float_blocks(weight)
    if place.reorders:
        blocks = float_blocks(place.apply(_gathered(blocks, stored.shape)))
    try:
        for block in blocks:
            yield as_bytes(encode_numbers(block + place.shift if place.shift else block, kind))
    except OverflowError as error:
        half = kind.name == "F16"
        raise ModelError(
            f"{stored.name} does not fit {kind.name}",
            got=f"a weight of size {error}",
            allowed="up to 65504" if half else "finite numbers",
            fix="--gguf bf16" if half else "look at the adapter: its product is not finite",
        ) from None


def _gathered(blocks: Iterator[Tensor], shape: tuple[int, ...]) -> Tensor:
    """A whole tensor in fp32, for those whose numbers change their place."""
    whole, at = torch.empty(shape), 0
    rows = whole.reshape(shape[0], -1)
    for block in blocks:
        rows[at : at + len(block)] = block
        at += len(block)
    return whole


def write_all(handle: int, piece: memoryview) -> None:
    """Every byte, however many calls that takes."""
    done = 0
    while done < len(piece):
        done += os.write(handle, piece[done:])
