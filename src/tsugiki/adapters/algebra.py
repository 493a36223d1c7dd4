"""An adapter as changes to stored tensors: disk name → what happens to that tensor.

The merged tensor stream: W + scale·B·A (Hu et al. 2021), DoRA's m·V/‖V‖ (Liu et al. 2024,
arXiv:2402.09353) and replaced modules, computed in fp32 by blocks of rows, so that nothing larger
than a block is held. Reads PEFT's folders, ours or a stranger's. Imports no transformers; writes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsugiki.adapters.peft_config import PeftConfig
from tsugiki.adapters.record import PREFIX, check_scales, open_adapter
from tsugiki.errors import AdapterError
from tsugiki.models.families import (
    FAMILIES,
    HEAD,
    disk_name,
    embedding_name,
    is_transposed,
    module_path,
)
from tsugiki.models.shards import Stored, StoredModel, map_file, read_shard, view

BLOCK = 1 << 18  # elements computed at once: 1 MB in fp32 stays in a core's cache
CAN = ("use_dora", "modules_to_save")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}


@dataclass(frozen=True)
class LowRank:
    """W + scale·B·A for one stored matrix.

    a (r, in) and b (out, r). The stored matrix is (out, in), or (in, out) where `transposed`; an
    embedding's is (vocabulary, width), with in = vocabulary. magnitude (out,) makes it DoRA.
    """

    path: str
    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None
    embedding: bool = False

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """(rows, r) and (r, columns), whose product has the shape of the stored matrix."""
        return (self.a.T, self.b.T) if self.transposed else (self.b, self.a)

    def blocks(self, weight: Tensor) -> Iterator[Tensor]:
        """The merged matrix in fp32, some rows at a time.

        weight: (rows, columns) as stored.
        """
        ratio = None
        if self.magnitude is not None and self.transposed:  # the norms run over all the rows
            squares = torch.zeros(weight.shape[1])
            for block in self._sums(weight):
                squares += block.square().sum(0)
            ratio = self.magnitude.float() / squares.sqrt()
        at = 0
        for block in self._sums(weight):
            if self.magnitude is not None:
                if ratio is not None:
                    block *= ratio
                else:
                    some = self.magnitude[at : at + len(block)].float()
                    block *= (some / torch.linalg.vector_norm(block, dim=1))[:, None]
            at += len(block)
            yield block

    def _sums(self, weight: Tensor) -> Iterator[Tensor]:
        left, right = (half.float() for half in self.halves)
        left = left * self.scale
        step = max(1, BLOCK // weight.shape[1])
        for at in range(0, weight.shape[0], step):
            block = weight[at : at + step].to(torch.float32, copy=True)
            yield block.addmm_(left[at : at + step], right)


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained whole (modules_to_save)."""

    path: str
    value: Tensor

    def blocks(self, weight: Tensor) -> Iterator[Tensor]:
        """The new tensor in fp32, some rows at a time."""
        return float_blocks(self.value)


Change = LowRank | Replaced


@dataclass(frozen=True)
class Changes:
    """What an adapter does to a base: disk name → change, and what it knows of itself."""

    folder: Path
    by_name: dict[str, Change]
    config: PeftConfig
    record: dict[str, Any] | None
    digest: str
    notes: list[str] = field(default_factory=list)

    @property
    def chat(self) -> dict[str, Any] | None:
        """The chat format's state that training recorded."""
        return self.record.get("chat") if self.record else None


def same_numbers(own: Tensor, copy: Tensor) -> bool:
    """Whether a copy that came with an adapter is the base's tensor, perhaps in a shorter type."""
    return own.shape == copy.shape and (
        torch.equal(own, copy.to(own.dtype)) or torch.equal(own.to(copy.dtype), copy)
    )


def float_blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in fp32, flat where it has no rows; never more than a block."""
    rows = tensor if tensor.dim() > 1 else tensor.reshape(-1, 1)
    step = max(1, BLOCK // max(1, rows[:1].numel()))
    for at in range(0, rows.shape[0], step):
        yield rows[at : at + step].float()


def merged_blocks(weight: Tensor, change: Change | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor with its change, in the type that will be written, some rows at a time.

    Raises:
        OverflowError: a value does not fit the type, or the result is not finite.
    """
    largest = torch.finfo(dtype).max
    for block in change.blocks(weight) if change is not None else float_blocks(weight):
        done = block.to(dtype)
        low, high = (float(end) for end in block.aminmax())
        # One pass; only what lies near the end of the type, or is NaN, needs the slow question.
        if not (-largest <= low and high <= largest) and not bool(torch.isfinite(done).all()):
            raise OverflowError(f"{max(-low, high):.4g}")
        yield done


