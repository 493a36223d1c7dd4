"""int8 products in a run: proven before they are used, safer where needed, refused, resumed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import adapter, forked, make_place, result
from torch import Tensor, nn

from tsugiki import device, files
from tsugiki.adapters.attach import attach, lora_modules, training_mode
from tsugiki.config import LoraConfig, build_config, read_yaml
from tsugiki.data.example import Example
from tsugiki.data.loader import Loader
from tsugiki.device import Decisions, decide
from tsugiki.errors import Interrupted, RunError, UsageError
from tsugiki.kernels.int8 import Int8Weight, int8_speedup
from tsugiki.kernels.products import LowRank
from tsugiki.memory import PROOF_TOKENS
from tsugiki.models.flat import flat_loss, use_flat_attention
from tsugiki.models.int8 import LEVELS, Int8Products
from tsugiki.models.tune import tune
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal
from tsugiki.training import gradients, loop, metrics
from tsugiki.training.gradients import agreement, few_passes, judge, settle
from tsugiki.training.objective import flatten
from tsugiki.training.step import LossOf

ROWS = [Example(tuple(range(3, 60)), tuple(range(3, 60)), "a"),
        Example(tuple(range(90, 40, -1)), (-100,) * 20 + tuple(range(70, 40, -1)), "b")]  # fmt: skip


STEPS = 12  # of a run; the second proof is at step 2

# The proof by itself.


def prepared(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Int8Products, LossOf]:
    model = tiny_model("llama").to(dtype)
    config = LoraConfig(r=4, dropout=0.3)
    attach(model, config, generator=torch.Generator().manual_seed(0))
    use_flat_attention(model)
    tuned = tune(model)

    def loss_of(examples: Sequence[Example], factor: float) -> tuple[Tensor, int]:
        ids, batch, places, targets = flatten(examples, torch.device("cpu"))
        head = tuned.head_of(model)
        return flat_loss(model, ids, batch, places, targets, head=head, factor=factor), len(targets)

    return model, Int8Products(model, tuned), loss_of


def test_the_proof_leaves_everything_as_it_was() -> None:
    model, products, loss_of = prepared()
    training_mode(model, True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    settled = settle(model, products, loss_of, [ROWS, ROWS[1:]], draw=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == kept[name].dtype
        assert torch.equal(tensor, kept[name]), name
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and bool((g == 1).all()) for g in grads)
    assert settled.level == products.level
    assert len(settled.verdict.tensors) == len(grads) == 2 * 21


def test_b_at_zero_proves_nothing() -> None:
    """The gradient of every A is then zero, which counts as a failure."""
    model, products, loss_of = prepared()
    with pytest.raises(RunError, match="zero or not finite"):
        settle(model, products, loss_of, [ROWS], draw=False)
    assert products.level == 0
    for _, module in lora_modules(model):
        nn.init.normal_(module.lora_B, 0.0, 0.02)
    assert settle(model, products, loss_of, [ROWS], draw=False).verdict.median > 0.998


@dataclasses.dataclass(frozen=True)
class WrongForward(Int8Weight):
    """Right on the way back alone."""

    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        y = super().matmul(x, term)
        return y * 1.5 if self.forward else y


@pytest.mark.parametrize(
    ("name", "taken"),
    [("self_attn.v_proj", 1), ("mlp.up_proj", 2), ("mlp.gate_proj", 3), ("head", 4)],
)
def test_a_level_that_misses_a_bound_gives_way_to_a_safer_one(
    name: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this random model is wilder than any that was trained
    monkeypatch.setattr(gradients, "MEDIAN", 0.99)
    monkeypatch.setattr(gradients, "RATIOS", (0.9, 1.1))
    model, products, loss_of = prepared()
    path = "lm_head" if name == "head" else f"model.layers.1.{name}"
    products.weights[path] = WrongForward(**vars(products.weights[path]))
    products.use(0)
    settled = settle(model, products, loss_of, [ROWS], draw=True)
    assert settled.level == products.level == taken
    assert [level for level, _ in settled.refused] == list(range(taken))
    assert all(verdict.missed for _, verdict in settled.refused)


def test_products_that_are_wrong_are_refused() -> None:
    model, products, loss_of = prepared()
    path = "model.layers.1.mlp.down_proj"
    weight = products.weights[path]
    products.weights[path] = dataclasses.replace(weight, packed=weight.packed.flip(0))
    products.use(0)
    with pytest.raises(RunError, match="bounds missed") as refusal:
        settle(model, products, loss_of, [ROWS], draw=True)
    assert "without int8, 0 are missed" in str(refusal.value.allowed)
    assert products.level == 0


def test_judging() -> None:
    exact = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
    assert judge(exact, exact).missed == ()
    assert agreement(torch.tensor([6.0, 8.0]), exact["a"]) == gradients.Agreement(1.0, 2.0)
    longer = judge({**exact, "a": exact["a"] * 1.04}, exact)
    assert longer.missed == ("a: ratio of norms 1.0400",)
    turned = judge({**exact, "b": torch.tensor([1.0, 0.3])}, exact)
    assert [text.split(":")[0] for text in turned.missed] == ["median cosine 0.97891", "b"]
    for bad in (0.0, math.nan, math.inf):
        verdict = judge({**exact, "a": exact["a"] * bad}, exact)
        assert "a: the gradient is zero or not finite" in verdict.missed


def test_few_passes_are_the_first_and_short() -> None:
    rows = tuple(Example((1,) * n, (1,) * n, str(n)) for n in (600, 500, 400, 1400, 30, 20))
    whole = few_passes(Loader(rows, micro_batch=2, accumulation=1, seed=0), 1 << 20)
    assert {len(one) for one in whole} == {2}, "a small base takes them as they are"
    passes = few_passes(Loader(rows, micro_batch=2, accumulation=1, seed=0), 1 << 40)
    assert len(passes) == gradients.BATCHES
    for one in passes:
        assert len(one) == 1 or sum(len(e.ids) for e in one) <= PROOF_TOKENS
    silent = Example((1, 2), (-100, -100), "nothing to learn")
    one = Example((1, 2), (1, 2), "one")
    passes = few_passes(Loader((silent, one), micro_batch=1, accumulation=1, seed=0), 1)
    assert passes
    assert all(examples == [one] for examples in passes)


# The proof in a run.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and runs that nothing disturbed, with int8 and without."""
    folder = tmp_path_factory.mktemp("int8")
    make_place(folder, forked)
    begin(folder, "plain", compute="bf16")
    with pytest.MonkeyPatch.context() as patch:
        force(patch)
        begin(folder, "int8")
    return folder


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch)


