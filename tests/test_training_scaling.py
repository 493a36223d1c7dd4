"""float16: the loss is scaled, an overflowing step is skipped and counted, and resume is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from runs import STEPS, adapter, forked, in_process, make_place, result
from torch import Tensor, nn

from tsugiki import device
from tsugiki.adapters.attach import attach
from tsugiki.config import LoraConfig
from tsugiki.data.example import Example
from tsugiki.errors import NonFiniteError
from tsugiki.training import loop, metrics, scaling
from tsugiki.training.ranks import ranks
from tsugiki.training.scaling import LossScale
from tsugiki.training.simple import train
from tsugiki.training.step import optimiser_step


def test_the_scale_falls_at_once_and_rises_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 3)
    scale = LossScale()
    assert scale.overflow()
    assert (scale.value, scale.skipped) == (2.0**15, 1)
    for _ in range(2):
        scale.success()
    assert scale.overflow(), "an overflow starts the count again"
    for _ in range(3):
        scale.success()
    assert scale.value == 2.0**15
    for _ in range(1000):
        scale.success()
    assert scale.value == scaling.LARGEST
    lost = sum(scale.overflow() for _ in range(100))
    assert (lost, scale.value) == (24, scaling.SMALLEST), "below one it cannot help"


def step_with(weight: nn.Parameter, scale: LossScale, slope: float) -> tuple[bool, float]:
    """One step of SGD on weight · slope / 4096, the first product in float16."""

    def loss_of(examples: Sequence[Example], factor: float) -> tuple[Tensor, int]:
        return (weight.half() * slope).float().sum() * factor / 4096, 1

    done = optimiser_step(
        3, [[Example((1, 2), (1, 2), "row")]], loss_of, {"w": weight},
        torch.optim.SGD([weight], lr=0.0), rate=0.5, max_grad_norm=0.0,
        ranks=ranks(torch.device("cpu")), scaling=scale,
    )  # fmt: skip
    return done.skipped, done.norm


def test_a_gradient_too_small_for_float16_arrives() -> None:
    weight = nn.Parameter(torch.ones(1))
    skipped, norm = step_with(weight, LossScale(), 2.0**-14)
    assert not skipped
    assert norm == 2.0**-26
    assert weight.grad is not None
    tiny = nn.Parameter(torch.ones(1))
    ((tiny.half() * 2.0**-14).float().sum() / 4096).backward()  # without a scale
    assert float(tiny.grad) == 0.0


def test_an_overflow_changes_nothing_until_the_scale_fits() -> None:
    weight, scale = nn.Parameter(torch.ones(1)), LossScale()
    tries = 0
    while step_with(weight, scale, 2.0**15)[0]:
        tries += 1
        assert float(weight.detach()) == 1.0
    assert tries == scale.skipped == 4  # 2^19 … 2^16 lie above 65,504
    assert float(weight.detach()) == -3.0


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_float16_trains_as_float32_does(family: str) -> None:
    rows = [([3 + i, 9, 20 + i, 30, 5], [-100, 9, 20 + i, 30, 5]) for i in range(6)]
    curves = []
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = tiny_model(family).to(dtype)
        config = LoraConfig(r=4, alpha=8, dropout=0.0)
        attach(model, config, generator=torch.Generator().manual_seed(0))
        curves.append(train(model, rows, steps=12, learning_rate=3e-3, batch_size=3))
    wide, half = curves
    assert wide[-1] < wide[0]
    assert half == pytest.approx(wide, rel=2e-2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and a whole run."""
    folder = tmp_path_factory.mktemp("half")
    make_place(folder, forked)
    return folder


def overflowing(above: float) -> Callable[..., tuple[Tensor, int]]:
    """The loss whose gradient is inf where its factor is above a limit."""
    original = loop.summed_loss

    def summed(base: Any, examples: Any, factor: float = 1.0) -> tuple[Tensor, int]:
        loss, labels = original(base, examples, factor)
        if loss.requires_grad and factor > above:
            loss.register_hook(lambda g: g * float("inf"))
        return loss, labels

    return summed


HALF = {"dtype": "float16"}


def test_skipped_steps_are_counted_and_resume_is_exact(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 4)  # the scale rises and overflows again and again
    monkeypatch.setattr(loop, "summed_loss", overflowing(above=400.0))
    in_process(place, "half", model=HALF)
    lines = metrics.read(place / "half")
    skipped = [line["step"] for line in lines if line["kind"] == "skipped"]
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert skipped[0] == 1
    assert len(skipped) > 5
    assert sorted(skipped + trained) == list(range(1, STEPS + 1))
    assert adapter(place / "half") != adapter(place / "whole")

    save = loop.save_checkpoint

    def stop_after(folder: Path, step: int, *given: Any) -> Path:
        path = save(folder, step, *given)
        if step == 9:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(loop, "save_checkpoint", stop_after)
    with pytest.raises(KeyboardInterrupt):
        in_process(place, "again", model=HALF)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    in_process(place, "again", resume=True)
    assert result(place / "again") == result(place / "half")
    again = [line["step"] for line in metrics.read(place / "again") if line["kind"] == "skipped"]
    assert again == skipped


def test_an_overflow_at_every_scale_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "summed_loss", overflowing(above=0.0))
    with pytest.raises(NonFiniteError, match="gradient of step 17 is NaN or inf") as told:
        in_process(place, "lost", model=HALF)
    assert "float32" in str(told.value.fix)


def test_a_gpu_without_bf16_gets_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for capability, kind in (((7, 5), "float16"), ((6, 1), "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        chosen, why = device._dtype("cuda", 2048, None)
        assert chosen == kind
        assert "no native bf16" in why or "neither bf16" in why