def read_changes(folder: Path, model: StoredModel) -> Changes:
    """Read an adapter against the tensors of a base; everything is checked before any use.

    Raises:
        AdapterError: not an adapter folder, pickled, changed since it was saved, another scale
            than recorded; a missing layer, an extra tensor, a wrong shape or rank, NaN or inf; an
            architecture whose names are not known; something that cannot be merged, by name.
    """
    opened = open_adapter(folder, can=CAN)
    config, record = opened.config, opened.record
    if record is None and model.model_type not in FAMILIES:
        raise AdapterError(
            f"the names of {model.model_type!r} are not known, and {folder} does not bring them",
            allowed=f"any adapter that tsugiki saved; one from elsewhere on {', '.join(FAMILIES)}",
        )
    shard = read_shard(opened.weights, AdapterError)
    mapped = map_file(opened.weights)
    tensors = {stored.name: view(mapped, stored) for stored in shard.tensors}
    reading = _Reading(folder, model, config, record)
    for name, tensor in tensors.items():
        reading.take(name, tensor)
    by_name = reading.changes()
    if record is not None:
        paths = [change.path for change in by_name.values() if isinstance(change, LowRank)]
        check_scales(record["targets"], config, paths, folder)
    return Changes(folder, by_name, config, record, opened.digest, reading.notes)


