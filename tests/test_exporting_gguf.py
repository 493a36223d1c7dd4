"""GGUF files of eight families: every bit of them, and what llama.cpp computes with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import FAMILIES, deviation, save_tiny, tiny_config
from gguf.constants import MODEL_ARCH_NAMES
from test_merging_peft import TOKENIZER, peft_adapter, tensors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters.joined import join
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.formats.gguf_encode import DIRECT, quantize_q8_0
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.merging import plan_merge, write_merged

ARCH = {name: number for number, name in MODEL_ARCH_NAMES.items()}
KINDS = {name: gguf.GGMLQuantizationType[name.upper()] for name in DIRECT}
# max |difference of logits| / their standard deviation; ggml takes GELU from a table in F16
LIMITS = {"gemma2": 5e-3, "gemma3": 5e-3, "gpt2": 5e-3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "longrope": ("phi3", {"rope_parameters": LONG}),
    "other window pattern": (
        "gemma3",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    ),
    "inner width": ("gpt2", {"n_inner": 96, "tie_word_embeddings": False}),
}  # fmt: skip


def export(folder: Path, dtype: str, output: Path, adapter: Path | None = None) -> Path:
    """One file of a folder, with an adapter on it or without."""
    return write_gguf(plan_export(join(folder, adapter), folder.name), dtype, output).path


def save_variant(name: str, folder: Path) -> Path:
    """A tiny model with other settings; every vector random too."""
    family, settings = VARIANTS.get(name, (name, {}))
    config = tiny_config(family, len(TOKENIZER)).to_dict() | settings
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, deviation(family, path))
            else:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def rows_in_pairs(matrix: np.ndarray, heads: int) -> np.ndarray:
    """HF keeps a head's two halves apart, ggml their pairs together: written by index."""
    out = np.empty_like(matrix)
    width = len(matrix) // heads
    for head in range(heads):
        for i in range(width // 2):
            for half in (0, 1):
                out[head * width + 2 * i + half] = matrix[head * width + half * (width // 2) + i]
    return out


def expected(folder: Path, family: str) -> dict[str, np.ndarray]:
    """What a GGUF must hold in fp32, written apart from the tables: names are gguf-py's."""
    config = json.loads((folder / "config.json").read_text())
    arch = {"mistral": "llama"}.get(family, family)
    names = gguf.get_tensor_name_map(ARCH[arch], 8)
    found = {}
    for name, tensor in tensors(folder).items():
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            values = rows_in_pairs(values, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            values = rows_in_pairs(values, config["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if arch == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight", name):
            values = values.T
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        found[mapped] = np.ascontiguousarray(values)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_as_written_apart(family: str, tmp_path: Path) -> None:
    base = save_variant(family, tmp_path / "base")
    wanted = expected(base, family)
    plan = plan_export(join(base, None), "base")
    for dtype in DIRECT:
        done = write_gguf(plan, dtype, tmp_path / f"{dtype}.gguf")
        read = {t.name: t for t in gguf.GGUFReader(done.path).tensors}
        assert set(read) == set(wanted)
        assert sum(done.types.values()) == len(read)
        for name, values in wanted.items():
            plain = values.ndim == 1 or "norm" in name or name == "position_embd.weight"
            kind = KINDS["f32"] if plain else KINDS[dtype]
            assert read[name].tensor_type == kind
            assert list(read[name].shape) == list(values.shape[::-1])
            told = gguf.quantize(values, kind)
            assert bytes(read[name].data.tobytes()) == told.tobytes(), name
        assert plan.need(dtype) == done.path.stat().st_size


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    base = save_variant(name, tmp_path / "base")
    file = export(base, "f32", tmp_path / "f32.gguf")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    # llama.cpp has no window for Mistral (the plan says so): equal within it
    length = 15 if name == "mistral" else 60
    ids = torch.randint(4, len(TOKENIZER), (1, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model(ids).logits[0].numpy()
    with LlamaCpp(1) as llama:
        theirs = llama.logits(file, [ids[0].tolist()])[0]
    assert ours.std() >= 2, "flat logits hide faults"
    family = VARIANTS[name][0] if name in VARIANTS else name
    error = np.abs(ours - theirs).max() / ours.std()
    assert error < LIMITS.get(family, 1e-4), error


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_needs_no_merged_folder(family: str, tmp_path: Path) -> None:
    """Exported with the adapter on the base, or merged and then exported: the same bytes."""
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    saved = ["lm_head"] if family == "llama" else None
    peft_adapter(
        base, tmp_path / "adapter", use_rslora=True, use_dora=family == "qwen3",
        modules_to_save=saved,
    )  # fmt: skip
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "merged")
    for dtype in ("f32", "q8_0"):
        one = export(base, dtype, tmp_path / f"one-{dtype}.gguf", tmp_path / "adapter")
        two = export(tmp_path / "merged", dtype, tmp_path / f"two-{dtype}.gguf")
        a, b = open_gguf(one), open_gguf(two)
        assert list(a.tensors) == list(b.tensors)
        for name in a.tensors:
            assert np.array_equal(a.raw(name), b.raw(name)), name
        differ = {
            k
            for k in {*a.metadata, *b.metadata}
            if str(a.metadata.get(k)) != str(b.metadata.get(k))
        }
        assert {k for k in differ if not k.startswith("general.")} == set()
        assert a.metadata["general.base_model.0.name"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_tied_heads_are_stored_once(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    config = json.loads((base / "config.json").read_text())
    head = "output.weight" in open_gguf(export(base, "f16", tmp_path / "a.gguf")).tensors
    assert head != config["tie_word_embeddings"]
    # a tied copy that some writers store is no second head
    if config["tie_word_embeddings"]:
        from safetensors.torch import save_file

        stored = tensors(base)
        embedding = next(k for k in stored if k.endswith(("wte.weight", "embed_tokens.weight")))
        stored["lm_head.weight"] = stored[embedding].clone()
        save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
        assert "output.weight" not in open_gguf(export(base, "f16", tmp_path / "b.gguf")).tensors


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_head_of_its_own_by_choice(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    targets = ["lm_head", "c_fc" if family == "gpt2" else "o_proj"]
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie
        peft_adapter(base, tmp_path / "adapter", target_modules=targets)
    plan = plan_export(join(base, tmp_path / "adapter", untie=True), "x")
    file = open_gguf(write_gguf(plan, "f32", tmp_path / "a.gguf").path)
    write_merged(plan_merge(tmp_path / "adapter", base, untie=True), tmp_path / "merged")
    other = open_gguf(export(tmp_path / "merged", "f32", tmp_path / "b.gguf"))
    for name in ("output.weight", "token_embd.weight"):
        assert np.array_equal(file.raw(name), other.raw(name))
    assert not np.array_equal(file.raw("output.weight"), file.raw("token_embd.weight"))


def test_a_language_model_inside_a_vision_model(tmp_path: Path) -> None:
    text = tiny_config("gemma3", len(TOKENIZER)).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
        boi_token_index=5, eoi_token_index=6, image_token_index=7, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    plan = plan_export(join(tmp_path / "base", None), "x")
    assert any("pictures" in note for note in plan.notes)
    file = write_gguf(plan, "f32", tmp_path / "a.gguf").path
    ids = torch.randint(8, len(TOKENIZER), (1, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = model.eval()(ids).logits[0].numpy()
    with LlamaCpp(1) as llama:
        theirs = llama.logits(file, [ids[0].tolist()])[0]
    assert np.abs(ours - theirs).max() / ours.std() < 5e-3


def test_q8_0_is_ggmls_byte_for_byte() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 128) * torch.logspace(-30, 4, 64)[:, None]
    values[0] = 0
    values[1, :32] = torch.arange(32) / 2 * 127 / 15.5  # ties: half away from zero
    values[2, 5] = 1e6
    for some in (values, -values):
        told = gguf.quantize(some.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert quantize_q8_0(some).numpy().tobytes() == told.tobytes()


def test_rows_that_hold_no_whole_block_stay_f16(tmp_path: Path) -> None:
    config = tiny_config("llama", len(TOKENIZER)).to_dict() | {"intermediate_size": 100}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    ).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    plan = plan_export(join(tmp_path / "base", None), "x")
    done = write_gguf(plan, "q8_0", tmp_path / "a.gguf")
    assert done.types["F16"] == 3, "ffn_down of three layers, told from the file"


def test_the_exact_type_for_quantising(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")):
        model.to(dtype).save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        assert plan_export(join(tmp_path / name, None), "x").exact_type() == name
    # a merged number is a sum in fp32: 16 bits would round it twice
    assert plan_export(join(tmp_path / "bf16", tmp_path / "adapter"), "x").exact_type() == "f32"
