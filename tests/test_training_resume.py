"""Nothing is lost: kills, signals and damage end in the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import psutil
import pytest
import torch
from families import save_tiny
from poison import Poison, changed, everything
from runs import (
    STEPS,
    Running,
    adapter,
    command,
    finish,
    forked,
    in_process,
    make_place,
    result,
    steps_written,
)
from safetensors.torch import load_file, save_file
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki import files
from tsugiki.config import build_config, read_yaml
from tsugiki.errors import DiskError, NonFiniteError, RunError, UsageError
from tsugiki.kernels import backend
from tsugiki.pipelines import prepare_session, run_prepared, run_training
from tsugiki.resuming import resumed_config
from tsugiki.terminal import Terminal
from tsugiki.training import loop, metrics
from tsugiki.training.checkpoint import checkpoints, newest_whole

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import fail_points


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name open files")
@pytest.mark.parametrize(
    ("save", "kind", "nth"),
    [
        ("adapter", "rename", 2),  # the old one is moved aside, the new one not yet in its place
        ("checkpoint", "rename", 2),  # the same of a checkpoint that is written again
        ("checkpoint", "torn", 4),  # half of the next one's tensors
    ],
)
def test_kill_9_inside_a_save(place: Path, save: str, kind: str, nth: int) -> None:
    """All such steps: `python -m benchmarks.kills`."""
    if not (place / "stopped").exists():
        fail_points.go_on_stopped(place)
    fail_points.survive(place, fail_points.Point("again", save, kind, nth))


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


@pytest.mark.parametrize(
    ("where", "value", "at", "step"),
    [("loss", nan, 15, 8), ("gradient", inf, 4, 2), ("activation", -inf, 29, 15)],
)
def test_nan_stops_before_the_update(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: str, value: float, at: int, step: int
) -> None:
    """In the first or second pass of a step: nothing changes, and what was good goes on."""
    name, real, untouched = f"nan-{where}", loop.optimiser_step, []

    def watched(number, passes, loss_of, trained, optimizer, **more):  # type: ignore[no-untyped-def]
        before = everything(trained, optimizer)
        try:
            done = real(number, passes, loss_of, trained, optimizer, **more)
        except NonFiniteError:
            untouched.append(changed(before, everything(trained, optimizer)) == [])
            raise
        assert changed(before, everything(trained, optimizer)), "a good step is seen"
        return done

    monkeypatch.setattr(loop, "optimiser_step", watched)
    monkeypatch.setattr(loop, "summed_loss", Poison(loop.summed_loss, where, value, at))
    with pytest.raises(NonFiniteError, match=f"step {step} ") as error:
        in_process(place, name)
    assert error.value.exit_code != 0
    assert untouched == [True]
    assert f"step {step} is NaN" in (place / name / "report.html").read_text()
    assert str(place / name) in str(error.value.fix), "where the last good state is"
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


def test_resume_on_another_base_is_refused(place: Path) -> None:
    """Of the same shapes: other weights, or one number of one tensor."""
    run = place / "whole"
    save_tiny("llama", place / "other-model", tiny_tokenizer(CHATML), seed=1)
    for name in ("touched-model", "same-model"):
        shutil.copytree(place / "model", place / name)
    path = place / "touched-model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    said = "the base's weights are not those that it began with"
    terminal = Terminal(as_json=True)
    for name in ("other-model", "touched-model"):
        config = build_config(
            read_yaml(run / "config.yaml"), {"model": {"name": str(place / name)}}
        )
        with pytest.raises(RunError, match=said):  # before its weights are loaded
            run_training(config, terminal, resume=run, dry_run=True)
        session = prepare_session(config, terminal, run)
        with pytest.raises(RunError, match=said):  # and of those that were loaded
            run_prepared(session, run, terminal, resumed=True)
    same = {"model": {"name": str(place / "same-model")}}
    config = build_config(read_yaml(run / "config.yaml"), same)
    run_training(config, terminal, resume=run, dry_run=True)
    assert before == {
        p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_too_little_disk_is_told_before_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte less than the plan says is refused, and nothing is written; that much is enough."""
    stored = read_yaml(place / "whole" / "config.yaml")
    run = place / "roomless"
    config = build_config(stored, {"output": str(run), "train": {"max_steps": 1}})
    need = prepare_session(config, Terminal(as_json=True), None).plan.disk
    took = sum(p.stat().st_size for p in (place / "whole").rglob("*") if p.is_file())
    assert need >= took, "a whole run fits in what is asked for"
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda _: need - 1)
    with pytest.raises(DiskError, match="too little disk space for the run") as refusal:
        run_training(config, Terminal(as_json=True))
    assert refusal.value.allowed == f"{files.human_bytes(need)} needed"
    assert "--output" in str(refusal.value.fix)
    assert not run.exists()
    monkeypatch.setattr("tsugiki.files.free_bytes", lambda _: need)
    run_training(config, Terminal(as_json=True))
    assert (run / "adapter").is_dir()