class _Reading:
    """Sorts an adapter's tensors by target and collects everything that is wrong."""

    def __init__(
        self, folder: Path, model: StoredModel, config: PeftConfig, record: dict[str, Any] | None
    ) -> None:
        self.folder, self.model, self.config, self.record = folder, model, config, record
        self.low: dict[str, dict[str, Tensor]] = {}
        self.whole: dict[str, Tensor] = {}
        self.embeddings: set[str] = set()
        self.wrong: list[str] = []
        self.notes: list[str] = []

    def take(self, name: str, tensor: Tensor) -> None:
        """File one tensor under its target."""
        path = name.removeprefix(PREFIX)
        if not name.startswith(PREFIX):
            self.wrong.append(f"{name}: not a name that PEFT writes")
            return
        if not tensor.is_floating_point() or tensor.numel() == 0:
            self.wrong.append(f"{name}: {tensor.dtype} of shape {tuple(tensor.shape)}")
            return
        if not all(bool(torch.isfinite(end)) for end in tensor.aminmax()):
            self.wrong.append(f"{name}: holds NaN or inf")
            return
        for end, part in PARTS.items():
            if path.endswith(end):
                target = path.removesuffix(end)
                if "embedding" in end:
                    self.embeddings.add(target)
                self.low.setdefault(target, {})[part] = tensor
                return
        if path.endswith(".base_layer.weight"):
            self._compare_with_base(name, path.replace(".base_layer.weight", ".weight"), tensor)
        elif self._is_saved(path):
            self.whole[path] = tensor
        else:
            self.wrong.append(f"{name}: neither A, B or magnitude, nor one of modules_to_save")

    def changes(self) -> dict[str, Change]:
        """Disk name → change.

        Raises:
            AdapterError: everything that is wrong, at once.
        """
        found: dict[str, Change] = {}
        for path, parts in self.low.items():
            name = self._disk(path + ".weight")
            if name is None:
                self.wrong.append(f"{PREFIX}{path}: the base stores no {path}.weight")
                continue
            change = self._low_rank(path, name, parts)
            if change is not None:
                found[name] = change
        for path, tensor in self.whole.items():
            name = self._disk(path)
            stored = self._stored(name) if name else None
            if name is None or stored is None:
                self.wrong.append(f"{PREFIX}{path}: the base stores no {path}")
            elif stored.shape != tuple(tensor.shape):
                self.wrong.append(
                    f"{PREFIX}{path}: shape {tuple(tensor.shape)}, the base has {stored.shape}; "
                    "a vocabulary that grew in training cannot be merged"
                )
            else:
                found[name] = Replaced(path, tensor)
        present = {change.path.removesuffix(".weight") for change in found.values()}
        expected = self._expected()
        missing = sorted(expected - present - set(self.low))
        self.wrong += [f"{PREFIX}{path}: the layer is missing" for path in missing]
        paths = {module_path(name, self.model.model_type) for name in self.model.tensors} | {HEAD}
        lost = sorted(p for p in paths - set(self.whole) if self._is_saved(p))
        self.wrong += [f"{PREFIX}{path}: missing, of modules_to_save" for path in lost]
        extra = sorted(set(self.low) - expected)
        self.wrong += [f"{PREFIX}{path}: a layer that the adapter does not name" for path in extra]
        if self.wrong or not found:
            shown = self.wrong[:12] or ["it holds no tensors"]
            if len(self.wrong) > 12:
                shown.append(f"… and {len(self.wrong) - 12} more")
            raise AdapterError(
                f"{self.folder} does not fit {self.model.folder}:\n"
                + "\n".join(f"    {line}" for line in shown),
                fix="use the base it was trained on, and an unchanged copy of the adapter",
            )
        return {name: found[name] for name in sorted(found)}

    def _low_rank(self, path: str, name: str, parts: dict[str, Tensor]) -> LowRank | None:
        stored = self._stored(name)
        absent = [f"lora_{part}" for part in "AB" if part not in parts]
        if bool(self.config.raw.get("use_dora")) and "m" not in parts:
            absent.append("lora_magnitude_vector")
        if absent:
            self.wrong.append(f"{PREFIX}{path}: {' and '.join(absent)} missing")
            return None
        if stored.dtype not in FLOATS or len(stored.shape) != 2:
            self.wrong.append(f"{name}: stored as {stored.code} {stored.shape}, not a plain matrix")
            return None
        embedding = path in self.embeddings
        transposed = embedding or is_transposed(
            path, self.model.model_type, bool(self.config.raw.get("fan_in_fan_out"))
        )
        if transposed and self.config.as_parameter(path):
            self.wrong.append(f"{PREFIX}{path}: a Conv1D or embedding adapted as a parameter")
            return None
        a, b, magnitude = parts["A"], parts["B"], parts.get("m")
        rows, columns = stored.shape
        outs, ins = (columns, rows) if transposed else (rows, columns)
        r = self.config.rank_of(path)
        for part, tensor, right in (
            ("A", a, (r, ins)),
            ("B", b, (outs, r)),
            ("magnitude_vector", magnitude, (outs,)),
        ):
            if tensor is not None and tuple(tensor.shape) != right:
                shape = tuple(tensor.shape)
                self.wrong.append(f"{PREFIX}{path}.lora_{part}: shape {shape}, expected {right}")
                return None
        if embedding and magnitude is not None:
            self.wrong.append(f"{PREFIX}{path}: DoRA on an embedding is not supported")
            return None
        scale = self.config.scale_of(path)
        return LowRank(path, a, b, scale, transposed, magnitude, embedding)

    def _stored(self, name: str) -> Stored:
        """The tensor of that name; a tied head that is not stored is its embedding."""
        found = self.model.tensors.get(name)
        if found is None:
            embedding = embedding_name(self.model)
            assert name == HEAD
            assert embedding is not None
            found = self.model.tensors[embedding]
        return found

    def _disk(self, parameter: str) -> str | None:
        """The record's own map first, then the families' tables; a tied head keeps its name."""
        if self.record is not None:
            entry = self.record["targets"].get(parameter.removesuffix(".weight"))
            told = entry.get("disk") if isinstance(entry, dict) else None
            if isinstance(told, str) and told in self.model.tensors:
                return told
        found = disk_name(parameter, self.model.tensors)
        if found is None and parameter == HEAD and embedding_name(self.model) is not None:
            return HEAD
        return found

    def _is_saved(self, path: str) -> bool:
        """Whether modules_to_save names the module; PEFT takes any path that ends so."""
        saved = self.config.raw.get("modules_to_save") or []
        return path.rpartition(".")[0].endswith(tuple(map(str, saved)))

    def _compare_with_base(self, name: str, parameter: str, tensor: Tensor) -> None:
        """PEFT copies an adapted embedding along; it must be the base's own."""
        disk = self._disk(parameter)
        stored = self.model.tensor(self._stored(disk).name) if disk else None
        if stored is None or stored.shape != tensor.shape:
            self.wrong.append(f"{name}: the base has no such tensor of shape {tuple(tensor.shape)}")
        elif not same_numbers(stored, tensor):
            self.wrong.append(f"{name}: differs from the base's {disk}; it was trained on another")

    def _expected(self) -> set[str]:
        """Modules that must have come, as the record or PEFT's config says."""
        if self.record is not None:
            return set(self.record["targets"])
        paths = [
            module_path(name, self.model.model_type).removesuffix(".weight")
            for name, stored in self.model.tensors.items()
            if name.endswith(".weight") and len(stored.shape) == 2
        ]
        head = HEAD.removesuffix(".weight")
        if head not in paths:  # tied: stored as the embedding alone
            paths.append(head)
        inner = [p for p in paths if not p.endswith(("lm_head", "embed_tokens", "wte", "wpe"))]
        return self.config.expected(paths, inner)
