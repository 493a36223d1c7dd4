"""`python -m benchmarks.defaults_sweep`: what bare `tsugiki train` reaches of the best of a sweep.

For each base, data set, number of rows and seed: the chosen defaults run through the real pipeline;
beside them the same command with `--learning-rate` and `--epochs` on the same rows, split and
batches: all rates for one epoch, for two the best rate and its neighbours, for four and eight the
best and its better neighbour (`--full` runs every rate; a whole grid costs two and a half times as
much). A rate that diverges has no run. The sweep's best is chosen by validation loss, and both are
compared on test rows. Each cell is added to results/defaults_sweep.jsonl as it is done, so that the
sweep may be stopped and continued; the summary is over all cells found there.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.real_data import SETS
from tsugiki.adapters.storage import load_adapter
from tsugiki.config import build_config
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import read_rows
from tsugiki.errors import NonFiniteError
from tsugiki.models.load import load_base
from tsugiki.pipelines import Session, prepare_session, run_prepared
from tsugiki.terminal import Terminal
from tsugiki.training.events import TrainResult
from tsugiki.training.objective import held_out_loss

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
EPOCHS = [1, 2, 4, 8]
CELLS = record.RESULTS / "defaults_sweep.jsonl"
GROWN = Path.home() / ".cache" / "tsugiki" / "grown-384"
BASES = {
    "stories260K": str(record.SHARED / "models" / "stories260K"),
    "sprout": None,
    "grown at hidden 384": str(GROWN),
}
TEST_ROWS = 100
ENOUGH = 0.8


def grow() -> None:
    """The third base, by the same tool as sprout, wider and shorter trained."""
    tool = record.RESULTS.parent.parent / "tools" / "grow_sprout.py"
    command = [sys.executable, "-W", "ignore", str(tool), "--hidden", "384", "--layers", "3",
               "--tokens", "3", "--seed", "1", "--output", str(GROWN)]  # fmt: skip
    subprocess.run(command, check=True)


def near(runs: list[dict[str, float]]) -> list[float]:
    """Which rates to try with more epochs: the one that validates best with the most epochs so far
    and its neighbours, after two steps only the better neighbour."""
    most = max(run["epochs"] for run in runs)
    last = {run["rate"]: run["valid"] for run in runs if run["epochs"] == most}
    best = min(last, key=lambda rate: last[rate])
    place = RATES.index(best)
    beside = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate != best]
    if most > 1:
        beside = sorted(beside, key=lambda rate: last.get(rate, math.inf))[:1]
    return sorted([best, *beside])


def run(
    values: dict[str, Any], test_file: Path, folder: Path
) -> tuple[Session, TrainResult, float, float]:
    """One run of the pipeline: how it was planned and ended, test loss before and after it."""
    terminal = Terminal(as_json=True)
    session = prepare_session(build_config({**values, "output": folder}), terminal, None)
    result = run_prepared(session, folder, terminal)[1]
    test_rows = read_rows(test_file, columns=values["data"].get("columns"))
    test = prepare(test_rows, session.chat, max_length=session.spec.context, eval_ratio=0).train
    base = load_base(session.resolved, dtype=session.decisions.torch_dtype)
    before = held_out_loss(base, test[:TEST_ROWS])
    load_adapter(base.model, result.adapter)
    return session, result, before, held_out_loss(base, test[:TEST_ROWS])


def cell(
    base_name: str, data: str, count: int, seed: int, folder: Path, *, full: bool
) -> dict[str, Any]:
    """Default and sweep on one choice of rows."""
    train_file, test_file, options = SETS[data]
    lines = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    begin = seed * count if (seed + 1) * count <= len(lines) else 0
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines[begin : begin + count]), encoding="utf-8")
    train = {"seed": seed, "sample_prompt": ["Hello"]}
    values = {"model": {"name": BASES[base_name]}, "data": {"path": rows, **options}}
    began = time.monotonic()
    session, _, before, default = run({**values, "train": train}, test_file, folder / "run")
    seconds = time.monotonic() - began
    chosen = session.plan.config.train
    runs: list[dict[str, float]] = []
    for epochs in EPOCHS:
        for rate in near(runs) if runs and not full else RATES:
            asked = {**train, "learning_rate": rate, "epochs": epochs}
            place = folder / f"{rate:g}-{epochs}"
            try:
                _, ended, _, after = run({**values, "train": asked}, test_file, place)
            except NonFiniteError:
                continue
            assert ended.best_loss is not None, "100 rows and more hold some out"
            runs.append({"rate": rate, "epochs": epochs, "valid": ended.best_loss, "test": after})
            shutil.rmtree(place)
    best = min(runs, key=lambda run: run["valid"])
    return {
        "base": base_name, "data": data, "rows": len(lines[begin : begin + count]), "seed": seed,
        "before": before, "default": default, "best": best["test"],
        "default rate": chosen.learning_rate, "default epochs": chosen.epochs,
        "best rate": best["rate"], "best epochs": best["epochs"],
        "seconds": {"default": seconds, "sweep": time.monotonic() - began - seconds},
        "dtype": session.decisions.dtype, "runs": runs,
    }  # fmt: skip


def summary(cells: list[dict[str, Any]]) -> bool:
    """Share of the sweep's improvement by base, data and rows; printed and recorded."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in cells:
        groups[f"{one['base']}, {one['data']}, {one['rows']} rows"].append(one)
    figures: dict[str, float] = {}
    details = {}
    for name, group in sorted(groups.items()):
        gained = statistics.mean(one["before"] - one["default"] for one in group)
        possible = statistics.mean(one["before"] - one["best"] for one in group)
        figures[name] = gained / possible
        details[name] = {
            "seeds": len(group), "before": statistics.mean(one["before"] for one in group),
            "default": statistics.mean(one["default"] for one in group),
            "best": statistics.mean(one["best"] for one in group),
            "default rate and epochs": [group[0]["default rate"], group[0]["default epochs"]],
            "best rates and epochs": [[one["best rate"], one["best epochs"]] for one in group],
        }  # fmt: skip
        print(f"{100 * figures[name]:6.1f} %  {name} ({len(group)} seeds)")
    bounds = dict.fromkeys(figures, f">= {ENOUGH}")
    command = "python -m benchmarks.defaults_sweep"
    return record.write("defaults_sweep", command, figures, bounds, cells=details)


def main() -> bool:
    """Run what is asked and not yet there, then sum up."""
    parser = argparse.ArgumentParser(description="defaults against a sweep")
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--rows", nargs="*", type=int, default=[100, 300, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="every rate for every number of epochs")
    parser.add_argument("--again", action="store_true", help="forget the cells done before")
    arguments = parser.parse_args()
    if arguments.again:
        CELLS.unlink(missing_ok=True)
    done = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    known = {(c["base"], c["data"], c["asked rows"], c["seed"]) for c in done}
    for count in arguments.rows:
        for seed in range(arguments.seeds):
            for name in arguments.bases:
                if name.startswith("grown") and not (GROWN / "config.json").exists():
                    grow()
                for data in arguments.sets:
                    if (name, data, count, seed) in known:
                        continue
                    with tempfile.TemporaryDirectory() as temporary:
                        found = cell(name, data, count, seed, Path(temporary), full=arguments.full)
                    found["asked rows"] = count
                    done.append(found)
                    with CELLS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
                    print(json.dumps({k: v for k, v in found.items() if k != "runs"}), flush=True)
    return summary(done)


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    sys.exit(0 if main() else 1)