def test_killed_for_memory_the_parent_tells_the_ways_out(place: Path) -> None:
    """SIGKILL of the child that trains, as the kernel does it; the command told goes on."""
    process = command(place, "starved")
    while steps_written(place / "starved") < 5:
        assert process.poll() is None, process.said()
        time.sleep(0.01)
    (child,) = psutil.Process(process.pid).children()
    child.kill()
    assert process.wait(timeout=30) == 137
    said = process.said()
    assert "Traceback" not in said
    assert re.search(
        r"error: tsugiki train was killed (by the kernel for memory|\(SIGKILL\))", said
    )
    assert re.search(r"up to [\d.]+ .B held; [\d.]+ .B free without it", said)
    ways = re.search(r"less memory: (.*); or go on as it was: tsugiki train --resume (\S+)\n", said)
    assert ways is not None, said
    for way in ("--quantize nf4", "--gradient-checkpointing always", "--batch-size 1 ",
                "--max-length"):  # fmt: skip
        assert way in ways[1]
    assert ways[2] == str(place / "starved")
    finish(forked(place, ways[2], resume=True))
    assert result(place / "starved") == result(place / "whole")


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


def test_what_equal_runs_have_in_common(place: Path, tmp_path: Path) -> None:
    """A change of any of it is seen: one byte of the optimiser, a counter, a line of the records."""
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    whole = result(run)
    newest = checkpoints(run / "checkpoints")[0][1]
    tensors = load_file(newest / "tensors.safetensors")
    moments = [name for name in tensors if name.startswith("optim.exp_avg_sq.")]
    assert len(moments) == sum(name.startswith("weights.") for name in tensors) > 0
    tensors[moments[0]].view(-1)[0] += 1e-9
    save_file(tensors, newest / "tensors.safetensors")
    assert {key for key, value in result(run).items() if value != whole[key]} == {"tensors"}
    for name, old, new in (
        (newest / "state.json", '"tokens": ', '"tokens": 1'),
        (run / "metrics.jsonl", '"loss": ', '"loss": 1'),
        (run / "samples.jsonl", '"text": "', '"text": "x'),
        (run / "adapter" / "adapter_model.safetensors", '"format"', '"farmat"'),
    ):
        before, content = result(run), name.read_bytes()
        assert old.encode() in content
        name.write_bytes(content.replace(old.encode(), new.encode(), 1))
        assert len([key for key, value in result(run).items() if value != before[key]]) == 1, name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "held_out"} == {line["kind"] for line in lines}
    assert all(line["tokens_per_second"] > 0 for line in lines if line["kind"] == "train")


def test_same_seed_same_run(place: Path) -> None:
    in_process(place, "again")
    assert result(place / "again") == result(place / "whole")
    in_process(place, "seed1", seed=1)
    assert adapter(place / "seed1") != adapter(place / "whole")
