"""Anything that `verify` takes, as GGUF would hold it: tensors by GGUF's names, in its layout.

A model folder goes through the same table of names and transforms as export does (`formats/`);
whether that table is right, llama.cpp's logits say. Knows no limits and compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsugiki.adapters.algebra import LowRank, Replaced
from tsugiki.errors import ModelError
from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_file import GgufFile
from tsugiki.formats.gguf_settings import misfits, model_metadata
from tsugiki.formats.gguf_tensors import (
    Place,
    Settings,
    extra_tensors,
    family_of,
    is_image_part,
    place_of,
)
from tsugiki.models.families import HEAD as HEAD_PATH
from tsugiki.models.families import is_tied
from tsugiki.models.spec import load_config
from tsugiki.proof.artefact import Artefact, Entry
from tsugiki.proof.gguf.artefact import EMBEDDING, HEAD, GgufArtefact, Pair

STEP = 1 << 22  # elements compared at once: 16 MB in fp32

Read = Callable[[bool], Iterator[Tensor]]


@dataclass(frozen=True)
class Numbers:
    """One tensor.

    read: its numbers in fp32 with the adapter's part or without, (rows, columns) of at most `step`
    rows at a time. type: of what is stored. changed: an adapter changes it; pair: so, in the
    file's layout, where A and B can say it. place: how a stored tensor came here. raw: a file's
    own bytes (rows, bytes of a row).
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    read: Read
    changed: bool = False
    scale: float = 1.0
    pair: Pair | None = None
    place: Place | None = None
    raw: NDArray[np.uint8] | None = None

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def step(self) -> int:
        """Rows of a block."""
        return max(1, STEP // self.columns)

    def whole(self, changed: bool = True) -> Tensor:
        """All of it, in its own shape."""
        return torch.cat(list(self.read(changed))).reshape(self.shape)


@dataclass(frozen=True)
class Form:
    """A model as GGUF would hold it.

    settings: the keys that shape the arithmetic. optional: tensors that a file may leave out.
    beyond: what an adapter does that A and B cannot say. folder: it is a model folder, in whose
    type a merge may have been stored on the way. unlike: settings that llama.cpp computes
    otherwise.
    """

    name: str
    arch: str
    settings: Metadata
    tensors: dict[str, Numbers]
    optional: frozenset[str] = frozenset()
    beyond: tuple[str, ...] = ()
    folder: bool = False
    unlike: tuple[str, ...] = ()

    @property
    def pairs(self) -> dict[str, Pair]:
        """What its adapter adds, tensor by tensor."""
        return {name: n.pair for name, n in self.tensors.items() if n.pair is not None}


def text_settings(artefact: Artefact) -> Settings:
    """config.json of the language model, every default filled in."""
    return dict(load_config(artefact.stored.folder).get_text_config().to_dict())


def form_of(artefact: Artefact | GgufArtefact) -> Form:
    """Headers only; numbers are read when they are asked for.

    Raises:
        ModelError: an architecture or tensors that GGUF has no place for; they are named.
        AdapterError: an adapter that does not fit its file.
    """
    return _of_file(artefact) if isinstance(artefact, GgufArtefact) else _of_folder(artefact)


def _of_file(artefact: GgufArtefact) -> Form:
    pairs = artefact.pairs()
    prefix = f"{artefact.arch}."
    settings: Metadata = {
        key: _plain(artefact.file.metadata[key])
        for key in artefact.file.metadata
        if key.startswith(prefix)
    }
    tensors = {
        name: Numbers(
            name, info.shape, info.type, _file_reader(artefact.file, name, pairs.get(name)),
            changed=name in pairs, pair=pairs.get(name), raw=artefact.file.raw(name),
        )
        for name, info in artefact.file.tensors.items()
    }  # fmt: skip
    optional = frozenset({HEAD}) if HEAD in tensors else frozenset()
    return Form(artefact.name, artefact.arch, settings, tensors, optional)


def _plain(value: Any) -> Any:
    """A number for each layer, where all are the same, is that number."""
    if isinstance(value, np.ndarray):
        return value[0].item() if len(value) and bool((value == value[0]).all()) else value.tolist()
    return value


def _file_reader(file: GgufFile, name: str, pair: Pair | None) -> Read:
    info = file.tensors[name]

    def read(changed: bool) -> Iterator[Tensor]:
        step = max(1, STEP // info.columns)
        for begin in range(0, info.rows, step):
            end = min(begin + step, info.rows)
            stored = file.values(name, begin, end).reshape(-1, info.columns)
            block = torch.from_numpy(np.array(stored))  # a copy: files are read-only
            yield block + pair.rows(begin, end) if pair is not None and changed else block

    return read


def _of_folder(artefact: Artefact) -> Form:
    stored = artefact.stored
    family = family_of(stored.model_type)
    settings = text_settings(artefact)
    try:
        shaped = model_metadata(stored.model_type, settings)
        unlike = misfits(stored.model_type, settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{stored.folder / 'config.json'} is damaged", got=f"{type(error).__name__}: {error}"
        ) from None
    tensors = {
        name: _value(name, value)
        for name, value in extra_tensors(stored.model_type, settings).items()
    }
    unknown, beyond = [], []
    for path, entry in artefact.tensors().items():
        if is_image_part(path):
            continue
        place = place_of(path, family, settings)
        if place is None:
            unknown.append(path)
            continue
        tensors[place.name] = _stored(place, entry)
        if entry.change is not None and tensors[place.name].pair is None:
            beyond.append(f"{entry.change.path}: {_why(entry)}")
    if unknown:
        raise ModelError(
            f"{artefact.name} holds tensors that a GGUF of {family.arch} has no place for",
            got=", ".join(unknown[:6]),
        )
    if family.arch == "llama":
        shaped["llama.vocab_size"] = tensors[EMBEDDING].shape[0]
    return Form(
        artefact.name, family.arch, shaped, tensors, _optional(artefact), tuple(beyond),
        folder=True, unlike=tuple(unlike),
    )  # fmt: skip


def _optional(artefact: Artefact) -> frozenset[str]:
    """A tied head that is still its embedding need not be written."""
    if not is_tied(artefact.stored) or HEAD_PATH not in artefact.tensors():
        return frozenset()
    head = artefact.tensors()[HEAD_PATH]
    changes = artefact.changes.by_name if artefact.changes else {}
    ours, theirs = head.change, changes.get(head.stored.name)
    same = ours is theirs is None or (
        isinstance(ours, Replaced)
        and isinstance(theirs, Replaced)
        and torch.equal(ours.value, theirs.value)
    )
    return frozenset({HEAD}) if same else frozenset()


def _why(entry: Entry) -> str:
    if isinstance(entry.change, LowRank):
        return "DoRA's magnitude is no sum of A and B"
    return "trained whole (modules_to_save)"


def _value(name: str, value: Tensor) -> Numbers:
    return Numbers(name, tuple(value.shape), TYPES["F32"], lambda _: iter((value.reshape(1, -1),)))


def _stored(place: Place, entry: Entry) -> Numbers:
    change, shape = entry.change, place.shape(entry.stored.shape)
    pair, scale = None, 1.0
    if isinstance(change, LowRank):
        scale = change.scale
        if change.magnitude is None:
            b = place.outputs(change.b.float() * change.scale)
            pair = Pair(change.a.float(), b, change.embedding)

    def read(changed: bool) -> Iterator[Tensor]:
        pieces = (entry if changed else replace(entry, change=None)).blocks()
        if place.reorders:
            whole = torch.cat([piece.reshape(-1) for piece in pieces]).reshape(entry.stored.shape)
            pieces = iter((place.apply(whole),))
        columns = shape[-1]
        for block in _regroup(pieces, columns, max(1, STEP // columns)):
            yield block + place.shift if place.shift else block

    kind = TYPES.get(entry.stored.code, TYPES["F32"])
    return Numbers(place.name, shape, kind, read, change is not None, scale, pair, place)


def _regroup(pieces: Iterator[Tensor], columns: int, step: int) -> Iterator[Tensor]:
    """A stream of numbers cut anew: (rows, columns) of `step` rows, the last of what is left."""
    waiting: list[Tensor] = []
    count, size = 0, columns * step
    for piece in pieces:
        waiting.append(piece.reshape(-1))
        count += piece.numel()
        if count >= size:
            joined = torch.cat(waiting)
            full = count // size * size
            yield from torch.split(joined[:full].reshape(-1, columns), step)
            waiting, count = [joined[full:]], count - full
    if count:
        yield torch.cat(waiting).reshape(-1, columns)
