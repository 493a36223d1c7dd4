"""Merging an adapter of a base in few bits: both bases measured, the better one written and proven."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny
from runs import forked, in_process, make_place
from safetensors.torch import load_file
from test_merging_forms import our_adapter
from test_merging_peft import TOKENIZER, peft_adapter
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoModelForCausalLM

from tsugiki.adapters.joined import join
from tsugiki.data.example import Example
from tsugiki.errors import DataError, DiskError, RunError
from tsugiki.exporting.gguf import ExportPlan, plan_export, write_gguf
from tsugiki.formats.gguf_encode import DIRECT
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.quantise import quantise_file
from tsugiki.joining import merge_adapter, verify_pair
from tsugiki.judging import (
    better_bases,
    gguf_form,
    held_out_rows,
    merged_form,
    merged_losses,
    onto,
    written_type,
)
from tsugiki.merging import plan_merge, write_merged
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.kept import as_kept
from tsugiki.models.load import load_base, resolve_model
from tsugiki.models.quantized import QuantizedLinear
from tsugiki.models.shards import AHEAD, ShardWriter, open_model
from tsugiki.models.spec import NameMap
from tsugiki.proof.artefact import open_artefact
from tsugiki.proof.checks import Proof
from tsugiki.proof.logits import logits_of, make_probe
from tsugiki.proving import prove
from tsugiki.shipping import export_gguf
from tsugiki.terminal import Terminal
from tsugiki.training.objective import held_out_loss

TYPES = ["bf16", "q8_0", "q4_k_m", "q2_k"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, rows.jsonl, whole/ (trained in full width), four/ (nf4, two projections adapted)."""
    folder = tmp_path_factory.mktemp("kept")
    make_place(folder, forked)
    in_process(
        folder, "four", model={"quantize": "nf4"}, lora={"targets": "minimal"}, learning_rate=2e-2
    )
    return folder


class Listening(Terminal):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(as_json=True)
        self.said: list[dict[str, Any]] = []

    def say(self, kind: str, show: Any, **data: Any) -> None:
        self.said.append({"kind": kind, **data})


