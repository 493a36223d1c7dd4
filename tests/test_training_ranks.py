"""Two ranks over gloo do the steps of one process with twice the passes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from families import tiny_model
from runs import adapter, forked, in_process, make_place, own_cache
from safetensors.torch import load

from tsugiki.adapters.attach import attach
from tsugiki.config import LoraConfig, build_config, read_yaml
from tsugiki.errors import RunError
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal
from tsugiki.training import metrics
from tsugiki.training.checkpoint import checkpoints
from tsugiki.training.ranks import ranks
from tsugiki.training.simple import train

STEPS = 11  # the ninth ends the epoch of 36 rows
# Six rows, four in a step: every second step is short, and one rank has nothing to do.
ROWS = [([4 + i, 9, 20 + i, 30], [-100] * (1 + i % 3) + [9, 20 + i, 30][i % 3 :]) for i in range(6)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and a whole run."""
    folder = tmp_path_factory.mktemp("ranks")
    make_place(folder, forked)
    return folder


def one_rank(rank: int, place: Path) -> None:
    """What each of two processes does; rank 0 alone writes."""
    os.environ["TSUGIKI_CACHE"] = own_cache(place / f"cache{rank}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{place}/store", rank=rank, world_size=2)
    with open(place / f"rank{rank}.txt", "w") as told:
        losses = short_training(gradient_accumulation_steps=1)
        told.write(" ".join(map(repr, losses)))
    in_process(place, "two", **settings(gradient_accumulation_steps=1))
    in_process(place, "dropout", max_steps=STEPS, save_every=4)
    dist.barrier()
    if rank == 0:
        (place / "dropout.first").write_bytes(adapter(place / "dropout"))
        for step, path in checkpoints(place / "dropout" / "checkpoints"):
            if step == STEPS:
                (path / "state.json").write_text("damaged")
    dist.barrier()
    in_process(place, "dropout", resume=True)
    dist.destroy_process_group()


def settings(**train: object) -> dict[str, object]:
    return {"max_steps": STEPS, "save_every": 100, "lora": {"dropout": 0.0}, **train}


def short_training(gradient_accumulation_steps: int) -> list[float]:
    model = tiny_model("llama")
    attach(model, LoraConfig(r=2), generator=torch.Generator().manual_seed(0))
    return train(
        model, ROWS, steps=5, learning_rate=1e-2, batch_size=2,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """The same folder after two ranks have run in it."""
    warm.ready()
    both = [warm.CONTEXT.Process(target=one_rank, args=(rank, place)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    return place


def test_two_ranks_are_one_with_twice_the_passes(two: Path) -> None:
    """The curve and the adapter; each line once, written by rank 0."""
    in_process(two, "one", **settings(gradient_accumulation_steps=2))
    curves = []
    for name in ("one", "two"):
        lines = metrics.read(two / name)
        assert [x["step"] for x in lines if x["kind"] == "train"] == list(range(1, STEPS + 1))
        curves.append([x["loss"] for x in lines])
    assert curves[0][0] == curves[1][0]
    assert len(curves[0]) == len(curves[1])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-5
    one, both = load(adapter(two / "one")), load(adapter(two / "two"))
    for name, tensor in one.items():
        assert float((tensor - both[name]).norm()) <= 1e-4 * float(tensor.norm()), name


def test_the_plain_api_too(two: Path) -> None:
    """Labels are summed over ranks: rows have one to three of them."""
    first, second = ((two / f"rank{n}.txt").read_text().split() for n in range(2))
    assert first == second, "both ranks know the whole step's loss"
    alone = short_training(gradient_accumulation_steps=2)
    assert [float(x) for x in first] == pytest.approx(alone, abs=1e-5)


def test_two_ranks_resume_to_the_same_bytes(two: Path) -> None:
    """With dropout: each rank's own random state is kept. One process may not go on with it."""
    assert adapter(two / "dropout") == (two / "dropout.first").read_bytes()
    segments = {x["segment"] for x in metrics.read(two / "dropout")}
    assert len(segments) == 2
    stored = build_config(read_yaml(two / "dropout" / "config.yaml"))
    with pytest.raises(RunError, match="ranks: 2"):
        run_training(stored, Terminal(as_json=True), resume=two / "dropout")


def test_alone_it_is_rank_0_of_1() -> None:
    alone = ranks(torch.device("cpu"))
    assert (alone.rank, alone.world, alone.first, alone.sum(3.5)) == (0, 1, True, 3.5)
    assert alone.share((1, 2, 3)) == (1, 2, 3)
