"""Other forms of bases and chats: shards, the Hub's names, unknown architectures, our templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny, tiny_config
from runs import own_cache
from safetensors.torch import save_file
from test_merging_peft import TOKENIZER, peft_adapter, tensors
from tokenizers_for_tests import CHATML, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tsugiki.adapters.attach import attach, lora_modules
from tsugiki.adapters.storage import BaseIdentity, save_adapter
from tsugiki.config import LoraConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.templates import FALLBACKS
from tsugiki.joining import merge_adapter
from tsugiki.merging import plan_merge, write_merged
from tsugiki.models.fingerprint import fingerprint_folder
from tsugiki.models.load import load_base, resolve_model
from tsugiki.models.spec import ModelSpec
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Report
from tsugiki.proof.texts import TALKS
from tsugiki.proof.verify import verify
from tsugiki.terminal import Terminal


def failures(report: Report) -> list[str]:
    return [f"{c.step} {c.name}: {c.figure} {c.details}" for c in report.checks if not c.ok]


def our_adapter(base: Path, folder: Path, template: str | None = None) -> dict[str, Any]:
    """An adapter as training saves it; returns the chat format's state."""
    loaded = load_base(resolve_model(str(base)))
    attach(loaded.model, LoraConfig(r=4, alpha=8, targets="all-linear"))
    torch.manual_seed(1)
    for _, module in lora_modules(loaded.model):
        nn.init.normal_(module.lora_B, 0, 0.1)
    prints = loaded.fingerprint()
    identity = BaseIdentity(str(base), prints.exact, prints.rounded, dtype="float32")
    chat = ChatFormat.of(loaded.tokenizer, template).state()
    save_adapter(loaded.model, folder, base=identity, names=loaded.names(), chat=chat)
    return chat