def merge(place: Path, output: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The merged folder, and what was said of its base."""
    listening = Listening()
    merged = merge_adapter(place / "four", place / output, listening, **more)
    found = next(one for one in listening.said if one["kind"] == "merge_base")
    assert merged.changed == (6 if found["taken"] == "none" else 21)
    return place / output, found


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3"])
def test_what_is_seen_is_what_a_run_computes_with(tmp_path: Path, family: str, method: str) -> None:
    """To the bit, wherever a family's files keep its projections; the rest is as it is stored."""
    save_tiny(family, tmp_path, tiny_tokenizer(CHATML))
    stored = open_model(tmp_path)
    seen = as_kept(stored, method)
    base = load_base(resolve_model(str(tmp_path)), quantize=method)
    names = NameMap(base.spec.meta_model(), stored.tensors)
    modules = {
        names.to_disk(f"{path}.weight"): module
        for path, module in base.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert set(seen.through) == set(modules)
    for name, tensor in stored.tensors.items():
        found = seen.tensor(name)
        assert (found.shape, found.dtype) == (stored.tensor(name).shape, tensor.dtype)
        expected = modules[name].weight if name in modules else stored.tensor(name)
        assert torch.equal(found, expected)
        assert bytes(seen.bytes_of(tensor)) == expected.contiguous().numpy().tobytes()
        assert (name in modules) == (not torch.equal(found, stored.tensor(name)))


def test_the_proof_runs_on_the_very_numbers_that_are_merged(tmp_path: Path) -> None:
    """Of a base stored in 16 bits: loaded or streamed, the codes' numbers rounded as it is."""
    base = save_tiny("llama", tmp_path / "base", tiny_tokenizer(CHATML))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    our_adapter(base, tmp_path / "adapter")
    artefact = open_artefact(str(tmp_path / "adapter"))
    seen = replace(artefact, stored=as_kept(artefact.stored, "nf4"))
    probe = make_probe(seen)
    loaded, plain, _ = logits_of(seen, probe)
    streamed, _, held = logits_of(seen, probe, memory=0)
    assert held > 0
    spread = float(streamed.std())
    assert float((loaded - streamed).abs().max()) < 1e-5 * spread
    stored = logits_of(artefact, probe)[0]
    assert float((loaded - stored).abs().max()) > 0.1 * spread, "not the stored weights"
    assert plain is not None
    assert float((loaded - plain).abs().max()) > 0.1 * spread, "with the adapter"


def test_the_better_base_is_taken_and_written(place: Path) -> None:
    """Both figures are those of folders that were written and loaded; the proof knows the base."""
    plan = plan_merge(place / "four" / "adapter", place / "model", dtype="bf16")
    resolved = resolve_model(str(place / "model"))
    form = merged_form(plan, "nf4")
    (judged,) = better_bases(plan.joined, "nf4", [form], resolved, None)
    examples = held_out_rows(plan.changes, resolved, None)
    assert not isinstance(examples, str)
    assert judged.rows == len(examples) == 4
    assert judged.form == written_type(plan) == "bfloat16"
    for kept, loss in judged.losses.items():
        joined = plan.joined if kept == "none" else onto(plan.joined, kept)
        write_merged(replace(plan, joined=joined), place / f"by-{kept}")
        base = load_base(resolve_model(str(place / f"by-{kept}")), dtype=torch.bfloat16)
        assert held_out_loss(base, examples) == pytest.approx(loss, rel=1e-6)
    assert judged.losses["nf4"] != judged.losses["none"]
    assert judged.kept == min(judged.losses, key=lambda kept: judged.losses[kept])


def test_each_gguf_type_is_judged_in_that_very_type(place: Path, tmp_path: Path) -> None:
    """Both figures of each are those of a file that was written so, read back, run by llama.cpp."""
    source, model = place / "four" / "adapter", place / "model"
    listening = Listening()
    done = export_gguf(str(source), TYPES, tmp_path / "out", listening, model=str(model))
    said = {one["dtype"]: one for one in listening.said if one["kind"] == "merge_base"}
    assert list(said) == TYPES
    joined = join(model, source)
    resolved = resolve_model(str(model))
    examples = held_out_rows(joined.changes, resolved, None)
    assert not isinstance(examples, str)
    plans = {"none": plan_export(joined, "x"), "nf4": plan_export(onto(joined, "nf4"), "x")}
    by_candidate = {}
    with LlamaCpp(1) as llama:
        for kept, plan in plans.items():
            exact = write_gguf(plan, "f32", tmp_path / f"{kept}.gguf").path
            for dtype in TYPES:
                path = tmp_path / f"{kept}-{dtype}.gguf"
                if dtype in DIRECT:
                    write_gguf(plan, dtype, path)
                else:
                    quantise_file(exact, path, dtype, 1)
                told = said[dtype]["losses"][kept]
                assert read_back_loss(path, plan, resolved, examples, dtype) == told
                assert llama_loss(path, examples, llama) == pytest.approx(told, abs=0.03)
                by_candidate[dtype, kept] = told
    assert len(set(by_candidate.values())) == 2 * len(TYPES), "no figure stands for two"
    for shipped in done:
        losses = said[shipped.dtype]["losses"]
        assert shipped.kept == said[shipped.dtype]["taken"] == min(losses, key=losses.get)
        same = tmp_path / f"{shipped.kept}-{shipped.dtype}.gguf"
        for name in open_gguf(same).tensors:
            assert (
                open_gguf(shipped.path).raw(name).tobytes() == open_gguf(same).raw(name).tobytes()
            )


def test_where_memory_holds_no_model_its_modules_are_judged_one_by_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures, from a bounded share of the weights; and it is said."""
    plan = plan_merge(place / "four" / "adapter", place / "model")
    resolved = resolve_model(str(place / "model"))
    plans = {
        "none": plan_export(plan.joined, "x"),
        "nf4": plan_export(onto(plan.joined, "nf4"), "x"),
    }
    with LlamaCpp(1) as llama:
        forms = [
            merged_form(plan, "nf4"),
            *(gguf_form(plans, t, llama) for t in ("bf16", "q4_k_m")),
        ]
        whole = better_bases(plan.joined, "nf4", forms, resolved, None)
        parts = better_bases(plan.joined, "nf4", forms, resolved, None, memory=0)
    numbers = sum(t.nbytes // t.dtype.itemsize for t in plan.base.tensors.values())
    for loaded, streamed in zip(whole, parts, strict=True):
        assert streamed == replace(loaded, held=streamed.held)
        assert loaded.losses
        assert loaded.held == 0 < streamed.held < 4 * numbers / 3
    monkeypatch.setattr("tsugiki.judging.free_memory", lambda device: 0)
    _, said = merge(place, "streamed")
    assert said["losses"] == whole[0].losses
    assert said["held"] == parts[0].held


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_an_untied_head_is_judged_module_by_module_too(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base", TOKENIZER)
    inner = "c_fc" if family == "gpt2" else "o_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tie
        peft_adapter(base, tmp_path / "adapter", target_modules=["lm_head", inner])
    plan = plan_merge(tmp_path / "adapter", base, untie=True)
    resolved = resolve_model(str(base))
    examples = [Example((1, 5, 9, 7, 3), (-100, 5, 9, 7, 3), "a row")]
    more = (("none", "int8"), [merged_form(plan, "int8")], resolved, examples)
    (loaded, none), (streamed, held) = (
        merged_losses(plan.joined, *more, memory)[0] for memory in (1 << 40, 0)
    )
    assert loaded == streamed
    assert loaded["none"] != loaded["int8"]
    assert none == 0 < held


def read_back_loss(
    path: Path, plan: ExportPlan, resolved: ResolvedModel, examples: Sequence[Example], dtype: str
) -> float:
    """Of a model that is given the file's numbers."""
    base = load_base(resolved, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    parameters = dict(base.model.named_parameters())
    file = open_gguf(path)
    with torch.no_grad():
        for source in plan.sources:
            assert source.stored is not None
            values = torch.from_numpy(file.values(source.place.name).copy())
            parameters[source.stored.name].copy_(source.place.restore(values))
    return held_out_loss(base, examples)


def llama_loss(path: Path, examples: Sequence[Example], llama: LlamaCpp) -> float:
    """Mean nats per labelled token, by llama.cpp's own arithmetic."""
    total, count = 0.0, 0
    for example, logits in zip(
        examples, llama.each_logits(path, [e.ids for e in examples]), strict=True
    ):
        labels = torch.tensor(example.labels)[1:]
        rows = torch.from_numpy(logits.copy())[:-1]
        total += float(torch.nn.functional.cross_entropy(rows, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_merged_numbers_are_those_of_the_codes(place: Path) -> None:
    """Also where no adapter is; embeddings, norms and head are the stored bytes."""
    folder, said = merge(place, "merged")
    record = json.loads((folder / "tsugiki.json").read_text())
    assert record["base_kept"] == said["taken"]
    merged = load_file(folder / "model.safetensors")
    seen = as_kept(open_model(place / "model"), said["taken"]) if said["taken"] != "none" else None
    stored = load_file(place / "model" / "model.safetensors")
    adapter = load_file(place / "four" / "adapter" / "adapter_model.safetensors")
    for name, tensor in merged.items():
        expected = stored[name] if seen is None else seen.tensor(name)
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in adapter:
            expected = expected + 2.0 * adapter[key.format("B")] @ adapter[key.format("A")]
            assert torch.allclose(tensor, expected, atol=1e-6)
        else:
            assert torch.equal(tensor, expected)
    for layer_by_layer in (False, True):
        proof = verify_pair(
            str(place / "four"), str(folder), Terminal(as_json=True), layer_by_layer=layer_by_layer
        )
        assert proof is Proof.EQUAL


def test_a_proof_on_the_wrong_base_fails(place: Path) -> None:
    """A folder that claims the codes' numbers and holds the stored ones is found."""
    plan = plan_merge(place / "four" / "adapter", place / "model")
    write_merged(plan, place / "claimed")
    path = place / "claimed" / "tsugiki.json"
    pair = (str(place / "four"), str(place / "claimed"), Terminal(as_json=True))
    assert verify_pair(*pair) is Proof.EQUAL
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "base_kept": "nf4"}))
    assert verify_pair(*pair) is Proof.WRONG


def test_rows_that_are_not_there_are_told(place: Path) -> None:
    rows = place / "rows.jsonl"
    other = place / "other.jsonl"
    shutil.copyfile(rows, other)
    with open(rows, "a") as stream:
        stream.write(json.dumps({"prompt": "one", "completion": "more"}) + "\n")
    _, said = merge(place, "changed")
    assert said["losses"] == {}
    assert "no longer what training read" in said["reason"]
    rows.unlink()
    _, said = merge(place, "gone")
    assert "cannot be read" in said["reason"]
    assert said["taken"] == "nf4", "what training saw"
    _, said = merge(place, "given", eval_data=other)
    assert set(said["losses"]) == {"none", "nf4"}
    assert said["rows"] == 40
    with pytest.raises(DataError, match="there is no file"):
        merge(place, "wrong", eval_data=place / "nothing.jsonl")
    assert not (place / "wrong").exists()
    shutil.copyfile(other, rows)


def test_an_output_that_exists_is_refused_before_anything_is_measured(place: Path) -> None:
    (place / "mine").mkdir()
    listening = Listening()
    with pytest.raises(RunError, match="exists already"):
        merge_adapter(place / "four", place / "mine", listening)
    assert [one["kind"] for one in listening.said][-1] == "merge_plan"
    assert not list((place / "mine").iterdir())


def test_an_export_that_has_no_room_is_refused_before_bases_are_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda path: 1000)
    listening = Listening()
    with pytest.raises(DiskError, match="too little disk space"):
        export_gguf(
            str(place / "four"), ["q8_0"], tmp_path / "new", listening, model=str(place / "model")
        )
    assert [one["kind"] for one in listening.said][-1] == "export_plan"
    assert not (tmp_path / "new").exists()


def test_types_may_take_different_bases(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate the better one for some types: what is written is what the proof compares."""
    import tsugiki.judging

    taken = {"f32": "nf4", "q4_k_m": "nf4", "q8_0": "none", "q2_k": "none"}

    def losses(_: Any, candidates: Any, forms: Any, *more: Any) -> list[tuple[Any, int]]:
        return [({kept: float(kept != taken[f.name]) for kept in candidates}, 0) for f in forms]

    monkeypatch.setattr(tsugiki.judging, "merged_losses", losses)
    source, model = str(place / "four"), str(place / "model")
    done = export_gguf(source, list(taken), tmp_path, Terminal(), model=model)
    assert {one.dtype: one.kept for one in done} == taken
    assert not list(tmp_path.rglob("*.tmp"))
    assert prove(source, done, Terminal(), model=model) is Proof.EQUAL
    for one in done:
        other = replace(one, kept="none" if one.kept == "nf4" else "nf4")
        assert prove(source, [other], Terminal(), model=model) is Proof.WRONG


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
@pytest.mark.parametrize("pieces", [1, 20])
def test_a_disk_that_fills_up_behind_the_writer_is_told(pieces: int) -> None:
    """Writing goes on beside the caller: neither the last piece's error nor an early one is lost."""
    written = 0

    def fill() -> None:
        nonlocal written
        with ShardWriter(Path("/dev/full")) as writer:
            for _ in range(pieces):
                writer.write(memoryview(bytes(1 << 20)))
                written += 1

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert written <= AHEAD + 1, "it stops soon"
