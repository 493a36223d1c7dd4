"""GGUF's tensor names and layouts for eight families: one table, read by export, GGUF-LoRA, verify.

From a module path (`model.layers.0.self_attn.q_proj.weight`) to a place: the name in the file, and
what its numbers go through on the way (rows of rotary heads interleaved, Conv1D turned, norm + 1).
Sources: the GGUF specification's tensor names and llama.cpp's loaders. Knows no files and no types
of storage beyond which tensors always stay F32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsugiki.errors import ModelError

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes, and how its numbers lie there.

    heads: rows of this many heads go from halves (HF's rotary order) to pairs (ggml's); 0: none.
    transposed: stored (in, out), written (out, in). shift: added to every number, in fp32.
    plain: always F32 (vectors, norms, position embeddings), whatever the file's type.
    """

    name: str
    heads: int = 0
    transposed: bool = False
    shift: float = 0.0
    plain: bool = False

    @property
    def reorders(self) -> bool:
        """Whether numbers change their place, so that rows cannot be written as they come."""
        return self.transposed or self.heads > 0

    def apply(self, tensor: Tensor) -> Tensor:
        """A whole tensor as stored → as GGUF has it, in the same type; no shift."""
        return self.outputs(tensor.T if self.transposed else tensor)

    def outputs(self, tensor: Tensor) -> Tensor:
        """The same for what has the outputs first: a bias (out,), LoRA's B (out, r)."""
        if not self.heads:
            return tensor
        halves = tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def restore(self, tensor: Tensor) -> Tensor:
        """A whole tensor as GGUF has it → as the checkpoint stores it; no shift."""
        if self.heads:
            pairs = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor.T if self.transposed else tensor

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file."""
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True)
class Family:
    """One architecture: its GGUF name and its tensors.

    inner: name under a layer → (GGUF's, rule); outer: module path → (GGUF's, rule).
    Rules: q, k: rotary rows of the query or key heads; t: transposed; 1: plus one; f: always F32.
    """

    arch: str
    layers: str
    inner: Mapping[str, tuple[str, str]]
    outer: Mapping[str, tuple[str, str]]


_ENDS = {
    "model.embed_tokens": ("token_embd", ""),
    "model.norm": ("output_norm", ""),
    "lm_head": ("output", ""),
}
_MLP = {
    "mlp.gate_proj": ("ffn_gate", ""),
    "mlp.up_proj": ("ffn_up", ""),
    "mlp.down_proj": ("ffn_down", ""),
}
_PRE_NORMS = {
    "input_layernorm": ("attn_norm", ""),
    "post_attention_layernorm": ("ffn_norm", ""),
}
_ATTENTION = {
    "self_attn.q_proj": ("attn_q", ""),
    "self_attn.k_proj": ("attn_k", ""),
    "self_attn.v_proj": ("attn_v", ""),
    "self_attn.o_proj": ("attn_output", ""),
}
_ROTARY = {"self_attn.q_proj": ("attn_q", "q"), "self_attn.k_proj": ("attn_k", "k")}
_GEMMA_NORMS = {
    "input_layernorm": ("attn_norm", "1"),
    "post_attention_layernorm": ("post_attention_norm", "1"),
    "pre_feedforward_layernorm": ("ffn_norm", "1"),
    "post_feedforward_layernorm": ("post_ffw_norm", "1"),
}
_GEMMA_ENDS = {**_ENDS, "model.norm": ("output_norm", "1")}
_LLAMA = Family("llama", "model.layers.", {**_ATTENTION, **_ROTARY, **_MLP, **_PRE_NORMS}, _ENDS)
_GEMMA3 = Family(
    "gemma3",
    "model.layers.",
    {
        **_ATTENTION,
        **_MLP,
        **_GEMMA_NORMS,
        "self_attn.q_norm": ("attn_q_norm", "1"),
        "self_attn.k_norm": ("attn_k_norm", "1"),
    },
    _GEMMA_ENDS,
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", "model.layers.", {**_ATTENTION, **_MLP, **_PRE_NORMS}, _ENDS),
    "qwen3": Family(
        "qwen3",
        "model.layers.",
        {
            **_ATTENTION,
            **_MLP,
            **_PRE_NORMS,
            "self_attn.q_norm": ("attn_q_norm", ""),
            "self_attn.k_norm": ("attn_k_norm", ""),
        },
        _ENDS,
    ),
    "gemma2": Family(
        "gemma2", "model.layers.", {**_ATTENTION, **_MLP, **_GEMMA_NORMS}, _GEMMA_ENDS
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "phi3": Family(
        "phi3",
        "model.layers.",
        {
            **_PRE_NORMS,
            "self_attn.qkv_proj": ("attn_qkv", ""),
            "self_attn.o_proj": ("attn_output", ""),
            "mlp.gate_up_proj": ("ffn_up", ""),
            "mlp.down_proj": ("ffn_down", ""),
        },
        _ENDS,
    ),
    "gpt2": Family(
        "gpt2",
        "transformer.h.",
        {
            "ln_1": ("attn_norm", ""),
            "attn.c_attn": ("attn_qkv", "t"),
            "attn.c_proj": ("attn_output", "t"),
            "ln_2": ("ffn_norm", ""),
            "mlp.c_fc": ("ffn_up", "t"),
            "mlp.c_proj": ("ffn_down", "t"),
        },
        {
            "transformer.wte": ("token_embd", ""),
            "transformer.wpe": ("position_embd", "f"),
            "transformer.ln_f": ("output_norm", ""),
            "lm_head": ("output", ""),
        },
    ),
}
VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
TEXT = "model.language_model."


def family_of(model_type: str) -> Family:
    """The family of a config's model_type.

    Raises:
        ModelError: none of those that are written; they are named.
    """
    if model_type not in FAMILIES:
        raise ModelError(
            f"models of type {model_type!r} are not written as GGUF",
            allowed=", ".join(name for name in FAMILIES if name != "gemma3_text"),
            fix="llama.cpp's own converter may know this architecture: merge, then use that",
        )
    return FAMILIES[model_type]


def is_image_part(path: str) -> bool:
    """Whether a tensor belongs to what sees pictures; a text model's file leaves it out."""
    return VISION.search(path) is not None


