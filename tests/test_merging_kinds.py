"""What else an adapter may be: DoRA, rsLoRA, patterns, whole modules, tied embeddings, oddities."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from test_merging_peft import TOKENIZER, merged_by_peft, peft_adapter, tensors, ulps

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.adapters.storage import BaseIdentity, save_adapter
from tsugiki.config import LoraConfig
from tsugiki.errors import TsugikiError
from tsugiki.joining import merge_adapter
from tsugiki.merging import plan_merge, write_merged
from tsugiki.models.load import load_base, resolve_model
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.verify import verify
from tsugiki.terminal import Terminal

KINDS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["k_proj", "up_proj"]},
    "dora": {"use_dora": True},
    "modules_to_save": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


def shake(folder: Path) -> None:
    """Move every tensor that PEFT starts at the base's values, so that it counts."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    torch.manual_seed(5)
    for name, tensor in found.items():
        if "lora_A" not in name and "lora_B" not in name and "base_layer" not in name:
            found[name] = tensor * (1 + 0.2 * torch.randn_like(tensor))
    save_file(found, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_kind_equals_peft_and_proves_itself(family: str, kind: str, tmp_path: Path) -> None:
    if family == "gpt2" and kind not in ("rslora", "dora"):
        pytest.skip("its names are of Llama's modules")
    import peft
    from transformers import AutoModelForCausalLM

    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on saving embeddings
        peft_adapter(base, tmp_path / "adapter", **KINDS[kind])
        shake(tmp_path / "adapter")
        reread = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
        )
        theirs = merged_by_peft(reread, tmp_path / "theirs")
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "ours")
    ours, before = tensors(tmp_path / "ours"), tensors(base)
    assert set(ours) == set(theirs)
    changed = 0
    for name, tensor in ours.items():
        changed += not torch.equal(tensor, before[name])
        size = torch.maximum(before[name].abs(), tensor.abs()).clamp_min(float(tensor.std()))
        assert ulps(tensor, theirs[name], size) <= 16, name
    assert changed > 0
    report = verify(
        open_artefact(str(tmp_path / "adapter"), str(base)), open_artefact(str(tmp_path / "ours"))
    )
    assert report.ok, [check for check in report.checks if not check.ok]
    assert report.checks[-1].value > 0.05, "the adapter moves the logits"


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
@pytest.mark.parametrize("where", ["embedding", "head"])
def test_tied_embeddings_are_refused_or_untied(family: str, where: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    names = {"embedding": "wte" if family == "gpt2" else "embed_tokens", "head": "lm_head"}
    inner = "c_fc" if family == "gpt2" else "o_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie, as we refuse
        peft_adapter(base, tmp_path / "adapter", target_modules=[names[where], inner])
    with pytest.raises(TsugikiError, match="ties to its") as error:
        plan_merge(tmp_path / "adapter", base)
    assert "--untie" in str(error.value)
    write_merged(plan_merge(tmp_path / "adapter", base, untie=True), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors(tmp_path / "ours")
    report = verify(
        open_artefact(str(tmp_path / "adapter"), str(base)), open_artefact(str(tmp_path / "ours"))
    )
    assert report.ok, [check for check in report.checks if not check.ok]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of ours on it, with its record."""
    folder = save_tiny("qwen3", tmp_path / "bases" / "small", TOKENIZER)
    base = load_base(resolve_model(str(folder)))
    attach(base.model, LoraConfig(r=4, alpha=8))
    torch.manual_seed(1)
    for _, module in lora_modules(base.model):
        torch.nn.init.normal_(module.lora_B, 0, 0.2)
    prints = base.fingerprint()
    identity = BaseIdentity(str(folder), prints.exact, prints.rounded, dtype="float32")
    chat = {"format": "chatml", "stop_id": 1, "stop_ids": [1]}
    save_adapter(base.model, tmp_path / "run" / "adapter", base=identity, chat=chat)
    detach(base.model)
    return folder, tmp_path / "run"


def test_a_run_folder_finds_its_base_and_brings_its_chat_format(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained
    merged = merge_adapter(run, None, Terminal())
    assert merged.folder == run / "merged"
    assert "not verified" not in capsys.readouterr().out
    report = verify(open_artefact(str(run)), open_artefact(str(merged.folder)))
    assert report.ok, [check for check in report.checks if not check.ok]
    template = (merged.folder / "chat_template.jinja").read_text()
    assert "im_start" in template


def test_a_base_that_moved_is_found_by_its_tensors(trained: tuple[Path, Path]) -> None:
    folder, run = trained
    moved = folder.with_name("renamed")
    shutil.move(folder, moved)
    save_tiny("qwen3", folder.with_name("another"), TOKENIZER, seed=9)
    found = open_artefact(str(run))
    assert found.stored.folder == moved
    assert "found by its fingerprint" in found.notes[0]
    shutil.rmtree(moved)
    with pytest.raises(TsugikiError, match="is not there"):
        open_artefact(str(run))


def test_another_base_is_refused(trained: tuple[Path, Path]) -> None:
    folder, run = trained
    other = save_tiny("qwen3", folder.with_name("other"), TOKENIZER, seed=9)
    with pytest.raises(TsugikiError, match="another base"):
        plan_merge(run / "adapter", other)
    plan = plan_merge(run / "adapter", other, accept_base=True)
    assert any("accepted" in note for note in plan.notes)


def test_the_eight_families_fingerprints_need_no_module_tree(tmp_path: Path) -> None:
    from families import FAMILIES

    from tsugiki.models.families import FamilyNames, is_tied
    from tsugiki.models.fingerprint import fingerprint_tensors
    from tsugiki.models.shards import open_model
    from tsugiki.models.spec import NameMap

    for family in FAMILIES:
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        model = open_model(folder)
        pairs = [(name, model.tensor(name)) for name in model.tensors]
        by_table = fingerprint_tensors(pairs, FamilyNames(model.model_type, is_tied(model)))
        assert by_table == fingerprint_tensors(pairs, NameMap(tiny_model(family))), family
        short = [(n.removeprefix("transformer.").removeprefix("model."), t) for n, t in pairs]
        names = FamilyNames(model.model_type, is_tied(model))
        assert fingerprint_tensors(short, names) == by_table, family
