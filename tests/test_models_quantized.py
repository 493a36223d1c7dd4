"""Bases in few bits: read, trained, saved and read back; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import CHATML, tiny_tokenizer
from torch import nn

from tsugiki.adapters.attach import attach, lora_modules
from tsugiki.config import LoraConfig, build_config
from tsugiki.errors import ModelError, UsageError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.quantized import QuantizedWeight
from tsugiki.models.flat import flat_forward, use_flat_attention
from tsugiki.models.load import Base, load_base, resolve_model
from tsugiki.models.quantized import QuantizedLinear, dense_copy, quantize_modules
from tsugiki.models.quantized_store import WEIGHTS
from tsugiki.models.shards import QUANTIZED_RECORD, open_model
from tsugiki.models.tune import tune
from tsugiki.pipelines import run_training
from tsugiki.quantizing import quantize_base
from tsugiki.terminal import Terminal

LENGTHS = (13, 27)
IDS = torch.arange(sum(LENGTHS))[None] * 37 % 300


def load(folder: Path, quantize: str = "none", **more: Any) -> Base:
    return load_base(resolve_model(str(folder)), quantize=quantize, **more)


def logits(base: Base) -> torch.Tensor:
    with torch.no_grad():
        return base.forward(IDS, ForwardBatch(LENGTHS))


def adapted(model: nn.Module) -> nn.Module:
    attach(model, LoraConfig(r=4, alpha=8), generator=torch.Generator().manual_seed(0))
    for _, module in lora_modules(model):
        nn.init.normal_(module.lora_B, 0.0, 0.02, generator=torch.Generator().manual_seed(1))
    use_flat_attention(model)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    out = flat_forward(model, IDS, ForwardBatch(LENGTHS))
    loss = nn.functional.cross_entropy(out[0, :-1].float(), IDS[0, 1:])
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_in_few_bits(family: str, method: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "model", tiny_tokenizer(CHATML))
    base, whole = load(folder, method), load(folder)
    paths = quantize_modules(whole.model, method)
    assert len(paths) == {"gpt2": 12, "phi3": 12}.get(family, 21)
    assert torch.equal(logits(base), logits(whole)), "read in few bits, or quantised in memory"
    dense = adapted(dense_copy(base.model))
    model = adapted(base.model)
    plain = gradients(dense)  # the original modules on plain matrices of the same numbers
    tuned = tune(model)
    assert not tuned.kept, tuned.kept
    found = gradients(model)
    assert found.keys() == {name.replace(".base.weight", "") for name in plain}
    for name, grad in found.items():
        assert float((grad - plain[name]).norm()) <= 1e-4 * float(plain[name].norm()) + 1e-7, name
        assert float(grad.norm()) > 0, name
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == len(paths)
    assert isinstance(model.get_output_embeddings(), nn.Linear), "the head stays"  # type: ignore[operator]


def test_the_proof_sees_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    quantize_modules(model, "nf4")
    right = QuantizedWeight.matmul
    monkeypatch.setattr(
        QuantizedWeight, "matmul", lambda self, x, term=None: right(self, x, term) * 1.001
    )
    tuned = tune(adapted(model))
    assert set(tuned.replaced) == {"norm", "head"}
    assert all("off by" in why for why in tuned.kept)


def test_casting_the_model_does_not_touch_the_codes() -> None:
    model = tiny_model("qwen2")
    quantize_modules(model, "nf4")
    before = {n: p.clone() for n, p in model.named_parameters() if not p.is_floating_point()}
    assert len(before) == 21 * 4
    cast = model.to(torch.bfloat16)
    assert all(torch.equal(cast.get_parameter(n), p) for n, p in before.items())
    assert not any(p.requires_grad for p in cast.parameters() if not p.is_floating_point())


def test_a_quantised_folder_is_the_same_base(tmp_path: Path) -> None:
    folder = save_tiny("gemma2", tmp_path / "model", tiny_tokenizer(CHATML))
    quantize_base(str(folder), tmp_path / "small", "nf4", "float32", as_json=True)
    base, again = load(folder, "nf4"), load(tmp_path / "small")
    assert torch.equal(logits(base), logits(again))
    assert torch.equal(logits(load(tmp_path / "small", "nf4")), logits(base)), "asked for as it is"
    assert again.fingerprint() == load(folder).fingerprint(), "the 16-bit base's"
    assert again.name == str(folder)
    assert again.quantize == "nf4"
    path = "model.layers.1.mlp.up_proj.weight"
    assert again.names().to_disk(path) == base.names().to_disk(path)
    small, large = ((tmp_path / "small" / WEIGHTS).stat().st_size, open_model(folder).nbytes)
    assert small < 0.5 * large, "the embedding of a tiny model is most of it"


def test_quantised_folders_that_are_damaged(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))
    quantize_base(str(folder), tmp_path / "small", "nf4", "float32", as_json=True)

    def damaged(name: str) -> Path:
        shutil.copytree(tmp_path / "small", tmp_path / name)
        return tmp_path / name

    flipped = damaged("flipped")
    raw = bytearray((flipped / WEIGHTS).read_bytes())
    raw[-9] ^= 1
    (flipped / WEIGHTS).write_bytes(raw)
    with pytest.raises(ModelError, match="not the file that was saved"):
        load(flipped)
    cut = damaged("cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(cut)
    record = json.loads((tmp_path / "small" / QUANTIZED_RECORD).read_text())
    for name, changed, said in (
        ("newer", {**record, "format_version": 99}, "newer tsugiki"),
        ("odd", {**record, "base": {**record["base"], "method": "int3"}}, "damaged"),
        ("less", {**record, "base": {}}, "damaged"),
        ("list", [], "damaged"),
    ):
        (damaged(name) / QUANTIZED_RECORD).write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=said):
            load(tmp_path / name)
    with pytest.raises(ModelError, match="quantised already"):
        load(tmp_path / "small", "int8")
    with pytest.raises(ModelError, match="not its 16-bit weights"):
        open_model(tmp_path / "small")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    asked = {
        "output": tmp_path / "run", "model": {"name": str(tmp_path / "small")},
        "data": {"path": tmp_path / "rows.jsonl"}, "train": {"method": "full"},
    }  # fmt: skip
    with pytest.raises(UsageError, match="weights in few bits cannot be changed") as caught:
        run_training(build_config(asked), Terminal(as_json=True))
    assert "--model" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "gptq")
    ready = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(ready))
    for quantize in ("none", "nf4"):
        with pytest.raises(ModelError, match="quantised already") as caught:
            load(tmp_path / "gptq", quantize)
        assert "gptq" in str(caught.value)
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=name):
        load(folder, "int8")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="cannot be quantised while it is read") as caught:
        load(folder, "nf4")
    assert name in str(caught.value)
    with pytest.raises(UsageError, match="nothing would be quantised"):
        quantize_base(str(folder), tmp_path / "out", "none")
    with pytest.raises(UsageError, match="no such --quantize"):
        quantize_base(str(folder), tmp_path / "out", "nf5")
    assert not (tmp_path / "out").exists()


PEAK = """
import sys, torch
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import load_base, resolve_model
from tsugiki.models.spec import load_config

def held(what):  # of this process alone; getrusage would count the parent it was forked from
    text = open("/proc/self/status").read()
    return int(text.partition(what + ":")[2].split()[0]) * 1024

torch.set_num_threads(1)
resolved = resolve_model(sys.argv[1])
load_base(resolve_model(sys.argv[2]), quantize="nf4", dtype=torch.bfloat16)
probe_isolation(load_config(resolved.folder))
before = held("VmRSS")
base = load_base(resolved, quantize="nf4", dtype=torch.bfloat16)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc, which is not here")
def test_the_16_bit_model_never_stands_in_memory(tmp_path: Path) -> None:
    """Peak of a fresh process, file pages included: well below the 16-bit weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=768, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=12, vocab_size=320, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "large")
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "large")
    small = save_tiny("llama", tmp_path / "small", tiny_tokenizer(CHATML))
    large = open_model(tmp_path / "large").nbytes
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path / "large"), str(small)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    print(f"{large / 1e6:.0f} MB of 16-bit weights, {grown / 1e6:.0f} MB at the peak")
    assert grown <= 0.75 * large