def force(patch: pytest.MonkeyPatch) -> None:
    """At width 64 int8 is not faster; here it matters what it computes."""

    def decided(*given: object, compute: str = "bf16", **more: object) -> Decisions:
        own = decide(*given, **more)  # type: ignore[arg-type]
        return dataclasses.replace(own, compute=compute)

    patch.setattr("tsugiki.pipelines.decide", decided)


def begin(place: Path, name: str, compute: str = "int8", **train: object) -> Path:
    stored = read_yaml(place / "whole" / "config.yaml")
    model = {**stored["model"], "compute": compute}
    changes = {"output": str(place / name), "train": {"max_steps": STEPS, **train}, "model": model}
    run_training(build_config(stored, changes), Terminal(as_json=True))
    return place / name


def go_on(run: Path, **model: object) -> None:
    stored = read_yaml(run / "config.yaml")
    config = build_config(stored, {"model": model})
    run_training(config, Terminal(as_json=True), resume=run)


def proofs(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics.read(run) if line["kind"] == "gradients"]


def stop_at(patch: pytest.MonkeyPatch, wanted: int) -> None:
    """SIGTERM in the middle of a step."""
    own = loop.optimiser_step

    def stepping(number: int, *given: Any, **more: Any) -> Any:
        if number == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return own(number, *given, **more)

    patch.setattr(loop, "optimiser_step", stepping)


def test_a_run_is_proven_before_its_first_step_and_at_a_tenth(place: Path) -> None:
    run = place / "int8"
    lines = proofs(run)
    assert [line["step"] for line in lines if line["taken"]] == [0, 2]
    for line in lines:
        assert len(line["tensors"]) == 2 * 21
        assert line["what"] in LEVELS
        said = re.search(r"; ([0-9.]+) of the time without int8", line["note"])
        assert line["taken"] == (said is not None)
        if said and said[1] != "0.97":  # rounded, it may be on either side
            assert ("is as good here" in line["note"]) == (float(said[1]) > 0.97)
    assert min(c for c, _ in lines[-1]["tensors"].values()) >= gradients.LOWEST
    losses = [line["loss"] for line in metrics.read(run) if line["kind"] == "train"]
    plain = [line["loss"] for line in metrics.read(place / "plain") if line["kind"] == "train"]
    assert losses != plain, "other products"
    assert losses[-1] == pytest.approx(plain[-1], abs=0.02)
    held = [line["loss"] for line in metrics.read(run) if line["kind"] == "held_out"]
    first = [line["loss"] for line in metrics.read(place / "plain") if line["kind"] == "held_out"]
    assert held[0] == first[0], "held-out losses are those of the base as it is"


