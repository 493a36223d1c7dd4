"""Which type each tensor of a quantised model gets: llama.cpp's mixes, as rules over names.

A mix such as q4_k_m gives some tensors more bits than others, by their role, their layer and the
shape of the model; a type whose blocks do not fit a row falls back to another. The rules are those
of llama.cpp (`llama_tensor_get_type_impl` and `tensor_type_fallback` in src/llama-quant.cpp) for
dense models without an importance matrix; `benchmarks/quantise_mix.py` holds them to its bytes.
Knows nothing of the numbers in the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsugiki.errors import ModelError, UsageError, did_you_mean
from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_file import TensorInfo

# The families whose mixes are proven; Mistral is stored as llama.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")


@dataclass(frozen=True)
class Kind:
    """A file type: llama.cpp's number for it (`llama_ftype`) and its main tensor type."""

    name: str
    file_type: int
    main: GgmlType


KINDS: dict[str, Kind] = {
    name: Kind(name, number, TYPES[main])
    for name, number, main in (
        ("f32", 0, "F32"), ("f16", 1, "F16"), ("bf16", 32, "BF16"), ("q8_0", 7, "Q8_0"),
        ("q6_k", 18, "Q6_K"), ("q5_k_m", 17, "Q5_K"), ("q5_k_s", 16, "Q5_K"),
        ("q4_k_m", 15, "Q4_K"), ("q4_k_s", 14, "Q4_K"), ("q3_k_l", 13, "Q3_K"),
        ("q3_k_m", 12, "Q3_K"), ("q3_k_s", 11, "Q3_K"), ("q2_k", 10, "Q2_K"),
        ("q5_1", 9, "Q5_1"), ("q5_0", 8, "Q5_0"), ("q4_1", 3, "Q4_1"), ("q4_0", 2, "Q4_0"),
    )
}  # fmt: skip
# What takes the place of a type whose blocks of 256 do not fit a row.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


def find_kind(name: str) -> Kind:
    """The file type of that name.

    Raises:
        UsageError: there is none; the nearest is proposed.
    """
    kind = KINDS.get(name.lower())
    if kind is None:
        near = did_you_mean(name.lower(), list(KINDS))
        raise UsageError(
            f"{name} is no type that a GGUF file can be written in",
            allowed=" ".join(KINDS),
            fix=f"did you mean {near}?" if near else None,
        )
    return kind


@dataclass(frozen=True)
class Shape:
    """What a mix asks of a model: its layers, query heads per key head, and an old exception."""

    layers: int
    group: int
    is_70b: bool


class Header(Protocol):
    """What is asked of a GGUF file, or of what one will be."""

    @property
    def path(self) -> Path:
        """What errors name."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Its keys."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors, by name."""


