"""Merging gives what PEFT's merge_and_unload gives, tensor for tensor, for eight families."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import CHATML, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from tsugiki.adapters.storage import load_adapter
from tsugiki.errors import AdapterError
from tsugiki.merging import plan_merge, write_merged

TOKENIZER = tiny_tokenizer(CHATML)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a model folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def peft_adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> nn.Module:
    """A random PEFT adapter on a stored base, saved; returns the PEFT model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if model.config.model_type == "gpt2":
        config["fan_in_fan_out"] = True
    torch.manual_seed(3)
    made = peft.get_peft_model(
        model,
        peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear",
                           "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}),
    )  # fmt: skip
    made.save_pretrained(folder)
    return made


def merged_by_peft(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    model.merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
    return tensors(folder)


def ulps(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest difference in units of the last place at `scale`'s size."""
    exponent = torch.frexp(scale.abs().float().clamp_min(1e-30)).exponent - 1
    place = torch.exp2(exponent.float()) * torch.finfo(ours.dtype).eps
    return float(((ours.float() - theirs.float()).abs() / place).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tensors_as_peft(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    if dtype != torch.float32:
        shutil.rmtree(base)
        tiny_model(family, 0, len(TOKENIZER)).to(dtype).save_pretrained(base)
        TOKENIZER.save_pretrained(base)
    theirs = merged_by_peft(peft_adapter(base, tmp_path / "adapter", dtype), tmp_path / "theirs")
    done = write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "ours")
    ours, before = tensors(tmp_path / "ours"), tensors(base)
    assert set(ours) == set(theirs) == set(before)
    changed = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert len(changed) == done.changed > 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == dtype
        if name not in changed:
            assert torch.equal(tensor, theirs[name])
        else:
            size = torch.maximum(before[name].abs(), tensor.abs())
            assert ulps(tensor, theirs[name], size) <= (4 if dtype == torch.float32 else 1), name
    for file in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (base / file).read_bytes()
    assert json.loads((tmp_path / "ours" / "tsugiki.json").read_text())["kind"] == "merged"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_merge_and_load_hold_a_strangers_adapter_to_the_same_rules(tmp_path: Path) -> None:
    """Layers that its config does not name; a head copied along in a shorter type, or changed."""
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "more", target_modules=["q_proj", "v_proj"])
    config = tmp_path / "more" / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "target_modules": ["q_proj"]}))
    peft_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    weights = tmp_path / "head" / "adapter_model.safetensors"
    held = load_file(weights)
    name = next(name for name in held if name.endswith("base_layer.weight"))
    save_file({**held, name: held[name].bfloat16()}, weights)

    def both(folder: Path) -> list[Callable[[], object]]:
        model = AutoModelForCausalLM.from_pretrained(base)
        return [lambda: plan_merge(folder, base), lambda: load_adapter(model, folder)]

    for use in both(tmp_path / "more"):
        with pytest.raises(AdapterError, match=r"v_proj: a layer that the adapter does not name"):
            use()
    for use in both(tmp_path / "head"):
        use()
    save_file({**held, name: held[name] + 1}, weights)
    for use in both(tmp_path / "head"):
        with pytest.raises(AdapterError, match="it was trained on another"):
            use()
