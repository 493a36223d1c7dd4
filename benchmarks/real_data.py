"""`python -m benchmarks.real_data`: stories260K on wikisql, gsm8k and jcommonsenseqa, beside PEFT.

The same kept rows, start, order, rate and budget; loss on the whole test split before and after
(jcommonsenseqa: its valid file), three seeds.
PEFT runs in a plain torch loop over padded batches with the model's own attention.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import record
from tsugiki.adapters.attach import attach, lora_modules
from tsugiki.config import RunConfig, build_config
from tsugiki.data.dataset import prepare
from tsugiki.data.example import Example
from tsugiki.data.formats import read_rows
from tsugiki.data.loader import Loader
from tsugiki.pipelines import Session, prepare_session, run_prepared
from tsugiki.terminal import Terminal
from tsugiki.training.objective import by_tokens, held_out_loss
from tsugiki.training.schedule import learning_rate

MODEL = record.SHARED / "models" / "stories260K"
CHAT = record.SHARED / "chat"
SETS: dict[str, tuple[Path, Path, dict[str, object]]] = {
    "wikisql": (CHAT / "wikisql" / "train.jsonl", CHAT / "wikisql" / "test.jsonl", {}),
    "gsm8k": (CHAT / "gsm8k" / "train.jsonl", CHAT / "gsm8k" / "test.jsonl", {}),
    "jcommonsenseqa": (
        CHAT / "jcommonsenseqa" / "train.jsonl",
        CHAT / "jcommonsenseqa" / "valid.jsonl",
        {
            "prompt_template": "{question}\n"
            "{choice0} / {choice1} / {choice2} / {choice3} / {choice4}",
            "columns": {"answer": "choice[label]"},
        },
    ),
}


def make_config(data: dict[str, object], output: Path, steps: int, seed: int) -> RunConfig:
    """One run: rank 8 on all projections, 16 rows a step, no held-out rows taken from training."""
    return build_config(
        {
            "output": output,
            "model": {"name": str(MODEL), "dtype": "float32"},
            "data": {**data, "eval_ratio": 0, "max_length": 512},
            "lora": {"r": 8},
            "train": {"max_steps": steps, "epochs": 100, "batch_size": 16, "seed": seed,
                      "gradient_accumulation_steps": 1, "learning_rate": 5e-3},
        }
    )  # fmt: skip


def peft_loss(model: nn.Module, examples: Sequence[Example]) -> tuple[torch.Tensor, int]:
    """Summed cross entropy over labels of a padded batch, and how many there are."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.tensor([list(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    labels = torch.tensor([list(e.labels) + [-100] * (longest - len(e.ids)) for e in examples])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    target = labels[:, 1:].reshape(-1)
    loss = nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), target, reduction="sum"
    )
    return loss, int((target != -100).sum())


def peft_test_loss(model: nn.Module, examples: Sequence[Example]) -> float:
    """Mean nats per labelled token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for group in by_tokens(examples, 4096):
            loss, labels = peft_loss(model, group)
            total, count = total + float(loss), count + labels
    return total / count


def train_peft(session: Session, test: Sequence[Example]) -> float:
    """The session's run in PEFT and plain torch; test loss after."""
    config, settings = session.plan.config, session.plan.config.train
    shadow = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    attach(shadow, config.lora, generator=torch.Generator().manual_seed(settings.seed))
    mine = dict(lora_modules(shadow))
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    alpha = int(config.lora.resolved_alpha)
    peft_config = PeftConfig(r=config.lora.r, lora_alpha=alpha, target_modules=list(mine))
    model = get_peft_model(base, peft_config)
    with torch.no_grad():
        for path, module in mine.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(module.lora_A)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert settings.learning_rate is not None
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=settings.weight_decay or 0.0)
    loader = Loader(
        session.prepared.train, micro_batch=settings.batch_size or 1, accumulation=1,
        seed=settings.seed,
    )  # fmt: skip
    for step in range(1, session.plan.steps + 1):
        rate = learning_rate(
            step, session.plan.steps, settings.learning_rate, settings.warmup_ratio or 0.0,
            settings.scheduler or "constant",
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss, count = peft_loss(model, next(loader).passes[0])
        (loss / count).backward()
        nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
    return peft_test_loss(model, test)


def compare(name: str, steps: int, seed: int) -> dict[str, float]:
    """One data set, one seed: losses before, ours after, PEFT's after."""
    train_file, test_file, options = SETS[name]
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        config = make_config({"path": train_file, **options}, folder, steps, seed)
        session = prepare_session(config, terminal, None)
        rows = read_rows(test_file, **options)  # type: ignore[arg-type]
        test = prepare(rows, session.chat, max_length=512, eval_ratio=0).train
        plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        before = peft_test_loss(plain, test)
        base, _ = run_prepared(session, folder, terminal)
        return {
            "before": before,
            "ours": held_out_loss(base, test),
            "peft": train_peft(session, test),
        }


def main() -> bool:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    bounds: dict[str, str] = {}
    for name in SETS:
        runs = [compare(name, arguments.steps, seed) for seed in range(arguments.seeds)]
        gains = [(r["before"] - r["ours"], r["before"] - r["peft"]) for r in runs]
        figures[f"{name}: before"] = runs[0]["before"]
        figures[f"{name}: ours after"] = statistics.mean(r["ours"] for r in runs)
        figures[f"{name}: PEFT after"] = statistics.mean(r["peft"] for r in runs)
        figures[f"{name}: improvement"] = statistics.mean(a for a, _ in gains)
        figures[f"{name}: worst distance to PEFT's improvement"] = max(
            abs(a - b) / b for a, b in gains
        )
        bounds[f"{name}: improvement"] = ">= 1"
        bounds[f"{name}: worst distance to PEFT's improvement"] = "<= 0.01"
    for key, value in figures.items():
        print(f"{value:9.4f}  {key}")
    command = f"python -m benchmarks.real_data --steps {arguments.steps} --seeds {arguments.seeds}"
    return record.write("real_data", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
