"""A model's settings as GGUF metadata, and what llama.cpp computes otherwise than transformers.

Takes config.json's settings with every default filled in (as transformers gives them). Keys and
their meaning: the GGUF specification and llama.cpp's loaders. Knows no tensors and no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_tensors import Settings, family_of, head_dim, rope_of

ROPE_KINDS = {
    "default": (), "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (), "longrope": (), "su": (),
}  # fmt: skip
ACTIVATIONS = {
    "gemma2": ("gelu_pytorch_tanh",), "gemma3": ("gelu_pytorch_tanh",),
    "gpt2": ("gelu_new", "gelu_pytorch_tanh"),
}  # fmt: skip
PERIODS = {"gemma2": 2, "gemma3": 6}  # every n-th layer sees everything, the others a window
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B, whose attention is scaled otherwise
WITHOUT_BIAS = ("qwen3", "gemma2", "gemma3", "phi3")
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}


def model_metadata(model_type: str, settings: Settings) -> Metadata:
    """Every key that shapes the arithmetic, `llama.block_count` and so on."""
    arch = family_of(model_type).arch
    if arch == "gpt2":
        found = _gpt2(settings)
    else:
        found = _common(settings)
        if arch == "llama":
            found["vocab_size"] = int(settings["vocab_size"])
            found["rope.dimension_count"] = head_dim(settings)
        elif arch in PERIODS:
            found |= _gemma(arch, settings)
        elif arch == "phi3":
            found |= _phi3(settings)
        if arch != "phi3" and settings.get("head_dim") is not None:
            width = int(settings["head_dim"])
            found |= {"attention.key_length": width, "attention.value_length": width}
    return {f"{arch}.{key}": value for key, value in found.items()}


def sampling_metadata(generation: Mapping[str, Any]) -> Metadata:
    """How generation_config.json says to sample."""
    found: Metadata = {}
    for theirs, ours in SAMPLING.items():
        value = generation.get(theirs)
        if isinstance(value, int | float) and not isinstance(value, bool):
            key = f"general.sampling.{ours}"
            found[key] = np.int32(value) if ours == "top_k" else float(value)
    return found


def misfits(model_type: str, settings: Settings) -> list[str]:
    """Settings that llama.cpp would compute otherwise, in silence; empty where all are its own."""
    arch = family_of(model_type).arch
    wrong = []
    activation = str(
        settings.get("activation_function")
        or settings.get("hidden_activation")
        or settings.get("hidden_act")
    )
    allowed = ACTIVATIONS.get(arch, ("silu",))
    if activation not in allowed:
        wrong.append(f"activation {activation}: llama.cpp computes {allowed[0]} here")
    if arch == "gpt2":
        wrong += [
            f"{key} = {settings[key]}"
            for key, fine in (
                ("scale_attn_by_inverse_layer_idx", False),
                ("scale_attn_weights", True),
                ("add_cross_attention", False),
            )
            if settings.get(key, fine) != fine
        ]
        return wrong
    kind = str(rope_of(settings).get("rope_type", "default")).lower()
    homes = {"llama3": ("llama",), "longrope": ("phi3",), "su": ("phi3",)}
    if kind not in ROPE_KINDS or arch not in homes.get(kind, (arch,)):
        wrong.append(f"rotary embedding of type {kind!r}")
    elif any(rope_of(settings).get(key) is None for key in ROPE_KINDS[kind]):
        wrong.append(f"rotary embedding of type {kind!r} without {' and '.join(ROPE_KINDS[kind])}")
    if arch != "phi3" and float(rope_of(settings).get("partial_rotary_factor") or 1.0) != 1.0:
        wrong.append("partial_rotary_factor: llama.cpp turns whole heads here")
    if arch in WITHOUT_BIAS and settings.get("attention_bias"):
        wrong.append("attention_bias: llama.cpp has no place for those biases here")
    if arch in PERIODS:
        wrong += _gemma_misfits(arch, settings)
    whole = head_dim(settings) * int(settings["num_attention_heads"])
    if arch in ("phi3", "qwen2") and whole != int(settings["hidden_size"]):
        wrong.append(f"head_dim {head_dim(settings)}: llama.cpp splits the width into heads here")
    return wrong


def limits(model_type: str, settings: Settings) -> list[str]:
    """Where llama.cpp is equal only up to a length, for people to know."""
    arch = family_of(model_type).arch
    window = settings.get("sliding_window")
    types = settings.get("layer_types") or []
    if arch not in ("llama", "qwen2", "qwen3", "phi3") or not window:
        return []
    if types and "sliding_attention" not in types:
        return []
    if int(window) >= int(settings.get("max_position_embeddings", 0)):
        return []
    return [
        f"llama.cpp has no sliding window for {model_type}: its answers are this model's "
        f"for up to {window} tokens, and drift beyond"
    ]


def _common(settings: Settings) -> Metadata:
    heads = int(settings["num_attention_heads"])
    found: Metadata = {
        "block_count": int(settings["num_hidden_layers"]),
        "context_length": int(settings["max_position_embeddings"]),
        "embedding_length": int(settings["hidden_size"]),
        "feed_forward_length": int(settings["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(settings.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(settings["rms_norm_eps"]),
    }
    rope = rope_of(settings)
    found["rope.freq_base"] = float(rope.get("rope_theta") or settings.get("rope_theta") or 1e4)
    kind = str(rope.get("rope_type", "default")).lower()
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = int(
            rope["original_max_position_embeddings"]
        )
        for theirs, ours in (
            ("extrapolation_factor", "yarn_ext_factor"),
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if rope.get(theirs) is not None:
                found[f"rope.scaling.{ours}"] = float(rope[theirs])
    return found


def _gemma(arch: str, settings: Settings) -> Metadata:
    found: Metadata = {}
    types = settings.get("layer_types") or []
    if "sliding_attention" in types:
        found["attention.sliding_window"] = int(settings["sliding_window"])
        period = _period(types)
        if period is not None and period != PERIODS[arch]:
            found["attention.sliding_window_pattern"] = period
    local = (settings.get("rope_parameters") or {}).get("sliding_attention")
    if arch == "gemma3" and isinstance(local, dict):
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if settings.get(key):
            found[name] = float(settings[key])
    return found


def _gemma_misfits(arch: str, settings: Settings) -> list[str]:
    wrong = []
    layers = int(settings["num_hidden_layers"])
    scaled = (
        settings["hidden_size"] // settings["num_attention_heads"]
        if layers == LARGEST[arch]
        else head_dim(settings)
    )
    asked = float(settings.get("query_pre_attn_scalar") or scaled)
    if not math.isclose(asked, scaled):
        wrong.append(
            f"query_pre_attn_scalar {asked:g}: llama.cpp takes {scaled} for {layers} layers"
        )
    types = settings.get("layer_types") or []
    if "sliding_attention" in types and _period(types) is None:
        wrong.append("layer_types: full attention does not come at every n-th layer")
    if arch == "gemma2":
        if not settings.get("tie_word_embeddings", True):
            wrong.append("a head of its own: llama.cpp's Gemma 2 reads the embedding")
        wrong += [
            f"{key} is missing: llama.cpp would use its own"
            for key in ("attn_logit_softcapping", "final_logit_softcapping")
            if not settings.get(key)
        ]
    elif settings.get("attn_logit_softcapping"):
        wrong.append("attn_logit_softcapping: llama.cpp's Gemma 3 has none")
    if settings.get("use_bidirectional_attention"):
        wrong.append("use_bidirectional_attention")
    return wrong


def _period(types: list[str]) -> int | None:
    """n where exactly every n-th layer has full attention; more than all where none has."""
    full = [i for i, kind in enumerate(types) if kind != "sliding_attention"]
    if not full:
        return next((n for n in PERIODS.values() if n > len(types)), len(types) + 1)
    period = full[0] + 1
    return period if full == list(range(period - 1, len(types), period)) else None


def _phi3(settings: Settings) -> Metadata:
    rope = rope_of(settings)
    width = int(settings["hidden_size"])
    turned = float(rope.get("partial_rotary_factor") or 1.0)
    context = int(settings["max_position_embeddings"])
    original = int(
        rope.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or context
    )
    found: Metadata = {
        "rope.scaling.original_context_length": original,
        "rope.dimension_count": int(turned * width) // int(settings["num_attention_heads"]),
        "attention.sliding_window": int(settings.get("sliding_window") or 0),
    }
    if str(rope.get("rope_type", "default")).lower() in ("longrope", "su"):
        scale = context / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        found["rope.scaling.attn_factor"] = factor
    return found


def _gpt2(settings: Settings) -> Metadata:
    width = int(settings["n_embd"])
    return {
        "block_count": int(settings["n_layer"]),
        "context_length": int(settings["n_positions"]),
        "embedding_length": width,
        "feed_forward_length": int(settings.get("n_inner") or 4 * width),
        "attention.head_count": int(settings["n_head"]),
        "attention.layer_norm_epsilon": float(settings["layer_norm_epsilon"]),
    }