@pytest.mark.parametrize("when", [1, 7])
@pytest.mark.usefixtures("forced")
def test_a_stopped_run_goes_on_to_the_same_bytes(
    place: Path, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"stopped{when}"
    with monkeypatch.context() as patch:
        stop_at(patch, when)
        with pytest.raises(Interrupted):
            begin(place, name)
    go_on(place / name)
    assert result(place / name) == result(place / "int8")
    assert [line["step"] for line in proofs(place / name) if line["taken"]] == [0, 2]


@pytest.mark.usefixtures("forced")
def test_the_level_of_a_run_is_resumed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is proven again after a tenth, so the level must come from the checkpoint."""
    own = loop.settle

    def careful(model: nn.Module, products: Int8Products, *given: Any, **more: Any) -> Any:
        products.use(len(LEVELS) - 1)
        return own(model, products, *given, **more)

    monkeypatch.setattr(loop, "settle", careful)
    whole = begin(place, "careful")
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            begin(place, "careful-stopped")
    go_on(place / "careful-stopped")
    assert result(place / "careful-stopped") == result(whole)
    assert adapter(whole) != adapter(place / "int8")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("draw", [True, False])
def test_a_run_below_the_bound_is_refused_and_goes_on_without(
    place: Path, draw: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the first step, or at a tenth: saved, with the way on in the message."""
    own, name = loop.settle, f"refused-{draw}"

    def strict(*given: Any, **more: Any) -> Any:
        if more["draw"] is draw:
            monkeypatch.setattr(gradients, "MEDIAN", 1.5)
        return own(*given, **more)

    monkeypatch.setattr(loop, "settle", strict)
    with pytest.raises(RunError, match="bounds missed") as refusal:
        begin(place, name)
    run = place / name
    assert refusal.value.fix == f"tsugiki train --resume {run} --compute bf16"
    assert (run / "checkpoints" / f"step-{0 if draw else 2}").is_dir()
    go_on(run, compute="bf16")
    assert (run / "adapter").is_dir()
    assert Decisions.from_json(files.read_json(run / "decisions.json")).compute == "bf16"
    if draw:
        assert adapter(run) == adapter(place / "plain")


def test_int8_needs_a_frozen_base(place: Path) -> None:
    with pytest.raises(UsageError, match="frozen base"):
        begin(place, "full", method="full")
    assert not (place / "full").exists()


def test_where_int8_is_not_faster_it_says_so(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe: list[device.Speedup] = [int8_speedup]

    def reason(width: int = 1024, compute: str = "int8") -> tuple[str, str]:
        found = decide("cpu", "float32", hidden_size=width, compute=compute, int8_speedup=probe[0])
        return found.compute, found.reasons.get("compute", "")

    assert reason(compute="bf16") == ("bf16", "")
    assert reason(64)[0] == "bf16"
    assert "hidden size 64" in reason(64)[1]
    probe[0] = lambda *_: 0.8
    assert reason() == ("bf16", "int8 is not faster here (probe: 0.8×); products stay in float32")
    probe[0] = lambda *_: 2.0
    assert reason()[0] == "int8"

    def missing(*_: object) -> float:
        raise RuntimeError("not implemented for 'Char'")

    probe[0] = missing
    assert "no int8 product" in reason()[1]
    begin(place, "slow", max_steps=2)
    assert (
        decide("cpu", hidden_size=64).allocator
        == Decisions.from_json(files.read_json(place / "slow" / "decisions.json")).allocator
    )
    assert f"--compute int8: hidden size 64 < {device.NARROW}" in capsys.readouterr().out
    assert proofs(place / "slow") == []


def test_decisions_of_older_runs_are_read() -> None:
    old = {"device": "cpu", "dtype": "float32", "threads": 2, "reasons": {"dtype": "narrow"}}
    assert Decisions.from_json(old).compute == "bf16"
    made = dataclasses.replace(Decisions.from_json(old), compute="int8")
    assert Decisions.from_json(made.to_json()) == made


def test_the_probe_measures() -> None:
    assert 0 < int8_speedup(512, torch.float32) < 100
    assert 0 < int8_speedup(512, torch.bfloat16) < 100