def model_shape(file: Header) -> Shape:
    """Read it from the metadata.

    Raises:
        ModelError: an architecture whose mixes are not known here, mixture of experts, one part
            of a split model, missing or impossible counts.
    """
    known = file.metadata
    name = known.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path} cannot be quantised: its architecture is not known here",
            got=str(name),
            allowed=", ".join(ARCHITECTURES),
        )
    if known.get("split.count", 0) not in (0, 1):
        raise ModelError(f"{file.path} is one of {known['split.count']} parts; join them first")
    if known.get(f"{name}.expert_count", 0):
        raise ModelError(f"{file.path} is a mixture of experts, which is not quantised here")
    counts: list[int] = []
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        value = known.get(f"{name}.{key}", counts[-1] if key.endswith("_kv") else None)
        if hasattr(value, "__len__") and not isinstance(value, str) and len(value):
            value = int(value[0])  # a count for each layer: the mixes look at the first
        if not isinstance(value, int) or value < 0 or (value == 0 and not key.endswith("_kv")):
            raise ModelError(f"{file.path}: {name}.{key} is {value!r}, not a count")
        counts.append(value)
    layers, heads, groups = counts
    is_70b = layers == 80 and (name == "qwen2" or (name == "llama" and heads != groups))
    return Shape(layers, heads // groups if groups else 0, is_70b)


def in_order(names: list[str]) -> list[str]:
    """Names as llama.cpp walks and writes them: what is in no layer first, then by layer."""

    def place(name: str) -> tuple[int, bytes]:
        layer = re.match(r"blk\.(\d+)\.", name)
        return (int(layer[1]) if layer else -1, name.encode())

    return sorted(names, key=place)


def choose_types(file: Header, kind: Kind) -> dict[str, GgmlType]:
    """The type of every tensor, in the order of writing.

    Raises:
        ModelError: see `model_shape`.
    """
    shape = model_shape(file)
    names = in_order(list(file.tensors))
    values = [n for n in names if _is_value(n)]
    tied = OUTPUT not in file.tensors
    chosen: dict[str, GgmlType] = {}
    value = down = 0  # how many of that role have been seen
    for name in names:
        info = file.tensors[name]
        if not _may_change(info):
            chosen[name] = info.type
            continue
        wanted = kind.main
        if not kind.main.quantised:
            chosen[name] = wanted
            continue
        if name == OUTPUT or (tied and name == EMBEDDING):
            wanted = _for_output(info, kind.main)
        elif _is_value(name):
            wanted = _for_value(kind, shape, value, len(values))
            value += 1
        elif "ffn_down" in name:
            wanted = _for_down(kind, down, shape.layers)
            down += 1
        elif "attn_output.weight" in name:
            more = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}
            wanted = TYPES[more.get(kind.name, wanted.name)]
        chosen[name] = _that_fits(info, wanted)
    return chosen


def _is_value(name: str) -> bool:
    """Values, alone or fused with queries and keys: they suffer most from few bits."""
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _may_change(info: TensorInfo) -> bool:
    """Matrices may; norms, biases and position embeddings stay as they are."""
    return (
        info.rows > 1
        and info.name.endswith("weight")
        and "_norm.weight" not in info.name
        and "position_embd" not in info.name
    )


def _for_output(info: TensorInfo, main: GgmlType) -> GgmlType:
    if info.columns % main.block or main.name == "Q8_0":
        return TYPES["Q8_0"]
    return TYPES["Q6_K"]


def _for_value(kind: Kind, shape: Shape, i: int, count: int) -> GgmlType:
    name = kind.main.name
    if kind.name == "q2_k":
        name = "Q4_K" if shape.group >= 4 else "Q3_K"
    elif kind.name == "q3_k_m":
        name = "Q5_K" if i < 2 else "Q4_K"
    elif kind.name == "q3_k_l" or (kind.name == "q4_k_s" and i < 4):
        name = "Q5_K"
    elif kind.name in ("q4_k_m", "q5_k_m") and _more_bits(i, count):
        name = "Q6_K"
    if shape.is_70b and name in ("Q3_K", "Q4_K"):
        name = "Q5_K"
    return TYPES[name]


def _for_down(kind: Kind, i: int, layers: int) -> GgmlType:
    name = kind.main.name
    if kind.name == "q2_k":
        name = "Q3_K"
    elif kind.name == "q3_k_m":
        name = "Q5_K" if i < layers // 16 else "Q4_K"
    elif kind.name == "q3_k_l" or (kind.name == "q4_k_s" and i < layers // 8):
        name = "Q5_K"
    elif kind.name in ("q4_k_m", "q5_k_m") and _more_bits(i, layers):
        name = "Q6_K"
    return TYPES[name]


def _more_bits(i: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = count // 8
    # C's remainder keeps the sign, but what is negative here is below `eighth` anyway.
    return i < eighth or i >= 7 * count // 8 or (i - eighth) % 3 == 2


def _that_fits(info: TensorInfo, wanted: GgmlType) -> GgmlType:
    if info.columns % wanted.block == 0:
        return wanted
    other = TYPES[FALLBACK.get(wanted.name, wanted.name)]
    return other if info.columns % other.block == 0 else TYPES["F16"]
