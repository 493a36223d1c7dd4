"""Logits module by module are the loaded model's, bit for bit, for eight families and adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from test_merging_peft import TOKENIZER, peft_adapter

from tsugiki.merging import plan_merge, write_merged
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.logits import logits_of, make_probe, run
from tsugiki.proof.streamed import as_stored, stream, streamed_base
from tsugiki.proof.verify import verify


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_loaded(family: str, dora: bool, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER, max_shard_size="200KB")
    peft_adapter(base, tmp_path / "adapter", use_dora=dora)
    adapter = open_artefact(str(tmp_path / "adapter"), str(base))
    probe = make_probe(adapter)
    loaded, loaded_plain, none = logits_of(adapter, probe)
    streamed, streamed_plain, held = logits_of(adapter, probe, memory=0)
    assert none == 0
    assert held == max(
        4 * t.nbytes // t.dtype.itemsize for t in adapter.stored.tensors.values()
    ) or (
        family in ("gpt2", "qwen2")  # a bias comes along
    )
    assert torch.equal(streamed, loaded)
    assert loaded_plain is not None
    assert torch.equal(streamed_plain, loaded_plain)
    assert not torch.equal(streamed, streamed_plain)


def test_no_weight_stays_in_memory(tmp_path: Path) -> None:
    folder = save_tiny("gemma3", tmp_path / "base", TOKENIZER)
    artefact = open_artefact(str(folder))
    base = streamed_base(artefact.resolved)
    assert not any(buffer.is_meta for buffer in base.model.buffers())
    stream(base, as_stored(base, artefact.stored))
    for _ in range(2):
        assert torch.isfinite(run(base, make_probe(artefact))).all()
        assert all(parameter.is_meta for parameter in base.model.parameters())


def test_verify_says_what_it_held(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", TOKENIZER)
    peft_adapter(base, tmp_path / "adapter")
    write_merged(plan_merge(tmp_path / "adapter", base), tmp_path / "merged")
    report = verify(
        open_artefact(str(tmp_path / "adapter"), str(base)),
        open_artefact(str(tmp_path / "merged")),
        memory=0,
    )
    assert report.ok
    assert "module by module" in report.checks[-1].name
    assert report.checks[-1].value == 4 * len(TOKENIZER) * 64, "the embedding, in fp32"
