"""The numbers that a type will hold are those of the file, bit for bit, in the base's layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_wide
from test_merging_peft import TOKENIZER, peft_adapter

from tsugiki.adapters.joined import join
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.exporting.rounded import rounded_tensors
from tsugiki.formats.gguf_encode import DIRECT
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.quantise import quantise_file
from tsugiki.models.families import HEAD

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaCpp]:
    with LlamaCpp(1) as process:
        yield process


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3, its head apart"])
def test_they_are_the_files(family: str, llama: LlamaCpp, tmp_path: Path) -> None:
    apart = "apart" in family
    base = save_wide(family.partition(",")[0], tmp_path / "base", TOKENIZER)
    targets = {"target_modules": ["lm_head", "q_proj"]} if apart else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie
        peft_adapter(base, tmp_path / "adapter", lora_alpha=16, **targets)
    plan = plan_export(join(base, tmp_path / "adapter", untie=apart), "x")
    exact = write_gguf(plan, "f32", tmp_path / "f32.gguf").path
    for dtype in TYPES[1:]:
        path = tmp_path / f"{dtype}.gguf"
        if dtype in DIRECT:
            write_gguf(plan, dtype, path)
        else:
            quantise_file(exact, path, dtype, 1)
        file, found = open_gguf(path), rounded_tensors(plan, dtype, llama)
        assert len(found) == len([source for source in plan.sources if source.stored])
        kinds = set()
        for source in plan.sources:
            if source.stored is None:
                continue
            own = apart and source.place.name == "output.weight"
            tensor = found[HEAD if own else source.stored.name]()
            values = torch.from_numpy(file.values(source.place.name).copy())
            expected = source.place.restore(values - source.place.shift)
            assert tensor.shape == source.stored.shape
            assert torch.equal(tensor, expected), (dtype, source.place.name)
            kinds.add(file.tensors[source.place.name].type.name)
        assert kinds & {"F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"}


def test_what_a_type_cannot_hold_is_named(tmp_path: Path) -> None:
    base = save_wide("llama", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "adapter", lora_alpha=1e9)
    plan = plan_export(join(base, tmp_path / "adapter"), "x")
    tensors = rounded_tensors(plan, "f16", None)
    with pytest.raises(TsugikiError, match=r"q_proj.weight does not fit F16"):
        tensors["model.layers.0.self_attn.q_proj.weight"]()
