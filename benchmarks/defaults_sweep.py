"""`python -m benchmarks.defaults_sweep`: what bare `tsugiki train` reaches of the best of a sweep.

For each base, data set, number of rows and seed: the chosen defaults run through the real pipeline;
beside them the same command with `--learning-rate` and `--epochs` on the same rows, split and
batches: all rates for one epoch, for two the best rate and its neighbours, for four and eight the
best and its better neighbour (`--full` runs every rate; a whole grid costs two and a half times as
much). The sweep's best is chosen by validation loss, and both are compared on test rows. Each run
is added to results/defaults_sweep.jsonl as it ends, one that diverged without losses, so that the
sweep may be stopped and continued anywhere; the summary is over what is whole there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.real_data import SETS
from tsugiki.adapters.storage import load_adapter
from tsugiki.config import build_config
from tsugiki.data.dataset import prepare
from tsugiki.data.example import Example
from tsugiki.data.formats import read_rows
from tsugiki.errors import NonFiniteError
from tsugiki.models.load import load_base
from tsugiki.pipelines import Session, prepare_session, run_prepared
from tsugiki.terminal import Terminal
from tsugiki.training.objective import held_out_loss

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
EPOCHS = [1, 2, 4, 8]
RUNS = record.RESULTS / "defaults_sweep.jsonl"
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


Cell = tuple[str, str, int, int]  # base, data set, rows asked, seed
Run = dict[str, Any]


def cells(runs: list[Run]) -> dict[Cell, list[Run]]:
    """The runs by what they were trained on."""
    groups: dict[Cell, list[Run]] = defaultdict(list)
    for one in runs:
        groups[one["base"], one["data"], one["asked rows"], one["seed"]].append(one)
    return groups


def next_run(runs: list[Run], *, full: bool) -> tuple[float, int] | None:
    """Rate and epochs to try after these runs of the sweep; None where it is whole."""
    done = {(run["rate"], run["epochs"]) for run in runs}
    for epochs in EPOCHS:
        before = [run for run in runs if run["epochs"] < epochs and run["test"] is not None]
        for rate in near(before) if before and not full else RATES:
            if (rate, epochs) not in done:
                return rate, epochs
    return None


def near(runs: list[Run]) -> list[float]:
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


class Test:
    """Test rows as one base reads them, and its loss on them; read for the first run of a cell."""

    def __init__(self, file: Path, columns: Any) -> None:
        self.file, self.columns = file, columns
        self.rows: list[Example] = []
        self.before = math.nan

    def after(self, session: Session, adapter: Path) -> float:
        """Loss of the base with an adapter."""
        base = load_base(session.resolved, dtype=session.decisions.torch_dtype)
        if not self.rows:
            rows = read_rows(self.file, columns=self.columns)
            made = prepare(rows, session.chat, max_length=session.spec.context, eval_ratio=0)
            self.rows = made.train[:TEST_ROWS]
            self.before = held_out_loss(base, self.rows)
        load_adapter(base.model, adapter)
        return held_out_loss(base, self.rows)


def sweep(cell: Cell, runs: list[Run], folder: Path, *, full: bool) -> Iterator[Run]:
    """The runs of one choice of rows that are not among `runs`, the defaults first."""
    base, data, count, seed = cell
    train_file, test_file, options = SETS[data]
    lines = train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    begin = seed * count if (seed + 1) * count <= len(lines) else 0
    rows = folder / "rows.jsonl"
    rows.write_text("".join(lines[begin : begin + count]), encoding="utf-8")
    test = Test(test_file, options.get("columns"))
    fixed = {"seed": seed, "sample_prompt": ["Hello"]}
    known = {"base": base, "data": data, "asked rows": count, "seed": seed}
    known["rows"] = len(lines[begin : begin + count])
    asked: tuple[float, int] | None = None
    swept = [one for one in runs if not one["default"]]
    default = len(swept) == len(runs)  # still to run
    while default or (asked := next_run(swept, full=full)):
        chosen = {} if default else dict(zip(("learning_rate", "epochs"), asked or (), strict=True))
        values = {"model": {"name": BASES[base]}, "data": {"path": rows, **options}}
        values["train"] = {**fixed, **chosen}
        found: Run = {**known, "default": default}
        began = time.monotonic()
        try:
            terminal = Terminal(as_json=True)
            config = build_config({**values, "output": folder / "run"})
            session = prepare_session(config, terminal, None)
            ended = run_prepared(session, folder / "run", terminal)[1]
            after = test.after(session, ended.adapter)
        except NonFiniteError:
            if not asked:
                raise
            found |= {"rate": asked[0], "epochs": asked[1], "valid": None, "test": None}
        else:
            train = session.plan.config.train
            found |= {"rate": train.learning_rate, "epochs": train.epochs}
            found |= {"before": test.before, "valid": ended.best_loss, "test": after}
            found |= {"dtype": session.decisions.dtype}
        shutil.rmtree(folder / "run", ignore_errors=True)
        if not default:
            swept.append(found)
        default = False
        yield {**found, "seconds": time.monotonic() - began}


def summary(runs: list[Run]) -> bool:
    """Share of the sweep's improvement by base, data and rows; printed and recorded."""
    groups: dict[str, list[tuple[Run, Run]]] = defaultdict(list)
    for cell, group in sorted(cells(runs).items()):
        swept = [one for one in group if not one["default"]]
        default = [one for one in group if one["default"]]
        if not default or next_run(swept, full=False):
            print(f"not whole yet: {cell}, {len(group)} runs")
            continue
        best = min((one for one in swept if one["valid"] is not None), key=lambda one: one["valid"])
        groups[f"{cell[0]}, {cell[1]}, {default[0]['rows']} rows"].append((default[0], best))
    figures: dict[str, float] = {}
    details = {}
    for name, pairs in sorted(groups.items()):
        gained = statistics.mean(default["before"] - default["test"] for default, _ in pairs)
        possible = statistics.mean(default["before"] - best["test"] for default, best in pairs)
        figures[name] = gained / possible
        details[name] = {
            "seeds": len(pairs), "before": statistics.mean(one["before"] for one, _ in pairs),
            "default": statistics.mean(one["test"] for one, _ in pairs),
            "best": statistics.mean(one["test"] for _, one in pairs),
            "default rate and epochs": [pairs[0][0]["rate"], pairs[0][0]["epochs"]],
            "best rates and epochs": [[one["rate"], one["epochs"]] for _, one in pairs],
        }  # fmt: skip
        print(f"{100 * figures[name]:6.1f} %  {name} ({len(pairs)} seeds)")
    bounds = dict.fromkeys(figures, f">= {ENOUGH}")
    command = "python -m benchmarks.defaults_sweep"
    return record.write("defaults_sweep", command, figures, bounds, cells=details)


def read() -> list[Run]:
    """All runs on record."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.exists() else []
    return [json.loads(line) for line in lines]


def main() -> bool:
    """Run what is asked and not yet there, then sum up."""
    parser = argparse.ArgumentParser(description="defaults against a sweep")
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--rows", nargs="*", type=int, default=[100, 300, 3000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="every rate for every number of epochs")
    parser.add_argument("--again", action="store_true", help="forget the runs done before")
    arguments = parser.parse_args()
    if arguments.again:
        RUNS.unlink(missing_ok=True)
    for count, seed, base, data in itertools.product(
        arguments.rows, range(arguments.seeds), arguments.bases, arguments.sets
    ):
        if base.startswith("grown") and not (GROWN / "config.json").exists():
            grow()
        cell = (base, data, count, seed)
        with tempfile.TemporaryDirectory() as temporary:
            done = cells(read())[cell]
            for found in sweep(cell, done, Path(temporary), full=arguments.full):
                with RUNS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)
    return summary(read())


if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    sys.exit(0 if main() else 1)
