"""An adapter alone as GGUF: laid over its base, llama.cpp computes what PEFT does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import FAMILIES
from test_exporting_gguf import LIMITS, export, save_variant
from test_merging_peft import TOKENIZER, peft_adapter
from transformers import AutoModelForCausalLM

from tsugiki.adapters.joined import join
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf_lora import plan_lora, write_lora
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.shipping import export_lora
from tsugiki.terminal import Terminal

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 4},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"k_proj": 32, "down_proj": 1},
    },
    "head": {"target_modules": ["lm_head", "q_proj", "k_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


def laid_over(base: Path, adapter: Path, tmp_path: Path, limit: float) -> None:
    """llama.cpp with the adapter beside the base, against PEFT; and off again."""
    length = 15
    ids = torch.randint(4, len(TOKENIZER), (1, length), generator=torch.Generator().manual_seed(2))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        bare = model(ids).logits[0].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = peft.PeftModel.from_pretrained(model, adapter).eval()(ids).logits[0].numpy()
    write_lora(plan_lora(join(base, adapter, untie=True), "a"), tmp_path / "lora.gguf")
    file = export(base, "f32", tmp_path / "base.gguf")
    prompt = [ids[0].tolist()]
    with LlamaCpp(1) as llama:
        theirs = llama.logits(file, prompt, lora=tmp_path / "lora.gguf")[0]
        off = llama.logits(file, prompt)[0]
    spread = float(ours.std())
    assert np.abs(ours - bare).max() / bare.std() >= 1, "the adapter must show"
    assert np.abs(ours - theirs).max() / spread < limit
    assert np.abs(bare - off).max() / bare.std() < limit
    assert open_gguf(tmp_path / "lora.gguf").metadata["adapter.lora.alpha"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_over_the_base_as_peft_computes_it(family: str, tmp_path: Path) -> None:
    base = save_variant(family, tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", lora_alpha=16)
    laid_over(base, tmp_path / "adapter", tmp_path, LIMITS.get(family, 1e-4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpps_own_alpha_cannot_say(kind: str, tmp_path: Path) -> None:
    base = save_variant("llama", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on saving embeddings
        peft_adapter(base, tmp_path / "adapter", **{"lora_alpha": 16, **KINDS[kind]})
    laid_over(base, tmp_path / "adapter", tmp_path, 1e-4)


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("llama", {"use_dora": True}, "DoRA"),
        (
            "llama",
            {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
            "modules_to_save",
        ),
        ("gpt2", {"target_modules": ["lm_head", "c_fc"]}, "ties together"),
        ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}, "ties together"),
        ("llama", {"lora_bias": True}, "lora_bias"),
    ],
    ids=["dora", "saved modules", "tied head", "tied embedding", "biases"],
)
def test_what_cannot_travel_is_refused_with_the_way(
    family: str, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    base = save_variant(family, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(TsugikiError, match=says) as error:
        export_lora(str(tmp_path / "adapter"), tmp_path / "x.gguf", Terminal(), model=str(base))
    if says != "lora_bias":
        assert "merge it: tsugiki export" in str(error.value)
    assert not (tmp_path / "x.gguf").exists()


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_variant("qwen3", tmp_path / "base")
    peft_adapter(base, tmp_path / "run" / "adapter")
    shipped = export_lora(str(tmp_path / "run"), None, Terminal(), model=str(base))
    assert shipped.path == tmp_path / "run" / "gguf" / "run-LoRA.gguf"
    assert f"--lora {shipped.path}" in capsys.readouterr().out
    with pytest.raises(TsugikiError, match="exists already"):
        export_lora(str(tmp_path / "run"), None, Terminal(), model=str(base))
    with pytest.raises(TsugikiError, match="no adapter"):
        export_lora(str(base), None, Terminal())
