"""What is no causal language model is refused before a weight is read; what is one never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, tiny_config
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.errors import ModelError
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import load_base, resolve_model

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
         "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip
MOE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def config_of(model_type: str, **extra: Any) -> Any:
    return AutoConfig.for_model(model_type, **{**SMALL, **extra})


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_an_encoder_is_refused(model_type: str, tmp_path: Path) -> None:
    config = config_of(model_type)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="this model looks ahead: it is an encoder") as caught:
        load_base(resolve_model(str(tmp_path)))
    assert model_type in str(caught.value.got)
    assert "a decoder" in str(caught.value.fix)
    config.is_decoder = True
    assert probe_isolation(config).causal, "the same modules as a decoder"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eight_families_are_causal(family: str) -> None:
    assert probe_isolation(tiny_config(family)).causal


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("gpt_neox", {}), ("gptj", {"rotary_dim": 8}), ("bloom", {"n_head": 4}), ("falcon", {}),
        ("mamba", {}), ("rwkv", {"attention_hidden_size": 64}), ("opt", {"ffn_dim": 96}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}), ("mixtral", MOE),
        ("qwen3_moe", MOE | {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}),
        ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    ],
)  # fmt: skip
def test_no_causal_model_is_refused(model_type: str, extra: dict[str, Any]) -> None:
    assert probe_isolation(config_of(model_type, **extra)).causal
