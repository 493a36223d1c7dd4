"""Shapes of the models that the benchmarks run, as configs with random weights: no download."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A model type, its config, and which projections are adapted."""

    kind: str
    config: dict[str, Any]
    targets: tuple[str, ...] = LLAMA_NAMES
    transposed: bool = False  # GPT-2 stores (in, out)


def _llama(
    kind: str, k: int, m: int, layers: int, heads: int, kv: int, vocab: int, **more: Any
) -> Shape:
    config: dict[str, Any] = {
        "hidden_size": k, "intermediate_size": m, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab,
        "tie_word_embeddings": True, "max_position_embeddings": 8192, **more,
    }  # fmt: skip
    return Shape(kind, config)


SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": _llama("qwen2", 896, 4864, 24, 14, 2, 151_936),
    "smollm2-135m": _llama("llama", 576, 1536, 30, 9, 3, 49_152),
    "gemma3-1b": _llama(
        "gemma3_text", 1152, 6912, 26, 4, 1, 262_144,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=512,
    ),
    "llama3.2-1b": _llama("llama", 2048, 8192, 16, 32, 8, 128_256, head_dim=64),
    "llama3-8b": _llama(
        "llama", 4096, 14_336, 32, 32, 8, 128_256, head_dim=128, tie_word_embeddings=False
    ),
    # StableLM 3B at half its width: heads of 80, which tiles do not divide into
    "heads-of-80": _llama("llama", 1280, 3456, 24, 16, 16, 32_768),
    "tiny": _llama("llama", 64, 160, 2, 4, 2, 300, head_dim=16),
    "gpt2-medium": Shape(
        "gpt2",
        {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50_257},
        ("c_attn", "c_proj", "c_fc"),
        transposed=True,
    ),
}  # fmt: skip


def make_config(shape: Shape, layers: int | None = None, vocab: int | None = None) -> Any:
    """The transformers config; fewer layers or tokens for a short run."""
    config = dict(shape.config)
    if layers is not None:
        config["n_layer" if shape.kind == "gpt2" else "num_hidden_layers"] = layers
    if vocab is not None:
        config["vocab_size"] = vocab
    return AutoConfig.for_model(
        shape.kind, **config, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )


def make_model(config: Any, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """Random weights as the config initialises them, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    assert isinstance(model, nn.Module)
    return model.eval()


def products(model: nn.Module) -> dict[tuple[int, int], int]:
    """(out, in) → how many such matrices multiply every token, the head included."""
    from transformers.pytorch_utils import Conv1D

    counts: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            rows, columns = module.weight.shape
            size = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
            counts[size] = counts.get(size, 0) + 1
    return counts
