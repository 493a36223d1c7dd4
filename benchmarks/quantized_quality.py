"""`python -m benchmarks.quantized_quality`: what few-bit storage of the base costs in quality.

stories260K on gsm8k in bf16: the same rows, start, order, rate and budget on the 16-bit base, on
NF4 with double quantisation and on int8 by rows; test-split loss before and after, several seeds.
The gap is relative to the improvement that LoRA on the 16-bit base makes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from tsugiki.config import build_config
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import read_rows
from tsugiki.models.load import load_base
from tsugiki.pipelines import prepare_session, run_prepared
from tsugiki.terminal import Terminal
from tsugiki.training.objective import held_out_loss

MODEL = record.SHARED / "models" / "stories260K"
ROWS = record.SHARED / "chat" / "gsm8k"
METHODS = ("none", "nf4", "int8")
TEST_ROWS = 300
STEP_ROWS = 8


def losses(quantize: str, steps: int, rate: float, seed: int) -> tuple[float, float]:
    """Test loss (nats per label) after training on the base kept so; before as well on seed 0."""
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        config = build_config(
            {
                "output": folder,
                "model": {"name": str(MODEL), "dtype": "bfloat16", "quantize": quantize},
                "data": {"path": ROWS / "train.jsonl", "eval_ratio": 0, "max_length": 512},
                "lora": {"r": 8},
                "train": {"max_steps": steps, "epochs": 100, "batch_size": STEP_ROWS, "seed": seed,
                          "gradient_accumulation_steps": 1, "learning_rate": rate},
            }
        )  # fmt: skip
        session = prepare_session(config, terminal, None)
        rows = read_rows(ROWS / "test.jsonl")
        test = prepare(rows, session.chat, max_length=512, eval_ratio=0).train[:TEST_ROWS]
        dtype = session.decisions.torch_dtype
        before = math.nan
        if seed == 0:
            untrained = load_base(session.resolved, dtype=dtype, quantize=quantize)
            before = held_out_loss(untrained, test)
        base, _ = run_prepared(session, folder, terminal)
        return before, held_out_loss(base, test)


def main() -> bool:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    bounds: dict[str, str] = {}
    runs: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for seed in range(asked.seeds):
        for method in METHODS:
            runs[method].append(losses(method, asked.steps, asked.rate, seed))
            print(f"SEED {seed} {method}: {runs[method][-1]}", flush=True)
    for method, found in runs.items():
        name = "bf16" if method == "none" else method
        figures[f"{name}: before"] = found[0][0]
        figures[f"{name}: after"] = statistics.mean(after for _, after in found)
    improvement = figures["bf16: before"] - figures["bf16: after"]
    figures["bf16: improvement"] = improvement
    bounds["bf16: improvement"] = ">= 1"
    for method in METHODS[1:]:
        gap = (figures[f"{method}: after"] - figures["bf16: after"]) / improvement
        figures[f"{method}: gap / improvement"] = gap
        bounds[f"{method}: gap / improvement"] = "<= 0.03"
        pairs = zip(runs[method], runs["none"], strict=True)
        figures[f"{method}: worst seed's gap"] = max(
            (q - p) / improvement for (_, q), (_, p) in pairs
        )
    for key, value in figures.items():
        print(f"{value:9.4f}  {key}")
    command = (
        f"python -m benchmarks.quantized_quality --steps {asked.steps} --seeds {asked.seeds} "
        f"--rate {asked.rate:g}"
    )
    return record.write("quantized_quality", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
