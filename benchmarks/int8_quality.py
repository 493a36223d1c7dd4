"""`python -m benchmarks.int8_quality`: what --compute int8 costs in quality, on stories260K.

The same rows, start and order with bf16 and with int8 products (at the level that each run's own
proof takes); both adapters are then loaded on the bf16 base and scored on test rows. At width 64
`tsugiki train` would say that int8 is not faster and keep bf16, so the decision is made here. One
result file for each set of rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.real_data import MODEL, SETS
from tsugiki.adapters.storage import load_adapter
from tsugiki.config import build_config
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import read_rows
from tsugiki.errors import RunError
from tsugiki.models.int8 import LEVELS
from tsugiki.models.load import load_base
from tsugiki.pipelines import prepare_session, run_prepared
from tsugiki.terminal import Terminal
from tsugiki.training import metrics
from tsugiki.training.objective import held_out_loss

DATA = ("gsm8k", "wikisql")
RATE, RANK, TEST_ROWS = 1e-3, 8, 300
KINDS = ("bf16", "int8")


def compare(name: str, steps: int, seed: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Test losses before and after both runs, and the int8 run's proofs; no 'int8' if refused."""
    train_file, test_file, options = SETS[name]
    terminal = Terminal(as_json=True)
    losses, proofs = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in KINDS:
            folder = Path(temporary) / kind
            config = build_config(
                {
                    "output": folder,
                    "model": {"name": str(MODEL), "dtype": "bfloat16"},
                    "data": {"path": train_file, **options, "eval_ratio": 0, "max_length": 512},
                    "lora": {"r": RANK},
                    "train": {"max_steps": steps, "epochs": 100, "batch_size": 16, "seed": seed,
                              "gradient_accumulation_steps": 1, "learning_rate": RATE,
                              "sample_prompt": ["-"]},
                }
            )  # fmt: skip
            session = prepare_session(config, terminal, None)
            decisions = dataclasses.replace(session.decisions, compute=kind)
            session = dataclasses.replace(session, decisions=decisions)
            try:
                _, result = run_prepared(session, folder, terminal)
            except RunError as refusal:
                print(refusal, flush=True)
                return losses, proofs
            proofs += [line for line in metrics.read(folder) if line["kind"] == "gradients"]
            rows = read_rows(test_file, **options)  # type: ignore[arg-type]
            test = prepare(rows, session.chat, max_length=512, eval_ratio=0).train[:TEST_ROWS]
            base = load_base(session.resolved, dtype=torch.bfloat16)
            losses["before"] = held_out_loss(base, test)
            load_adapter(base.model, result.adapter)
            losses[kind] = held_out_loss(base, test)
    return losses, proofs


def _short(proof: dict[str, Any]) -> dict[str, Any]:
    """For the result file: of what was taken, 'cosine, ratio of norms' by tensor."""
    kept = {key: proof[key] for key in ("step", "what", "taken", "note", "missed")}
    if proof["taken"]:
        pairs = proof["tensors"].items()
        kept["tensors"] = {name: f"{cosine:.5f}, {ratio:.4f}" for name, (cosine, ratio) in pairs}
    return kept


def measure(name: str, steps: int, seeds: int) -> bool:
    """Every seed on one set of rows, recorded; whether the bounds hold."""
    figures: dict[str, float] = {}
    bounds: dict[str, str] = {}
    runs: list[dict[str, Any]] = []
    gaps, gains, medians, lowest, refused = [], [], [], [], 0
    for seed in range(seeds):
        losses, proofs = compare(name, steps, seed)
        runs.append({"seed": seed, "losses": losses, "proofs": [_short(proof) for proof in proofs]})
        if "int8" not in losses:
            refused += 1
            continue
        gains.append(losses["before"] - losses["bf16"])
        gaps.append((losses["int8"] - losses["bf16"]) / gains[-1])
        taken = [line for line in proofs if line["taken"]]
        cosines = [[c for c, _ in line["tensors"].values()] for line in taken]
        medians += [statistics.median(values) for values in cosines]
        lowest += [min(values) for values in cosines]
        levels = [LEVELS.index(line["what"]) for line in taken]
        print(f"{name} seed {seed}: {losses}, gap {gaps[-1]:+.2%}, levels {levels}", flush=True)
    key = "runs that were refused"
    figures[key], bounds[key] = refused, "== 0"
    if gaps:
        key = "bf16's improvement (nats)"
        figures[key], bounds[key] = statistics.mean(gains), ">= 0.5"
        key = "worst gap to bf16 as a share of it"
        figures[key], bounds[key] = max(abs(gap) for gap in gaps), "<= 0.03"
        figures["mean gap as a share of it"] = statistics.mean(gaps)
        key = "lowest median cosine of a run's proofs"
        figures[key], bounds[key] = min(medians), ">= 0.998"
        key = "lowest cosine of any tensor"
        figures[key], bounds[key] = min(lowest), ">= 0.98"
    command = f"python -m benchmarks.int8_quality --data {name} --steps {steps} --seeds {seeds}"
    return record.write(f"int8_quality_{name}", command, figures, bounds, runs=runs)


def main() -> bool:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", choices=DATA, help="default: both, one after the other")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    names = [asked.data] if asked.data else DATA
    held = [measure(name, asked.steps, asked.seeds) for name in names]
    return all(held)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
