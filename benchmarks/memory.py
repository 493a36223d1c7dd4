"""`python -m benchmarks.memory`: the planner's prediction of memory against what a run took.

Real runs of `tsugiki train` on random weights, each in a fresh process, over shapes, lengths,
ranks, few-bit storage and checkpointing; predicted bytes against the process's highest resident
size. Also a run under --max-memory, and the storage of the frozen projections against bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parent.parent
STEPS = 3
# shape, layers (None: all), vocabulary (None: the shape's), rows, tokens of a row, and what differs
GRID: tuple[tuple[str, int | None, int | None, int, int, dict[str, Any]], ...] = (
    ("qwen2.5-0.5b", 4, 32768, 2, 128, {}),
    ("qwen2.5-0.5b", 4, 32768, 2, 512, {}),
    ("qwen2.5-0.5b", 4, 32768, 4, 512, {}),
    ("qwen2.5-0.5b", 4, 32768, 1, 2048, {}),
    ("qwen2.5-0.5b", 4, 32768, 2, 512, {"quantize": "nf4"}),
    ("qwen2.5-0.5b", 4, 32768, 2, 512, {"quantize": "int8", "r": 64}),
    ("qwen2.5-0.5b", 4, 32768, 4, 512, {"checkpointing": "always"}),
    ("qwen2.5-0.5b", 4, 32768, 1, 2048, {"checkpointing": "always", "quantize": "nf4"}),
    ("qwen2.5-0.5b", 4, 32768, 2, 256, {"dtype": "float32"}),
    ("smollm2-135m", 8, None, 2, 512, {}),
    ("smollm2-135m", 8, None, 2, 1024, {"quantize": "nf4", "r": 8}),
    ("gpt2-medium", 4, None, 2, 512, {}),
    ("gpt2-medium", 4, None, 2, 512, {"quantize": "nf4"}),
    ("gemma3-1b", 3, 32768, 2, 512, {}),
    ("heads-of-80", 6, None, 2, 512, {}),
    ("qwen2.5-0.5b", None, None, 2, 512, {}),
    ("qwen2.5-0.5b", None, None, 2, 512, {"quantize": "nf4"}),
)
LIMITED = ("qwen2.5-0.5b", 4, 32768, 4, 512, {"max_memory": "1150MB"})


def main() -> bool:
    """Every case in its own process; print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="the first N cases, without a record")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        print("RESULT " + json.dumps(run(json.loads(asked.worker))), flush=True)
        return True
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for case in GRID[: asked.only]:
            result = fresh_process(case, Path(temporary))
            result["ratio"] = sum(result["predicted"].values()) / result["peak"]
            rows.append(result)
            needed, held = sum(result["predicted"].values()) / 1e6, result["peak"] / 1e6
            print(
                f"{result['ratio']:6.3f}  {needed:6.0f} MB predicted, {held:6.0f} MB held"
                f"  {result['name']}",
                flush=True,
            )
        if asked.only:
            return True
        limited = fresh_process(LIMITED, Path(temporary))
    errors = [abs(row["ratio"] - 1) for row in rows]
    figures["worst error of the prediction"] = max(errors)
    figures["mean error of the prediction"] = sum(errors) / len(errors)
    figures["peak / --max-memory"] = limited["peak"] / 1.15e9
    figures["checkpointing was chosen under --max-memory"] = float(limited["checkpointing"])
    four = next(row for row in rows if row["quantize"] == "nf4" and "all layers" in row["name"])
    figures["frozen projections, nf4 / bf16"] = four["projections"] / four["projections_16"]
    figures["peak of the 0.5B shape in GB, LoRA"] = rows[-2]["peak"] / 1e9
    figures["peak of the 0.5B shape in GB, QLoRA"] = rows[-1]["peak"] / 1e9
    bounds = {
        "worst error of the prediction": "<= 0.1",
        "peak / --max-memory": "<= 1",
        "frozen projections, nf4 / bf16": "<= 0.3",
    }
    return record.write(
        "memory", "python -m benchmarks.memory", figures, bounds, rows=[*rows, limited]
    )


def fresh_process(case: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """Train once; what was predicted and what was held."""
    shape, layers, vocab, rows, length, more = case
    given = {"shape": shape, "layers": layers, "vocab": vocab, "rows": rows, "length": length,
             "folder": str(folder), **more}  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"]
    done = subprocess.run(
        [*command, "--worker", json.dumps(given)],
        capture_output=True, text=True, check=False, env=env, cwd=ROOT,
    )  # fmt: skip
    found = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not found:
        sys.exit(f"{given} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(found[-1].removeprefix("RESULT "))
    named = ", ".join(f"{key} {value}" for key, value in more.items())
    depth = f"{layers} layers" if layers else "all layers"
    result["name"] = f"{shape}, {depth}, {rows} × {length}{', ' * bool(named)}{named}"
    return dict(result)


def run(case: dict[str, Any]) -> dict[str, Any]:
    """In the process of its own: make the model if it is not there, train, look."""
    folder = Path(case["folder"])
    model = folder / f"{case['shape']}-{case['layers']}-{case['vocab']}"
    if not model.exists():
        # in another process still, so that making the weights does not count
        pid = os.fork()
        if pid == 0:
            make_model_folder(model, case)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    from tsugiki.config import build_config
    from tsugiki.pipelines import prepare_session, run_prepared
    from tsugiki.planning import projection_bytes
    from tsugiki.terminal import Terminal

    with tempfile.TemporaryDirectory(dir=folder) as temporary, \
            contextlib.redirect_stdout(io.StringIO()):  # fmt: skip
        text = Path(temporary) / "rows.txt"
        text.write_text("A cat, a dog and the sun. " * (case["length"] * case["rows"] * STEPS))
        config = build_config(
            {
                "output": Path(temporary) / "run",
                "model": {"name": str(model), "dtype": case.get("dtype", "bfloat16"),
                          "quantize": case.get("quantize", "none")},
                "data": {"path": text, "max_length": case["length"], "long": "split",
                         "eval_ratio": 0, "train_on": "everything"},
                "lora": {"r": case.get("r", 16), "dropout": 0.05},
                "train": {"max_steps": STEPS, "batch_size": case["rows"],
                          "gradient_accumulation_steps": 1,
                          "gradient_checkpointing": case.get("checkpointing", "auto"),
                          "max_memory": case.get("max_memory")},
            }
        )  # fmt: skip
        terminal = Terminal(as_json=True)
        session = prepare_session(config, terminal, None)
        run_prepared(session, Path(temporary) / "run", terminal)
    quantize = session.plan.config.model.quantize
    small, large = projection_bytes(session.spec, quantize, session.decisions)
    return {
        "predicted": session.plan.memory,
        "peak": highest_resident(),
        "quantize": quantize,
        "checkpointing": session.plan.config.train.gradient_checkpointing == "always",
        "projections": small,
        "projections_16": large,
    }


def make_model_folder(folder: Path, case: dict[str, Any]) -> None:
    """Random weights of a shape in bf16, with the embedded base's tokenizer."""
    import torch

    from benchmarks.shapes import SHAPES, make_config, make_model
    from tsugiki.models.hub import sprout_folder

    config = make_config(SHAPES[case["shape"]], case["layers"], case["vocab"])
    make_model(config, torch.bfloat16).save_pretrained(folder)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (sprout_folder() / name).is_file():
            shutil.copyfile(sprout_folder() / name, folder / name)


def highest_resident() -> int:
    """Bytes: the most this process ever held, files that it mapped included."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it forked
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
