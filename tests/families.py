"""Tiny models of the eight families, with logits that spread by 2 or more, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {},
    "gpt2": {},
}
MODEL_TYPES = {"gemma3": "gemma3_text"}


def tiny_config(family: str, vocab: int = 320) -> Any:
    """A config of 3 layers of width 64; special ids inside the vocabulary."""
    common: dict[str, Any] = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 1}
    if family == "gpt2":
        shape = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
    else:
        shape = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
        }
    name = MODEL_TYPES.get(family, family)
    return AutoConfig.for_model(name, **{**common, **shape, **FAMILIES[family]})


def deviation(family: str, name: str, width: int = 64) -> float:
    """What a matrix is drawn with: 2 / √width, so that a product is as large as its factor.

    A head or an embedding has a little more, for the logits to spread by more than 2. Gemma's
    inner matrices have half: its post-norms amplify rounding otherwise.
    """
    if any(word in name for word in ("embed", "lm_head", "wte")):
        return 2.16 / width**0.5
    return (1 if family.startswith("gemma") else 2) / width**0.5


def tiny_model(family: str, seed: int = 0, vocab: int = 320) -> nn.Module:
    """Random weights at width 64; eval mode, fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, vocab)).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, deviation(family, name))
    return model


def save_wide(
    family: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any
) -> Path:
    """Two layers of width 256: rows that hold whole blocks of every K-quant.

    Queries and keys have half the others' width: scores that choose one token alone amplify the
    rounding of sums tenfold, to 1.7e-4 of the logits' spread, which no model does that has learnt.
    """
    config = tiny_config(family, len(tokenizer)).to_dict()
    config.pop("layer_types", None)
    if family == "gpt2":
        config |= {"n_embd": 256, "n_layer": 2}
    else:
        config |= {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        config["num_hidden_layers"] = 2
    if "query_pre_attn_scalar" in config:
        config["query_pre_attn_scalar"] = 64
    config |= settings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoConfig.for_model(config.pop("model_type"), **config)
        model = AutoModelForCausalLM.from_config(made).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                sharp = any(word in name for word in ("q_proj", "k_proj", "qkv_proj"))
                nn.init.normal_(parameter, 0.0, deviation(family, name, 256) / (1 + sharp))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny(
    family: str, folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **kwargs: Any
) -> Path:
    """A model folder as from the Hub."""
    tiny_model(family, seed, len(tokenizer)).save_pretrained(folder, **kwargs)
    tokenizer.save_pretrained(folder)
    return folder