def test_shards_and_index_are_kept_in_another_type(tmp_path: Path) -> None:
    base = save_tiny("qwen3", tmp_path / "base", TOKENIZER, max_shard_size="200KB")
    peft_adapter(base, tmp_path / "adapter")
    write_merged(plan_merge(tmp_path / "adapter", base, dtype="bf16"), tmp_path / "out")
    indices = [
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        for name in ("base", "out")
    ]
    assert len(set(indices[0]["weight_map"].values())) > 2
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert 2 * indices[1]["metadata"]["total_size"] == indices[0]["metadata"]["total_size"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    before = tensors(base)
    for name, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        if "norm" in name or "embed" in name:
            assert torch.equal(tensor, before[name].bfloat16())


@pytest.mark.parametrize("maker", ["peft", "ours"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_without_their_prefix(family: str, maker: str, tmp_path: Path) -> None:
    """The Hub's GPT-2 stores `h.0.attn…`; the module path is `transformer.h.0.attn…`."""
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    short = {
        name.removeprefix("transformer.").removeprefix("model."): tensor
        for name, tensor in tensors(base).items()
    }
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    if maker == "peft":
        peft_adapter(base, tmp_path / "adapter")
    else:
        our_adapter(base, tmp_path / "adapter")
    plan = plan_merge(tmp_path / "adapter", base)
    assert len(plan.changes.by_name) in (12, 21), "every projection of three layers"
    write_merged(plan, tmp_path / "out")
    assert set(tensors(tmp_path / "out")) == set(short)
    adapter = open_artefact(str(tmp_path / "adapter"), str(base))
    report = verify(adapter, open_artefact(str(tmp_path / "out")))
    assert report.ok, failures(report)


def test_a_language_model_inside_a_vision_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 with images: module path `model.language_model.…`, stored `language_model.model.…`."""
    text = tiny_config("gemma3", len(TOKENIZER)).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=5, eoi_token_index=6, image_token_index=7, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    targets = r".*language_model.*\.(q_proj|o_proj|up_proj)"
    peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    plan = plan_merge(tmp_path / "adapter", tmp_path / "base")
    assert len(plan.changes.by_name) == 9
    write_merged(plan, tmp_path / "out")
    adapter = open_artefact(str(tmp_path / "adapter"), str(tmp_path / "base"))
    assert plan.identity is not None
    spec = ModelSpec.from_folder(tmp_path / "base")
    monkeypatch.setenv(
        "TSUGIKI_CACHE", own_cache(tmp_path / "cache")
    )  # or it would be read, not made
    by_tree = fingerprint_folder(tmp_path / "base", spec.meta_model())
    assert by_tree.exact == plan.identity.exact
    for memory in (None, 0):
        report = verify(adapter, open_artefact(str(tmp_path / "out")), memory=memory)
        assert report.ok, failures(report)


def test_an_architecture_outside_the_tables_merges_by_its_own_record(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    our_adapter(tmp_path / "base", tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "out", Terminal())
    assert merged.changed == 8
    adapter = open_artefact(str(tmp_path / "adapter"))
    report = verify(adapter, open_artefact(str(merged.folder)))
    assert report.ok, failures(report)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
@pytest.mark.parametrize("template", FALLBACKS)
def test_a_template_of_ours_travels_with_the_model(
    template: str, bos: bool, tmp_path: Path
) -> None:
    """A base without a template: any reader of the merged folder renders what training saw."""
    tokenizer = tiny_tokenizer(bos=bos)
    base = save_tiny("qwen3", tmp_path / "base", tokenizer)
    state = our_adapter(base, tmp_path / "adapter", template)
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "out")
    adapter, merged = open_artefact(str(tmp_path / "adapter")), open_artefact(str(tmp_path / "out"))
    report = verify(adapter, merged, logits=False)
    assert report.ok, failures(report)
    trained = ChatFormat.from_state(state, tokenizer)
    elsewhere = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for talk in TALKS:
        messages = [{"role": m.role, "content": m.content} for m in talk]
        text = elsewhere.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = elsewhere(text, add_special_tokens=False)["input_ids"]
        assert ids == trained.prompt_ids(talk)
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(state["stop_ids"]) <= set(stops if isinstance(stops, list) else [stops])


def test_an_adapters_own_template_is_kept(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", tiny_tokenizer())
    peft_adapter(base, tmp_path / "adapter")
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "adapter")
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    adapter = open_artefact(str(tmp_path / "adapter"), str(base))
    report = verify(adapter, open_artefact(str(tmp_path / "out")), logits=False)
    assert report.ok, failures(report)


def test_files_beside_the_weights_are_kept_and_the_bases_own_story_is_not(tmp_path: Path) -> None:
    """Pickles neither; sprout's growth.json tells of weights that the merged ones no longer are."""
    kept = ("tokenizer.model", "merges.txt", "LICENSE", "generation_config.json")
    left = ("pytorch_model.bin", "old.gguf", "growth.json", "trainer_state.json", "README.md")
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    for name in (*kept, *left):
        (base / name).write_text(json.dumps({"name": name}))
    peft_adapter(base, tmp_path / "adapter")
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "out")
    for name in kept:
        assert json.loads((tmp_path / "out" / name).read_text()) == {"name": name}
    assert not {p.name for p in (tmp_path / "out").iterdir()} & set(left)
    sprout = resolve_model(None).folder
    beside = {p.name for p in sprout.iterdir()} - {"model.safetensors"}
    our_adapter(sprout, tmp_path / "ours")
    write_merged(plan_merge(tmp_path / "ours", sprout), tmp_path / "grafted")
    written = {p.name for p in (tmp_path / "grafted").iterdir()}
    assert beside - written == {"growth.json", "README.md"}


def test_perplexities_on_a_text(tmp_path: Path) -> None:
    base = save_tiny("qwen3", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "adapter")
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "out")
    adapter = open_artefact(str(tmp_path / "adapter"), str(base))
    ratios = []
    for folder in (tmp_path / "out", base):
        report = verify(adapter, open_artefact(str(folder)), text="吾輩は猫である。" * 20)
        check = next(c for c in report.checks if c.name.startswith("perplexity"))
        ratios.append((check.ok, check.value))
    assert ratios[0][0]
    assert abs(ratios[0][1] - 1) < 1e-5
    assert not ratios[1][0], "the base alone is another model"
