"""Nothing is lost: kills, signals and damage end in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from runs import (
    STEPS,
    Running,
    command,
    finish,
    forked,
    in_process,
    make_place,
    result,
    steps_written,
)

from tsugiki import files
from tsugiki.config import build_config, read_yaml
from tsugiki.errors import NonFiniteError, RunError, UsageError
from tsugiki.kernels import backend
from tsugiki.pipelines import run_training
from tsugiki.resuming import resumed_config
from tsugiki.terminal import Terminal
from tsugiki.training import loop, metrics
from tsugiki.training.checkpoint import checkpoints, newest_whole


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and an uninterrupted run to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    make_place(folder, forked)
    return folder


def children_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids):
            return True
        time.sleep(0.02)
    return False


def kill_twice(place: Path, seed: int, start: Callable[..., Running]) -> None:
    """Twice in one run, at the parent, the child, or the whole group: the same bytes."""
    rng = random.Random(seed)
    name = f"killed{seed}"
    for attempt in range(2):
        process = start(place, name, resume=attempt > 0)
        run, target = place / name, rng.randint(attempt * 8, attempt * 8 + 10)
        deadline = time.monotonic() + 60
        while steps_written(run) < target and time.monotonic() < deadline:
            assert process.poll() is None, process.said()
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        family = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
        whom = rng.choice(["parent", "child", "group"])
        if whom == "child":
            os.kill(family[0], signal.SIGKILL)
            assert process.wait(timeout=20) == 137
        else:
            (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGKILL)
            assert process.wait(timeout=20) == -signal.SIGKILL
        assert children_gone(family), "an orphan trains on"
    finish(start(place, name, resume=True))
    assert result(place / name) == result(place / "whole")
    trained = [x["step"] for x in metrics.read(place / name) if x["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1)), "each step once"


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_random_moments(place: Path, seed: int) -> None:
    kill_twice(place, seed, forked)


@pytest.mark.parametrize(
    ("number", "code", "start"),
    [(signal.SIGINT, 130, command), (signal.SIGTERM, 143, forked)],
)
def test_signals_save_and_leave(place: Path, number: int, code: int, start) -> None:  # type: ignore[no-untyped-def]
    name = f"signal{number}"
    process = start(place, name)
    while steps_written(place / name) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == code, process.said()
    assert f"tsugiki train --resume {name}" in process.said()
    assert "stopped at step" in (place / name / "report.html").read_text()
    in_process(place, name, resume=True)
    assert result(place / name) == result(place / "whole")


def test_a_run_keeps_its_kernels(place: Path) -> None:
    noted = files.read_json(place / "whole" / "decisions.json")["operations"]
    assert noted == backend.operations(torch.device("cpu"), torch.float32)
    shutil.copytree(place / "whole", place / "kept")
    shutil.rmtree(place / "kept" / "adapter")
    newest = checkpoints(place / "kept" / "checkpoints")[0][1]
    shutil.rmtree(newest)
    decisions = files.read_json(place / "kept" / "decisions.json")
    plain = dict.fromkeys(noted, "torch")
    files.write_json(place / "kept" / "decisions.json", decisions | {"operations": plain})
    try:
        in_process(place, "kept", resume=True)
        assert backend.bodies(torch.zeros(1), "norms") is None
    finally:
        backend.hold_plain(())
    assert files.read_json(place / "kept" / "decisions.json")["operations"] == plain


def test_another_type_or_device_on_resume_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = read_yaml(place / "whole" / "config.yaml")
    config = build_config(stored, {"model": {"dtype": "bfloat16"}})
    run_training(config, Terminal(as_json=True), resume=place / "whole", dry_run=True)
    said = capsys.readouterr().out
    assert "--dtype bfloat16: this run goes on as it began, float32" in said
    assert "--device" not in said


def test_a_damaged_newest_checkpoint_is_passed_over(place: Path) -> None:
    shutil.copytree(place / "whole", place / "damaged")
    folder = place / "damaged" / "checkpoints"
    newest = checkpoints(folder)[0][1]
    path = newest / "tensors.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    found, notes = newest_whole(folder)
    assert found is not None
    assert found.path != newest
    assert "tensors.safetensors has another content" in notes[0]
    shutil.rmtree(place / "damaged" / "adapter")
    in_process(place, "damaged", resume=True)
    assert result(place / "damaged") == result(place / "whole")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_files_are_seen(place: Path, tmp_path: Path, cut: int) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(place / "whole" / "checkpoints", folder)
    for file in ("tensors.safetensors", "state.json", "manifest.json"):
        newest = checkpoints(folder)[0][1]
        path = newest / file
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        found, notes = newest_whole(folder)
        assert found is not None
        assert found.path != newest
        assert file.split(".")[0] in notes[0]
        path.write_bytes(whole)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    name = f"nan-{where}"
    original = loop.summed_loss
    count = {"calls": 0}

    def poisoned(*given):  # type: ignore[no-untyped-def]
        loss, labels = original(*given)
        count["calls"] += 1
        if count["calls"] == 15:  # the first pass of step 8
            if where == "loss":
                return loss * float("nan"), labels
            loss.register_hook(lambda g: g * float("inf"))
        return loss, labels

    monkeypatch.setattr(loop, "summed_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 8"):
        in_process(place, name)
    assert "step 8 is NaN" in (place / name / "report.html").read_text()
    monkeypatch.undo()
    in_process(place, name, resume=True)
    assert result(place / name) == result(place / "whole")


def test_resume_of_another_run_is_refused(place: Path) -> None:
    in_process(place, "other", max_steps=6)
    run = place / "other"
    stored = read_yaml(run / "config.yaml")
    for change, said in (
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate: 0.003 → 0.001"),
        ({"lora": {"dropout": 0.2}}, "lora.dropout"),
        ({"data": {"eval_ratio": 0.5}}, "data"),
    ):
        with pytest.raises(RunError, match=said):
            run_training(build_config(stored, change), Terminal(as_json=True), resume=run)
    changed = place / "changed.jsonl"
    changed.write_text((place / "rows.jsonl").read_text().replace("red", "rad", 1))
    with pytest.raises(RunError, match="the rows are not those that it began with"):
        run_training(
            build_config(stored, {"data": {"path": str(changed)}}),
            Terminal(as_json=True),
            resume=run,
            dry_run=True,  # told before the weights are loaded
        )


def test_a_run_finds_its_base_where_it_moved(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_process(place, "moving", max_steps=4)
    run, base = place / "moving", Path(read_yaml(place / "moving/config.yaml")["model"]["name"])
    moved = base.with_name("base-moved")
    base.rename(moved)
    try:
        config = resumed_config(run, {}, [], Terminal())
        assert config.model.name == str(moved)
        assert "found by its fingerprint" in capsys.readouterr().err
        (run / "adapter" / "adapter_config.json").rename(run / "hidden")  # as a full run has none
        with pytest.raises(UsageError, match="the base of this run is not at"):
            resumed_config(run, {}, [], Terminal())
    finally:
        moved.rename(base)


def test_one_writer_and_no_overwriting(place: Path) -> None:
    with files.RunLock(place / "whole"), pytest.raises(RunError, match="another run is writing"):
        in_process(place, "whole", resume=True)
    with pytest.raises(RunError, match="exists already"):
        in_process(place, "whole")


def test_same_seed_same_run(place: Path) -> None:
    in_process(place, "again")
    assert result(place / "again") == result(place / "whole")
    in_process(place, "seed1", seed=1)
    assert result(place / "seed1") != result(place / "whole")
