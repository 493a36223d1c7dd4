"""What a config says: how far the base sees, and which architectures are not for text alone."""

from __future__ import annotations

from typing import Any

import pytest
from families import save_tiny
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoConfig

from tsugiki.errors import ModelError
from tsugiki.models.flat import NAME, use_own_attention
from tsugiki.models.load import load_base, resolve_model
from tsugiki.models.spec import ModelSpec

WIDTH = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip


def read(model_type: str, **values: Any) -> ModelSpec:
    return ModelSpec.from_config(AutoConfig.for_model(model_type, **values))


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("llama", {**WIDTH, "max_position_embeddings": 96}),
        ("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 96}),
        ("mpt", {"d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 96}),
        ("rwkv", {**WIDTH, "context_length": 96}),
        ("bloom", {**WIDTH, "n_head": 4, "seq_length": 96}),
    ],
)
def test_how_far_a_base_sees(model_type: str, values: dict[str, Any]) -> None:
    assert read(model_type, **values).context == 96


def test_a_config_that_does_not_say_how_far() -> None:
    assert read("bloom", **WIDTH, n_head=4).context == 2048


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("bart", {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}),
        ("t5", {"d_model": 64, "num_layers": 1, "num_heads": 4}),
    ],
)
def test_an_encoder_decoder_is_named(model_type: str, values: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="this model is an encoder-decoder") as caught:
        read(model_type, **values)
    assert "--model with a causal language model" in str(caught.value.fix)


def test_models_that_read_more_than_text_are_named() -> None:
    text = {**WIDTH, "model_type": "mistral", "intermediate_size": 96}
    images = {**IMAGES, "model_type": "pixtral"}
    with pytest.raises(ModelError, match="no causal language model") as caught:
        read("mistral3", text_config=text, vision_config=images)
    assert "the text model of this family" in str(caught.value.fix)
    with pytest.raises(ModelError, match="no causal language model") as caught:
        read("vit", **IMAGES)
    assert "a causal language model" in str(caught.value.fix)
    assert "update transformers" in str(caught.value.fix)


def test_a_base_with_an_attention_of_its_own_says_so(tmp_path: Any) -> None:
    base = load_base(resolve_model(str(save_tiny("llama", tmp_path, tiny_tokenizer(CHATML)))))
    use_own_attention(base.model)
    assert base.model.config._attn_implementation != NAME  # type: ignore[union-attr]
    assert base.make_fast() == (
        "proven faster modules: nothing; kept: all modules: this base keeps its own attention"
    )
