"""Tensors that the config does not use are told, in both ways to load; what nothing reads is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.models.load import load_base, resolve_model

WAYS = ("none", "nf4")


def notes(folder: Path, quantize: str) -> list[str]:
    base = load_base(resolve_model(str(folder)), quantize=quantize)
    return [note for note in base.notes if "does not use" in note]


def store(folder: Path, **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | more, path, metadata={"format": "pt"})


@pytest.mark.parametrize("quantize", WAYS)
def test_biases_that_the_config_does_not_use_are_told(quantize: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))
    assert not notes(folder, quantize)
    store(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    (said,) = notes(folder, quantize)
    assert said.startswith("ATTENTION: the base's files hold a tensor")
    assert "(model.layers.0.self_attn.q_proj.bias)" in said


@pytest.mark.parametrize("quantize", WAYS)
def test_layers_that_the_config_does_not_use_are_told(quantize: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path / "model", tiny_tokenizer(CHATML))
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    config["layer_types"] = config.get("layer_types", [])[:2]
    (folder / "config.json").write_text(json.dumps(config))
    (said,) = notes(folder, quantize)
    assert "12 tensors" in said
    assert "model.layers.2.input_layernorm.weight, " in said
    assert said.count("model.layers.2.") == 4
    assert " …)" in said


@pytest.mark.parametrize("quantize", WAYS)
def test_what_nothing_reads_is_not_told(quantize: str, tmp_path: Path) -> None:
    folder = save_tiny("gpt2", tmp_path / "gpt2", tiny_tokenizer(CHATML))
    wte = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    mask = torch.ones(1, 1, 8, 8)
    store(
        folder,
        **{"lm_head.weight": wte + 0, "transformer.h.0.attn.bias": mask},
        **{"h.1.attn.bias": mask + 0, "h.1.attn.masked_bias": torch.tensor(-1e4)},
    )
    assert not notes(folder, quantize)
    folder = save_tiny("llama", tmp_path / "llama", tiny_tokenizer(CHATML))
    store(
        folder,
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        **{"model.rotary_emb.inv_freq": torch.ones(8), "model.position_ids": torch.ones(1, 8)},
    )
    assert not notes(folder, quantize)
