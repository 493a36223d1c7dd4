"""Real rows end to end: `tsugiki train` beside TRL's SFTTrainer, fresh processes in turn.

    python -m benchmarks.rows --set gsm8k [--shape qwen2.5-0.5b] [--layers 24] [--json]

The same rows, random weights, adapter, rate, batch and number of steps. TRL runs with its own
defaults (bf16, checkpointing on) and again with checkpointing off. A step's time is the median
over all but the first; both losses are printed, since faster must not mean another curve. Text
is cut by sprout's tokenizer. Knows no arithmetic of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parent.parent
CONTESTANTS = {
    "ours": "tsugiki train",
    "trl": "TRL SFTTrainer, its defaults: bf16, checkpointing",
    "trl-free": "TRL SFTTrainer, bf16, checkpointing off",
}
RANK, ALPHA, DROPOUT, RATE, BATCH = 16, 32, 0.05, 1e-3, 8
CHAT = record.SHARED / "chat"
FILES = {"wikisql": CHAT / "wikisql" / "train.jsonl", "gsm8k": CHAT / "gsm8k" / "train.jsonl"}


def prepare(options: argparse.Namespace, place: Path) -> None:
    """A model folder with random weights in bf16, and the rows that every contestant gets."""
    import torch

    from benchmarks.shapes import make_config, make_model
    from tsugiki.models.hub import sprout_folder

    shape = SHAPES[options.shape]
    model = make_model(make_config(shape, options.layers), torch.bfloat16)
    model.save_pretrained(place / "model")  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (sprout_folder() / name).exists():
            shutil.copy(sprout_folder() / name, place / "model" / name)
    lines = FILES[options.set].read_text(encoding="utf-8").splitlines()[: options.steps * BATCH]
    rows = []
    for line in lines:
        row = json.loads(line)
        if "text" in row:
            rows.append({"text": row["text"]})
        else:
            said = (("user", row["question"]), ("assistant", row["answer"]))
            rows.append({"messages": [{"role": r, "content": t} for r, t in said]})
    with open(place / "rows.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ours(place: Path, options: argparse.Namespace) -> list[tuple[float, float]]:
    """(seconds, loss) of each step, from the run's own events."""
    from tsugiki.config import build_config
    from tsugiki.pipelines import prepare_session
    from tsugiki.terminal import Terminal
    from tsugiki.training.events import Logged
    from tsugiki.training.loop import train

    config = build_config(
        {
            "output": place / f"run-{os.getpid()}",
            "model": {"name": str(place / "model"), "dtype": "bfloat16"},
            "data": {"path": place / "rows.jsonl", "eval_ratio": 0, "max_length": 1024},
            "lora": {"r": RANK, "alpha": ALPHA, "dropout": DROPOUT},
            "train": {"max_steps": options.steps, "batch_size": BATCH, "learning_rate": RATE,
                      "gradient_accumulation_steps": 1, "warmup_ratio": 0.0, "weight_decay": 0.0,
                      "scheduler": "linear", "log_every": 1, "save_every": 10**6,
                      "eval_every": 10**6, "sample_prompt": ["x"]},
        }
    )  # fmt: skip
    session = prepare_session(config, Terminal(as_json=True), None)
    from tsugiki.models.load import load_base

    base = load_base(session.resolved, dtype=session.decisions.torch_dtype)
    folder = session.plan.config.output
    assert folder is not None
    events = train(
        session.plan.config, session.decisions, base, session.prepared, session.chat, folder,
        total_steps=session.plan.steps,
    )  # fmt: skip
    steps, last = [], time.perf_counter()
    for event in events:
        now = time.perf_counter()
        if isinstance(event, Logged):
            steps.append((now - last, event.loss))
        last = now
    return steps


