"""The portable form: PEFT's logits stay, and its plain alpha / r is the whole scale."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_exporting_gguf import save_variant
from test_merging_forms import our_adapter
from test_merging_peft import TOKENIZER, peft_adapter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tsugiki.adapters.joined import join
from tsugiki.adapters.portable import make_portable, write_portable
from tsugiki.cli import app
from tsugiki.errors import TsugikiError
from tsugiki.models.load import load_tokenizer, resolve_model
from tsugiki.proof.checks import Proof
from tsugiki.proving import prove_portable
from tsugiki.shipping import export_portable
from tsugiki.terminal import Terminal

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 32, "down_proj": 1}},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "excluded": {"exclude_modules": r".*layers\.0\.mlp\.up_proj"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # PEFT warns of missing keys
        warnings.filterwarnings(
            "ignore", message=".*(embedding|tie_word_embeddings|Could not find).*"
        )
        tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.randint(4, len(TOKENIZER), (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return tuned(ids).logits[0]


def rewritten(base: Path, adapter: Path, output: Path) -> dict[str, Any]:
    write_portable(make_portable(join(base, adapter, untie=True)), output)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    assert not {"rank_pattern", "alpha_pattern", "use_rslora", "use_dora"} & set(config)
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        assert tensor.shape[0 if "_A" in name else 1] == config["r"]
        word = re.search(r"\.(\w+)\.lora_", name)
        assert word
        assert word.group(1) in config["target_modules"]
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_logits_in_eight_families(family: str, tmp_path: Path) -> None:
    base = save_variant(family, tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", lora_alpha=16)
    rewritten(base, tmp_path / "adapter", tmp_path / "out")
    a, b = (logits(base, tmp_path / name) for name in ("adapter", "out"))
    assert float((a - b).abs().max() / a.std()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scale(kind: str, tmp_path: Path) -> None:
    base = save_variant("llama", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_adapter(base, tmp_path / "adapter", **{"lora_alpha": 16, **KINDS[kind]})
    config = rewritten(base, tmp_path / "adapter", tmp_path / "out")
    a, b = (logits(base, tmp_path / name) for name in ("adapter", "out"))
    assert (
        float((a - b).abs().max() / a.std()) < 5e-5
    )  # √8 and α/r round otherwise than a product with B
    assert config["r"] == (8 if kind in ("rslora", "patterns") else 4)


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "ours, with a template of its own"])
def test_it_proves_itself_and_a_fault_is_found(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_variant("gpt2" if kind == "gpt2" else "llama", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.startswith("ours"):
            our_adapter(base, tmp_path / "adapter", "alpaca")
            load_tokenizer(resolve_model(str(base))).save_pretrained(tmp_path / "adapter")
        else:
            peft_adapter(base, tmp_path / "adapter", **{"lora_alpha": 16, **KINDS.get(kind, {})})
    how = ["--model", str(base), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), "--portable", *how])
    assert done.exit_code == 0, done.output
    assert "equal in all" in done.output
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if "_B" in name and tensor.any())
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata={"format": "pt"})
    proof = prove_portable(str(tmp_path / "adapter"), tmp_path / "out", Terminal(), model=str(base))
    assert proof is Proof.WRONG
    assert "coefficient" in capsys.readouterr().out


def test_gpt2s_two_projections_of_one_name(tmp_path: Path) -> None:
    """`c_proj` means attention's and the MLP's: the one that was not adapted gets zeros."""
    base = save_variant("gpt2", tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", target_modules=["attn.c_proj"])
    made = make_portable(join(base, tmp_path / "adapter", untie=True))
    assert made.padded == 3
    rewritten(base, tmp_path / "adapter", tmp_path / "out")
    a, b = (logits(base, tmp_path / name) for name in ("adapter", "out"))
    assert float((a - b).abs().max() / a.std()) < 1e-5
    verdicts = {v.reader: v for v in made.verdicts}
    assert verdicts["PEFT"].takes
    assert not verdicts["vLLM"].takes
    assert not verdicts["SGLang"].takes


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 5]}, "trainable_token_indices"),
    ],
    ids=["dora", "saved modules", "token rows"],
)
def test_what_can_only_travel_merged(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    base = save_variant("llama", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(TsugikiError, match=says) as error:
        export_portable(str(tmp_path / "adapter"), tmp_path / "out", Terminal(), model=str(base))
    if "token" not in says:
        assert "tsugiki merge" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_verb_reports_each_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_variant("qwen3", tmp_path / "base")
    peft_adapter(base, tmp_path / "run" / "adapter", r=40)
    (tmp_path / "run" / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    done = export_portable(str(tmp_path / "run"), None, Terminal(), model=str(base))
    assert done == tmp_path / "run" / "portable"
    assert (done / "chat_template.jinja").read_text() == "{{ messages }}"
    said = capsys.readouterr().out
    for words in ("PEFT", "vLLM", "SGLang", "llama.cpp", "--max-lora-rank 64", "vllm serve"):
        assert words in said, words
    runs = re.findall(r"^  (llama-server|Ollama) +tsugiki (.+?) && (.+)$", said, re.MULTILINE)
    assert [server for server, *_ in runs] == ["llama-server", "Ollama"]
    for _, export, then in runs:  # as printed: the files that the server is told of are there
        exported = CliRunner().invoke(app, [*shlex.split(export), "--no-verify"])
        assert exported.exit_code == 0, exported.output
        named = [word for word in shlex.split(then) if word.startswith(str(tmp_path))]
        assert named
        assert all(Path(word).is_file() for word in named)
    with pytest.raises(TsugikiError, match="exists already"):
        export_portable(str(tmp_path / "run"), None, Terminal(), model=str(base))