def place_of(path: str, family: Family, settings: Settings) -> Place | None:
    """The place of a parameter's module path; None for one that the family does not know."""
    path = path.replace(TEXT, "model.", 1) if path.startswith(TEXT) else path
    module, _, kind = path.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    found = family.outer.get(module)
    prefix = ""
    if found is None and module.startswith(family.layers):
        number, _, inner = module.removeprefix(family.layers).partition(".")
        found = family.inner.get(inner) if number.isdecimal() else None
        prefix = f"blk.{number}."
    if found is None:
        return None
    base, rule = found
    heads = 0
    if rule == "q":
        heads = int(settings["num_attention_heads"])
    elif rule == "k":
        heads = int(settings.get("num_key_value_heads") or settings["num_attention_heads"])
    matrix = kind == "weight" and not base.endswith("_norm")
    return Place(
        name=f"{prefix}{base}.{kind}",
        heads=heads,
        transposed=rule == "t" and kind == "weight",
        shift=1.0 if rule == "1" else 0.0,
        plain=rule == "f" or not matrix,
    )


def extra_tensors(model_type: str, settings: Settings) -> dict[str, Tensor]:
    """Tensors that no checkpoint stores: the factors of scaled rotary frequencies, F32.

    Llama 3.1's wavelength rule (transformers' `_compute_llama3_parameters`) and Phi-3's longrope.
    """
    rope = rope_of(settings)
    kind = str(rope.get("rope_type", "default")).lower()
    if kind == "llama3" and family_of(model_type).arch == "llama":
        return {"rope_freqs.weight": _llama3_factors(rope, head_dim(settings))}
    if kind in ("longrope", "su") and model_type == "phi3":
        return {
            f"rope_factors_{length}.weight": torch.tensor(
                rope[f"{length}_factor"], dtype=torch.float32
            )
            for length in ("long", "short")
        }
    return {}


def rope_of(settings: Settings) -> Settings:
    """The rotary settings of full attention, whatever their generation of config."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    inner = rope.get("full_attention")
    return inner if isinstance(inner, dict) else rope


def head_dim(settings: Settings) -> int:
    """Width of one head."""
    return int(
        settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    )


def _llama3_factors(rope: Settings, width: int) -> Tensor:
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / (float(rope["rope_theta"]) ** steps)
    factor = float(rope.get("factor", 8.0))
    low = float(rope.get("low_freq_factor", 1.0))
    high = float(rope.get("high_freq_factor", 4.0))
    context = float(rope.get("original_max_position_embeddings", 8192))
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelengths > context / low, torch.full_like(between, factor), between)
    return torch.where(wavelengths < context / high, torch.ones_like(factors), factors)
