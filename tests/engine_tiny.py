"""Tiny bases for the engine's tests: random weights wide enough that logits spread by about 2."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tsugiki.models.flat import use_flat_attention, use_own_attention
from tsugiki.models.load import Base
from tsugiki.models.spec import ModelSpec

VOCAB = 260
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=12),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=12, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=256,
        eos_token_id=257,
    ),
    "bloom": BloomConfig(
        vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, GPT-2's alphabet; 256 bos, 257 eos, 258 pad, 259 end of turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return fast


def tiny_model(family: str | PretrainedConfig, seed: int = 0) -> nn.Module:
    """Matrices from N(0, 0.25²) at hidden size 64, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIGS[family] if isinstance(family, str) else family
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    model.requires_grad_(False)
    return model.eval()


def tiny_base(family: str | PretrainedConfig, *, flat: bool = True, seed: int = 0) -> Base:
    """A base that was never on disk."""
    model = tiny_model(family, seed)
    use_flat_attention(model) if flat else use_own_attention(model)
    spec = ModelSpec.from_config(model.config)
    return Base(model, byte_tokenizer(), spec, Path("nowhere"), "tiny", None, flat)
