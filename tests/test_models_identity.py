"""A base is known by its tensors, whatever its files look like; documents never mix unseen."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.models.fingerprint import (
    Fingerprint,
    fingerprint_folder,
    fingerprint_stored,
    fingerprint_tensors,
)
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.spec import ModelSpec, NameMap


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSUGIKI_CACHE", str(tmp_path / "cache"))


def identity(folder: Path) -> Fingerprint:
    return fingerprint_folder(folder, ModelSpec.from_folder(folder).meta_model())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_one_base_has_one_fingerprint(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    first = save_tiny(family, tmp_path / "first", tokenizer)
    expected = identity(first)
    sharded = save_tiny(family, tmp_path / "sharded", tokenizer, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert identity(sharded) == expected
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(again)
    assert identity(again) == expected

    # What lies beside a whole file, shards and their index too, is not loaded by transformers either.
    other = {"x": torch.ones(3)}
    save_file(other, first / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (first / "model.safetensors.index.json").write_text(json.dumps(index))
    assert identity(first) == expected
    _, told = AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    assert not told["missing_keys"]

    tensors = load_file(first / "model.safetensors")
    if family == "gpt2":  # the Hub's form: no prefix, with buffers
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    if "lm_head.weight" not in tensors and family != "llama":  # a stored tied head
        embedding = "wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
        tensors["lm_head.weight"] = tensors[embedding].clone()
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    assert identity(first) == expected

    half = {k: v.bfloat16() for k, v in tensors.items()}
    save_file(half, first / "model.safetensors", metadata={"format": "pt"})
    other = identity(first)
    assert other.exact != expected.exact
    assert other.rounded == expected.rounded

    name = next(k for k in tensors if tensors[k].dim() == 2)
    tensors[name][0, 0] += 1
    save_file(tensors, first / "model.safetensors", metadata={"format": "pt"})
    assert identity(first).rounded != expected.rounded


def test_few_tensors_are_in_memory_at_a_time() -> None:
    """However large a model, its fingerprint holds a handful."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def tensors():  # type: ignore[no-untyped-def]
        for number in range(60):
            tensor = torch.full((1000,), float(number))
            made.append(weakref.ref(tensor))
            alive.append(sum(ref() is not None for ref in made))
            yield f"weight{number}", tensor
            del tensor

    fingerprint_tensors(tensors(), NameMap(torch.nn.Linear(1, 1)))
    assert len(alive) == 60
    assert max(alive) <= 6


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system keeps no such peak"
)
def test_a_file_is_not_mapped_whole_beside_the_weights(tmp_path: Path) -> None:
    size = 4 << 20
    tensors = {f"weight{n}": torch.zeros(size // 2, dtype=torch.bfloat16) for n in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors

    def megabytes(kind: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(kind)[2].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS:")
    fingerprint_stored(tmp_path, NameMap(torch.nn.Linear(1, 1)))
    assert megabytes("VmHWM:") - before <= 32, "of 64"


def test_the_cache_is_only_for_the_same_files(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "m", tiny_tokenizer())
    first = identity(folder)
    assert identity(folder) == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert identity(folder) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_the_eight_families_run_flat(family: str) -> None:
    assert probe_isolation(tiny_config(family)).holds


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("stablelm", {}),  # drops unknown keyword arguments
        ("falcon", {}),  # never calls the attention interface
        ("bloom", {"n_head": 4}),
        ("mamba", {}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
                     "max_position_embeddings": 2048}),  # its own mask ends with the context
        ("phi3", {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096,
                  "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8,
                                      "long_factor": [4.0] * 8, "rope_theta": 1e4, "factor": 2.0,
                                      "original_max_position_embeddings": 4096}}),
        ("llama", {"max_position_embeddings": 2048,
                   "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)  # fmt: skip
def test_models_that_mix_documents_are_found(model_type: str, extra: dict) -> None:  # type: ignore[type-arg]
    found = probe_isolation(AutoConfig.for_model(model_type, **{**SMALL, **extra}))
    assert not found.holds
    assert found.reason


def test_sliding_windows_longer_than_the_probe_are_cut() -> None:
    config = tiny_config("mistral")
    config.sliding_window = 4096
    assert probe_isolation(config).holds
    assert config.sliding_window == 4096, "the argument is not changed"


def test_logits_of_fixtures_spread() -> None:
    ids = torch.randint(0, 320, (1, 60), generator=torch.Generator().manual_seed(2))
    for family in FAMILIES:
        with torch.no_grad():
            assert float(tiny_model(family)(ids).logits.std()) >= 2, family