def trl(place: Path, options: argparse.Namespace, checkpointing: bool) -> list[tuple[float, float]]:
    """(seconds, loss) of each step, through TRL's own callback."""
    import datasets
    import peft
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    steps: list[tuple[float, float]] = []
    clock = {"begin": 0.0, "step": 0.0}

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock["begin"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock["step"] = time.perf_counter() - clock["begin"]

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                steps.append((clock["step"], logs["loss"]))

    rows = datasets.load_dataset("json", data_files=str(place / "rows.jsonl"), split="train")
    if "messages" in rows.column_names:
        rows = rows.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
            remove_columns=["messages"],
        )
    config = SFTConfig(
        output_dir=str(place / f"trl-{os.getpid()}"), max_steps=options.steps,
        per_device_train_batch_size=BATCH, learning_rate=RATE, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, max_length=1024, disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    adapter = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        model=str(place / "model"), args=config, train_dataset=rows, peft_config=adapter,
        callbacks=[Times()],
    )  # fmt: skip
    trainer.train()
    return steps


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant in this process."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    place = Path(options.place)
    name = options.worker
    steps = ours(place, options) if name == "ours" else trl(place, options, name == "trl")
    import resource

    third = max(1, len(steps) // 3)
    return {
        "step": statistics.median(seconds for seconds, _ in steps[1:]),
        "seconds": [seconds for seconds, _ in steps],
        "losses": [loss for _, loss in steps],
        "late_loss": statistics.mean(loss for _, loss in steps[-third:]),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run(name: str, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One contestant in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.rows", "--worker", name,
               "--place", str(place), "--steps", str(options.steps), "--set", options.set,
               "--threads", str(options.threads)]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1",
           "TSUGIKI_CACHE": str(place / "cache"), "HF_DATASETS_CACHE": str(place / "datasets"),
           "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert isinstance(result, dict)
    return result


def main() -> int:
    """All contestants in turn; the table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--set", choices=FILES, default="gsm8k")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--against", default="trl,trl-free")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", help="write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("RESULT " + json.dumps(work(options)), flush=True)
        return 0
    if not FILES[options.set].exists():
        print(f"left out: {options.set} needs ../shared/data", flush=True)
        return 0
    names = ["ours", *(name for name in options.against.split(",") if name)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        prepare(options, place)
        for turn in range(options.rounds):
            for name in names:
                runs[name].append(run(name, options, place))
                if not options.json:
                    last = runs[name][-1]
                    print(f"  round {turn + 1} {name}: {last['step']:.2f} s a step, late loss "
                          f"{last['late_loss']:.3f}", flush=True)  # fmt: skip
    report = summarise(runs, options)
    print(json.dumps(report, indent=1) if options.json else table(report))
    if options.record:
        command = f"python -m benchmarks.rows {' '.join(sys.argv[1:])}"
        record.write(options.record, command, report["ratios"], {}, report=report)
    return 0


def summarise(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians by contestant, and what the others take of our time."""
    rows = {
        name: {
            "what": CONTESTANTS[name],
            "step": statistics.median(s for r in results for s in r["seconds"][1:]),
            "first_loss": results[0]["losses"][0],
            "late_loss": statistics.mean(r["late_loss"] for r in results),
            "peak_rss": max(r["peak_rss"] for r in results),
        }
        for name, results in runs.items()
    }
    ratios = {f"{n}/ours": rows[n]["step"] / rows["ours"]["step"] for n in rows if n != "ours"}
    ratios |= {
        f"late loss ours - {n}": rows["ours"]["late_loss"] - rows[n]["late_loss"]
        for n in rows if n != "ours"
    }  # fmt: skip
    return {"shape": options.shape, "layers": options.layers, "set": options.set,
            "batch": BATCH, "steps": options.steps, "rows": rows, "ratios": ratios}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [f"{'':9s} {'step':>8s} {'first':>7s} {'late loss':>9s} {'peak RSS':>9s}"]
    for name, row in report["rows"].items():
        figures = f"{row['step']:7.2f}s {row['first_loss']:7.3f} {row['late_loss']:9.3f}"
        lines.append(f"{name:9s} {figures} {row['peak_rss'] / 1e9:7.2f}GB   {row['what']}")
    return "\n".join([*lines, *(f"{k} = {v:.2f}" for k, v in report["ratios"].items())])


if __name__ == "__main__":
    sys.exit(main())
