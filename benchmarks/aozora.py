"""`python -m benchmarks.aozora`: five works train a tiny GPT-2 whole, then LoRA on a sixth.

Loss on the held-out end of the sixth work before and after LoRA, beside full fine-tuning of the
same model on the same rows. Everything goes through the product: cp932 files in, folders out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import record
from tsugiki.config import build_config
from tsugiki.models.hub import sprout_folder
from tsugiki.models.load import load_tokenizer, resolve_model
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal

WORKS = record.SHARED / "text" / "aozora"
SIXTH = "1567_ruby_4948.txt"  # Dazai, Run, Melos!


def gpt2_folder(folder: Path) -> Path:
    """A GPT-2 of 4 layers × 128 with fresh weights and sprout's tokenizer."""
    tokenizer = load_tokenizer(resolve_model(None))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(tokenizer), n_embd=128, n_layer=4, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sprout_folder() / name, folder / name)
    return folder


def run(output: Path, model: Path, data: Path, method: str, **train: object) -> tuple[float, float]:
    """Train through the product; held-out loss before and after (best)."""
    config = build_config(
        {
            "output": output,
            "model": {"name": str(model)},
            "data": {"path": data, "max_length": 128, "eval_ratio": 0.1},
            "lora": {"r": 8, "targets": "all-linear"},
            "train": {"method": method, **train},
        }
    )
    result = run_training(config, Terminal())
    assert result is not None
    assert result.first_held_out is not None
    assert result.best_loss is not None
    return result.first_held_out, result.best_loss


def main() -> bool:
    """Measure, print, record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=float, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        base = gpt2_folder(place / "base")
        five = place / "five"
        five.mkdir()
        for work in sorted(WORKS.glob("*.txt")):
            if work.name != SIXTH:
                shutil.copy(work, five / work.name)
        start, grown = run(
            place / "grown", base, five, "full", epochs=arguments.epochs, learning_rate=1e-3,
            batch_size=8, gradient_accumulation_steps=1,
        )  # fmt: skip
        model = place / "grown" / "model"
        sixth = WORKS / SIXTH
        before, lora = run(place / "lora", model, sixth, "lora", epochs=6)
        _, full = run(place / "full", model, sixth, "full", epochs=6, learning_rate=3e-4)
    figures = {
        "five works, full: held-out loss from fresh weights": start,
        "five works, full: held-out loss after": grown,
        "sixth work: held-out end before": before,
        "sixth work: after LoRA": lora,
        "sixth work: after full fine-tuning": full,
        "LoRA's gain": before - lora,
        "share of the full gain": (before - lora) / max(before - full, 1e-9),
    }
    for key, value in figures.items():
        print(f"{value:9.4f}  {key}")
    bounds = {"LoRA's gain": ">= 0.02"}
    command = f"python -m benchmarks.aozora --epochs {arguments.epochs:g}"
    return record.write("aozora", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
