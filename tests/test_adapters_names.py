"""tsugiki.json says under which name the base's files hold each adapted weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import tiny_tokenizer
from torch import nn
from transformers import AutoConfig

from tsugiki.adapters.attach import attach, detach
from tsugiki.adapters.storage import save_adapter
from tsugiki.config import LoraConfig
from tsugiki.errors import ModelError
from tsugiki.models.hub import resolve_model
from tsugiki.models.load import Base, load_base
from tsugiki.models.spec import ModelSpec, NameMap


def load(folder: Path) -> Base:
    return load_base(resolve_model(str(folder)), dtype=torch.float32, device="cpu")


def recorded(base: Base, folder: Path, names: NameMap | None) -> dict[str, str]:
    """Module path → disk name as `save_adapter` writes them."""
    attach(base.model, LoraConfig(r=2))
    save_adapter(base.model, folder, names=names)
    detach(base.model)
    targets = json.loads((folder / "tsugiki.json").read_text())["targets"]
    return {path: entry["disk"] for path, entry in targets.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_disk_name_of_each_target(family: str, tmp_path: Path) -> None:
    """As saved, in the Hub's old form without the base model's prefix, sharded."""
    folder = save_tiny(family, tmp_path / "base", tiny_tokenizer(), max_shard_size="100KB")
    base = load(folder)
    prefix = "transformer." if family == "gpt2" else "model."

    def stored(name: str) -> torch.Tensor:
        found = [
            t for f in folder.glob("*.safetensors") for n, t in load_file(f).items() if n == name
        ]
        assert len(found) == 1, name
        return found[0]

    disk = recorded(base, tmp_path / "whole", base.names())
    assert disk == recorded(base, tmp_path / "plain", None), "what transformers writes"
    for path, name in disk.items():
        assert name.startswith(prefix)
        weight = base.model.get_submodule(path).weight
        assert torch.equal(stored(name), weight), "as stored: Conv1D's are not transposed"

    for file in folder.glob("*.safetensors"):
        short = {n.removeprefix(prefix): t for n, t in load_file(file).items()}
        save_file(short, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{prefix}', '"'))
    again = load(folder)
    disk = recorded(again, tmp_path / "short", again.names())
    assert not any(name.startswith(prefix) for name in disk.values())
    for path, name in disk.items():
        assert torch.equal(stored(name), again.model.get_submodule(path).weight)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
def test_a_head_is_found_tied_or_stored(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "base", tiny_tokenizer())
    file = folder / "model.safetensors"
    base, tensors = load(folder), load_file(file)
    tied = family != "llama"
    embedding = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    assert ("lm_head.weight" in tensors) is not tied
    assert base.names().to_disk("lm_head.weight") == (embedding if tied else "lm_head.weight")
    without_files = NameMap(base.model).to_disk("lm_head.weight")
    assert without_files == (embedding if tied else "lm_head.weight")
    if tied:
        tensors["lm_head.weight"] = tensors[embedding].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        assert base.names().to_disk("lm_head.weight") == "lm_head.weight"
        assert base.names().to_disk(embedding) == embedding
        del tensors[embedding]
        save_file(tensors, file, metadata={"format": "pt"})
        assert base.names().to_disk(embedding) == "lm_head.weight"
    save_file({"other": torch.zeros(1), "lm_head.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"do not hold .*norm|do not hold .*ln_f"):
        base.names().to_disk("transformer.ln_f.weight" if family == "gpt2" else "model.norm.weight")


def test_a_head_that_is_adapted_and_tied(tmp_path: Path) -> None:
    """Of a foreign adapter; without files the name is the embedding's, as transformers writes."""
    from tsugiki.adapters.attach import place

    base = load(save_tiny("gemma2", tmp_path / "base", tiny_tokenizer()))
    rows, columns = base.model.lm_head.weight.shape
    place(
        base.model, {"lm_head": (torch.zeros(2, columns), torch.zeros(rows, 2))}, {"lm_head": 1.0}
    )
    for number, names in enumerate((None, base.names())):
        save_adapter(base.model, tmp_path / str(number), names=names)
        targets = json.loads((tmp_path / str(number) / "tsugiki.json").read_text())["targets"]
        assert targets["lm_head"]["disk"] == "model.embed_tokens.weight"


def test_a_multimodal_checkpoints_old_names() -> None:
    """Gemma 3's first files say language_model.model., its module tree model.language_model."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config={"vocab_size": 320, **shape},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    model = ModelSpec.from_config(config).meta_model()
    old = "language_model.model.layers.0.self_attn.q_proj.weight"
    path = "model.language_model.layers.0.self_attn.q_proj.weight"
    names = NameMap(model, [old, "language_model.lm_head.weight"])
    assert names.to_module(old) == path
    assert names.to_disk(path) == old
    assert names.to_module("language_model.lm_head.weight") == "lm_head.weight"
    assert isinstance(model.get_submodule(path.removesuffix(".weight")), nn.Linear)
