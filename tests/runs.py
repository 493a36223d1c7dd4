"""Tiny training runs for the tests: a folder with a model and rows, started in several ways."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import warm
from families import save_tiny
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki import files
from tsugiki.config import build_config, read_yaml
from tsugiki.files import cache_folder
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal
from tsugiki.training import metrics
from tsugiki.training.checkpoint import checkpoints

STEPS = 24
SAVE_EVERY = 3
# Between equal runs; the note of a proof tells how long it took.
UNEQUAL = {"seconds", "segment", "tokens_per_second", "memory_bytes", "note"}
FLAGS = [
    "--lora-r", "4", "--lora-dropout", "0.1", "--batch-size", "2", "--save-every", str(SAVE_EVERY),
    "--gradient-accumulation-steps", "2", "--max-steps", str(STEPS), "--eval-every", "6",
    "--log-every", "1", "--learning-rate", "3e-3", "--scheduler", "cosine", "--dtype", "float32",
]  # fmt: skip


class Running:
    """A command that was started, either way."""

    def __init__(self, process: subprocess.Popen[bytes] | warm.BaseProcess, errors: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.errors = errors

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """Its exit code once it has ended."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(timeout)
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    def said(self) -> str:
        """What it wrote to stderr."""
        return self.errors.read_text()


def make_place(folder: Path, start: Callable[..., Running] | None = None) -> None:
    """A model, rows, and an uninterrupted run (a real interpreter's, or started so)."""
    save_tiny("llama", folder / "model", tiny_tokenizer(CHATML))
    rng = random.Random(0)
    words = ["red", "blue", "cat", "dog", "tea", "sun"]
    with open(folder / "rows.jsonl", "w") as stream:
        for i in range(40):
            ask = " ".join(rng.choices(words, k=4)) + f" {i}"
            stream.write(json.dumps({"prompt": ask, "completion": ask[::-1]}) + "\n")
    finish((start or command)(folder, "whole"))


def command(folder: Path, output: str, *, resume: bool = False) -> Running:
    """`tsugiki train` as a user starts it."""
    errors = folder / f"{output}.stderr"
    with open(errors, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tsugiki", *_arguments(output, resume)],
            cwd=folder,
            env={**os.environ, **_environment(folder)},
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )
    return Running(process, errors)


def forked(
    folder: Path,
    output: str,
    *,
    resume: bool = False,
    first: Callable[[], None] | None = None,
    more: tuple[str, ...] = (),
) -> Running:
    """The same without the imports; `first` is done in it before all else. more: of a new run."""
    errors = folder / f"{output}.stderr"
    arguments = [*_arguments(output, resume), *(() if resume else more)]
    process = warm.begin(arguments, folder, errors, first, **_environment(folder))
    return Running(process, errors)


def _arguments(output: str, resume: bool) -> list[str]:
    start = ["--resume", output] if resume else ["rows.jsonl", "--model", "model"]
    return ["train", *start, *([] if resume else ["--output", output, *FLAGS])]


def _environment(folder: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "TSUGIKI_CACHE": own_cache(folder / "cache")}


def own_cache(folder: Path) -> str:
    """A cache for one test, but for the compiled kernels, which take seconds to build."""
    kernels = cache_folder("kernels")
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "kernels").symlink_to(kernels)
    return str(folder)


def finish(process: Running) -> None:
    """Wait for a good end."""
    assert process.wait(timeout=120) == 0, process.said()


def in_process(
    place: Path,
    output: str,
    resume: bool = False,
    lora: dict[str, object] | None = None,
    model: dict[str, object] | None = None,
    **train: object,
) -> None:
    """The same run without a process of its own, so that faults can be put into it."""
    run = place / output
    if resume:
        config = build_config(read_yaml(run / "config.yaml"))
        run_training(config, Terminal(as_json=True), resume=run)
        return
    stored = read_yaml(place / "whole" / "config.yaml")
    changes = {"output": str(run), "train": train, "lora": lora or {}, "model": model or {}}
    run_training(build_config(stored, changes), Terminal(as_json=True))


def adapter(run: Path) -> bytes:
    """The trained adapter."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def result(run: Path) -> dict[str, object]:
    """All that equal runs have in common at their ends, by name.

    The adapter; weights, optimiser, random states, place in the data and counters of the newest
    checkpoint; every line of the records but for times, memory and how often it was begun.
    """
    step, newest = checkpoints(run / "checkpoints")[0]
    state = files.read_json(newest / "state.json")
    return {
        "adapter": adapter(run),
        "step": step,
        "tensors": (newest / "tensors.safetensors").read_bytes(),
        "identity": state["identity"],
        "loader": state["loader"],
        "progress": _equal(state["progress"]),
        **{name: [_equal(line) for line in metrics.read(run, name)]
           for name in (metrics.METRICS, metrics.SAMPLES)},
    }  # fmt: skip


def _equal(record: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in record.items() if key not in UNEQUAL}


def steps_written(run: Path) -> int:
    """The last step in the run's records; -1 before there is one."""
    lines = files.read_lines(run / metrics.METRICS)
    return max((line["step"] for line in lines if line["kind"] == "train"), default=-1)
