"""Nothing is lost: kills, signals, damage and full disks end in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from families import save_tiny
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki import files
from tsugiki.config import build_config, read_yaml
from tsugiki.errors import DiskError, NonFiniteError, RunError
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal
from tsugiki.training import loop, metrics
from tsugiki.training.checkpoint import checkpoints, newest_whole

STEPS = 24
FLAGS = [
    "--lora-r", "4", "--lora-dropout", "0.1", "--batch-size", "2", "--save-every", "3",
    "--gradient-accumulation-steps", "2", "--max-steps", str(STEPS), "--eval-every", "6",
    "--log-every", "1", "--learning-rate", "3e-3", "--scheduler", "cosine", "--dtype", "float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and an uninterrupted run to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    make_place(folder)
    return folder


def make_place(folder: Path) -> None:
    save_tiny("llama", folder / "model", tiny_tokenizer(CHATML))
    rng = random.Random(0)
    words = ["red", "blue", "cat", "dog", "tea", "sun"]
    with open(folder / "rows.jsonl", "w") as stream:
        for i in range(40):
            ask = " ".join(rng.choices(words, k=4)) + f" {i}"
            stream.write(json.dumps({"prompt": ask, "completion": ask[::-1]}) + "\n")
    finish(command(folder, "whole"))


def command(folder: Path, output: str, *extra: str, resume: bool = False) -> subprocess.Popen[str]:
    start = (
        ["--resume", output]
        if resume
        else ["rows.jsonl", "--model", "model", "--output", output, *FLAGS]
    )
    return subprocess.Popen(
        [sys.executable, "-m", "tsugiki", "train", *start, *extra],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TSUGIKI_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def result(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def in_process(place: Path, output: str, resume: bool = False, **train: object) -> None:
    """The same run without a process of its own, so that faults can be put into it."""
    run = place / output
    if resume:
        config = build_config(read_yaml(run / "config.yaml"))
        run_training(config, Terminal(as_json=True), resume=run)
        return
    stored = read_yaml(place / "whole" / "config.yaml")
    run_training(build_config(stored, {"output": str(run), "train": train}), Terminal(as_json=True))


def children_gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in pids):
            return True
        time.sleep(0.02)
    return False


def steps_written(run: Path) -> int:
    lines = files.read_lines(run / metrics.METRICS)
    return max((line["step"] for line in lines if line["kind"] == "train"), default=-1)


@pytest.mark.parametrize("seed", range(5))
def test_kill_9_at_random_moments(place: Path, seed: int) -> None:
    """Twice in one run, at the parent, the child, or the whole group: the same bytes."""
    rng = random.Random(seed)
    name = f"killed{seed}"
    for attempt in range(2):
        process = command(place, name, resume=attempt > 0)
        run, target = place / name, rng.randint(attempt * 8, attempt * 8 + 10)
        deadline = time.monotonic() + 60
        while steps_written(run) < target and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.01)
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
        process.communicate()
    finish(command(place, name, resume=True))
    assert result(place / name) == result(place / "whole")
    trained = [x["step"] for x in metrics.read(place / name) if x["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1)), "each step once"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_leave(place: Path, number: int, code: int) -> None:
    name = f"signal{number}"
    process = command(place, name)
    while steps_written(place / name) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert f"tsugiki train --resume {name}" in err
    finish(command(place, name, resume=True))
    assert result(place / name) == result(place / "whole")


def test_a_damaged_newest_checkpoint_is_passed_over(place: Path) -> None:
    in_process(place, "damaged", save_every=3)
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
    in_process(place, "damaged", resume=True)
    assert result(place / "damaged") == result(place / "whole")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_files_are_seen(place: Path, cut: int) -> None:
    name = f"cut{cut}"
    in_process(place, name)
    folder = place / name / "checkpoints"
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


def test_a_full_disk_at_any_write_of_a_save_harms_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync fails with ENOSPC at the n-th call from step 9 on, for every n of a save."""
    real = os.fsync
    for fail_at in range(1, 9):
        name = f"full{fail_at}"
        calls = {"armed": False, "count": 0}

        def fsync(handle: int, calls: dict[str, int] = calls, fail_at: int = fail_at) -> None:
            if calls["armed"]:
                calls["count"] += 1
                if calls["count"] == fail_at:
                    raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        def save(folder, step, tensors, state, calls=calls):  # type: ignore[no-untyped-def]
            calls["armed"] = step == 9
            try:
                return original(folder, step, tensors, state)
            finally:
                calls["armed"] = False

        original = loop.save_checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(loop, "save_checkpoint", save)
            try:
                in_process(place, name)
            except DiskError as error:
                assert "disk is full" in error.problem
                assert "--resume" in str(error.fix)
            else:
                assert calls["count"] < fail_at, "the failure was swallowed"
                return
        assert not list((place / name / "checkpoints").glob(".*.tmp")), "nothing half-written"
        in_process(place, name, resume=True)
        assert result(place / name) == result(place / "whole")
    raise AssertionError("a save has more writes than were tried")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_the_update(
    place: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    name = f"nan-{where}"
    original = loop.summed_loss
    count = {"calls": 0}

    def poisoned(base, examples):  # type: ignore[no-untyped-def]
        loss, labels = original(base, examples)
        count["calls"] += 1
        if count["calls"] == 15:  # the first pass of step 8
            if where == "loss":
                return loss * float("nan"), labels
            loss.register_hook(lambda g: g * float("inf"))
        return loss, labels

    monkeypatch.setattr(loop, "summed_loss", poisoned)
    with pytest.raises(NonFiniteError, match="step 8"):
        in_process(place, name)
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
    with pytest.raises(RunError, match="data"):
        run_training(
            build_config(stored, {"data": {"path": str(changed)}}),
            Terminal(as_json=True),
            resume=run,
        )


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
