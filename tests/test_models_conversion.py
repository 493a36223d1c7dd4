"""Files in another form than the modules: read in few bits as transformers reads them whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.errors import ModelError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.load import Base, load_base, resolve_model
from tsugiki.models.quantized import QuantizedLinear, quantize_modules
from tsugiki.quantizing import quantize_base

IDS = torch.arange(40)[None] * 37 % 300
KINDS: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 32, "head_dim": 16},
}


def save(model_type: str, folder: Path) -> Path:
    config = AutoConfig.for_model(
        model_type, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=320,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=0, eos_token_id=1, **KINDS[model_type],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return folder


def load(folder: Path, quantize: str = "none") -> Base:
    return load_base(resolve_model(str(folder)), quantize=quantize)


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.forward(IDS, ForwardBatch((13, 27)))


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("model_type", KINDS)
def test_it_is_quantised_as_in_memory(model_type: str, method: str, tmp_path: Path) -> None:
    folder = save(model_type, tmp_path / "model")
    base, whole = load(folder, method), load(folder)
    paths = quantize_modules(whole.model, method)
    assert torch.equal(logits(base), logits(whole))
    assert sum(isinstance(m, QuantizedLinear) for m in base.model.modules()) == len(paths)
    told = [note for note in base.notes if "stacked experts" in note]
    assert len(base.notes) == len(told) == (model_type != "gpt_neox")
    quantize_base(str(folder), tmp_path / "small", method, "float32", as_json=True)
    again = load(tmp_path / "small")
    assert torch.equal(logits(again), logits(base))
    assert again.notes == base.notes
    assert again.fingerprint() == whole.fingerprint()


def test_names_are_those_of_the_files(tmp_path: Path) -> None:
    names = load(save("gpt_neox", tmp_path / "neox")).names()
    assert names.to_disk("lm_head.weight") == "embed_out.weight"
    assert names.to_module("embed_out.weight") == "lm_head.weight"
    names = load(save("mixtral", tmp_path / "mixtral")).names()
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    assert names.to_disk("model.layers.0.mlp.gate.weight") == gate
    with pytest.raises(ModelError, match=r"do not hold model\.layers\.0\.mlp"):
        names.to_disk("model.layers.0.mlp.experts.down_proj")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("experts.1.w2", r"experts\.down_proj cannot be made of 2 stored tensors .*\n.*\(2, 64, 96\)"),
        ("experts.1.w3", r"experts\.gate_up_proj cannot be made of 5 stored tensors"),
        ("experts", r"missing: model\.layers\.0\.mlp\.experts"),
        ("gate", r"missing: model\.layers\.0\.mlp\.gate"),
    ],
)  # fmt: skip
def test_experts_that_are_not_whole_are_refused(lost: str, said: str, tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if f"layers.0.block_sparse_moe.{lost}" not in n}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=said):
        load(folder, "nf4")


def test_a_tensor_beside_the_experts_is_told(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.0.gate_proj.bias"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for quantize in ("none", "nf4"):
        (said,) = [note for note in load(folder, quantize).notes if "does not use" in note]
        assert "experts.0.gate_proj.bias" in said
