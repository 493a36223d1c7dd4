"""Grows sprout, the embedded base: `python tools/grow_sprout.py`.

A small Llama trained from nothing on `sprout_corpus.py`, drawn fresh while it trains, with Muon for
the matrices (Jordan et al. 2024) and bf16 arithmetic over fp32 masters. The head is computed where
an answer or a document is predicted and for a share of what users say, since random words teach
little. Short windows first, the full context at the end; attention and memory are tsugiki's own,
half as fast again as transformers' on a CPU. A second phase, with fresh optimisers and data, is at
full context only. The same flags and seed give the same batches. The model card is written by
`sprout_baselines.py`. Knows nothing of adapters.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sprout_corpus import dialogue, render
from sprout_documentation import documentation, documentation_words, package_documentation
from sprout_tokenizer import CONTEXT, make_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tsugiki.device import keep_pages
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import use_flat_attention

FOLDER = Path(__file__).parent.parent / "src" / "tsugiki" / "models" / "sprout"
SHARD = 500_000  # tokens that one worker makes at a time
DOCUMENT_SHARE = 0.42  # of a shard's tokens; the documentation is small and comes often
ASKED_SHARE = 0.15  # of the tokens that a user says are predicted
SHORT = 256  # window until most of the training is done
LONG_FROM = 0.85  # then the full context

_tokenizer: PreTrainedTokenizerBase
_documents: list[list[int]]
_known: list[str]


def begin_worker(folder: str, packages: bool) -> None:
    """Each worker reads the corpus once: the standard library's documentation, or packages'."""
    global _tokenizer, _documents, _known
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _tokenizer = AutoTokenizer.from_pretrained(folder)
    end = _tokenizer.convert_tokens_to_ids("<|endoftext|>")
    texts = package_documentation() if packages else list(documentation(held_out=False))
    _documents = [[*ids, end] for ids in _tokenizer(texts, add_special_tokens=False)["input_ids"]]
    _known = documentation_words()


def make_shard(seed: int) -> np.ndarray:
    """About half a million tokens: documents and dialogues in random order."""
    rng = random.Random(f"shard {seed}")
    pieces: list[list[int]] = []
    total = 0
    while total < SHARD * DOCUMENT_SHARE:
        pieces.append(rng.choice(_documents))
        total += len(pieces[-1])
    while total < SHARD:
        texts = [render(dialogue(rng, _known)) for _ in range(2000)]
        for ids in _tokenizer(texts, add_special_tokens=False)["input_ids"]:
            pieces.append(ids)
            total += len(ids)
    rng.shuffle(pieces)
    return np.fromiter((i for piece in pieces for i in piece), dtype=np.uint16)


def build(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with fresh weights, two query heads of 32 for each key head."""
    heads = hidden // 32
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def answers_in(batch: torch.Tensor, roles: dict[str, int]) -> torch.Tensor:
    """(B, T) booleans: tokens of answers and documents, not of what a user says."""
    place = torch.arange(batch.shape[1], device=batch.device).expand_as(batch)
    asked = (batch == roles["<|user|>"]) | (batch == roles["<|system|>"])
    other = (batch == roles["<|assistant|>"]) | (batch == roles["<|endoftext|>"])
    last_asked = torch.where(asked, place, -1).cummax(1).values
    last_other = torch.where(other, place, -1).cummax(1).values
    return last_other >= last_asked


class CrossEntropy(torch.autograd.Function):
    """−log p of each target, (n,); the gradients of their mean are made chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """hidden (n, k), table (V, k), targets (n,)."""
        each = torch.empty(len(hidden), device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_table = torch.zeros_like(table, dtype=torch.float32)
        for begin in range(0, len(hidden), 1024):
            rows = slice(begin, begin + 1024)
            logits, index = hidden[rows] @ table.T, targets[rows, None]
            for at in range(0, len(logits), 32):  # fp32 blocks that stay in cache
                part = slice(at, at + 32)
                p = logits[part].float().softmax(-1)
                each[rows][part] = -p.gather(1, index[part]).squeeze(1).log()
                p.scatter_add_(1, index[part], p.new_full((len(p), 1), -1.0))
                logits[part] = p.mul_(1 / len(hidden))
            grad_hidden[rows] = logits @ table
            grad_table += (logits.T @ hidden[rows]).float()
        ctx.save_for_backward(grad_hidden, grad_table.to(table.dtype))
        return each

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Of the mean, whatever weights come in."""
        return (*ctx.saved_tensors, None)


class Masters:
    """fp32 copies of bf16 parameters, with Muon on matrices and AdamW on the rest."""

    def __init__(self, model: LlamaForCausalLM, rate: float) -> None:
        self.low = list(model.parameters())
        self.high = [p.detach().float().clone().requires_grad_() for p in self.low]
        embedding = model.get_input_embeddings().weight
        hidden = [
            h
            for p, h in zip(self.low, self.high, strict=True)
            if p.dim() == 2 and p is not embedding
        ]
        rest = [h for h in self.high if not any(h is x for x in hidden)]
        self.rate = rate
        self.optimizers = [
            torch.optim.Muon(hidden, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.01),
        ]

    def step(self, share_of_rate: float) -> None:
        """Update from the gradients of the bf16 parameters, then round into them."""
        for low, high in zip(self.low, self.high, strict=True):
            high.grad = None if low.grad is None else low.grad.float()
            low.grad = None
        torch.nn.utils.clip_grad_norm_(self.high, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share_of_rate
            optimizer.step()
        with torch.no_grad():
            for low, high in zip(self.low, self.high, strict=True):
                low.copy_(high)


def stream(number: int, folder: Path, packages: bool) -> Iterator[np.ndarray]:
    """Shards without end, made by other processes in a fixed order."""
    workers = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(
        workers, initializer=begin_worker, initargs=(str(folder), packages)
    ) as pool:
        waiting: deque[Any] = deque()
        while True:
            while len(waiting) < workers + 1:
                waiting.append(pool.apply_async(make_shard, (number,)))
                number += 1
            yield waiting.popleft().get()


def grow(arguments: argparse.Namespace) -> None:
    """Train and write the model folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_pages()
    out = out_of(arguments)
    out.mkdir(parents=True, exist_ok=True)
    if (FOLDER / "tokenizer.json").exists() and not arguments.new_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if out.resolve() != FOLDER.resolve():
                shutil.copyfile(FOLDER / name, out / name)
    else:
        tokenizer = make_tokenizer(arguments.seed)
        tokenizer.save_pretrained(out)
    torch.manual_seed(arguments.seed)
    if arguments.grown:
        model = LlamaForCausalLM.from_pretrained(arguments.grown)
    else:
        model = build(tokenizer, arguments.hidden, arguments.layers)
    model = model.to(device, torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    use_flat_attention(model)
    curve: list[dict[str, float]] = []
    if not arguments.grown:
        phase = Phase(arguments.tokens, arguments.rate, LONG_FROM, arguments.stop)
        run(model, tokenizer, phase, arguments, curve)
    if arguments.then:
        run(
            model,
            tokenizer,
            Phase(arguments.then, arguments.rate / 2, 0, second=True),
            arguments,
            curve,
        )


@dataclass(frozen=True)
class Phase:
    """One schedule: millions of tokens, peak rate, share before windows get long, last step.

    The second reads packages' documentation: the library's is small, and known by heart by then.
    """

    tokens: float
    rate: float
    long_from: float
    stop: int | None = None
    second: bool = False


def run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    arguments: argparse.Namespace,
    curve: list[dict[str, float]],
) -> None:
    """Train through one phase, adding to `curve`, saving every few minutes and at its end."""
    device = model.device
    torch.manual_seed(arguments.seed)
    roles = {
        token: tokenizer.convert_tokens_to_ids(token)
        for token in ("<|user|>", "<|system|>", "<|assistant|>", "<|endoftext|>")
    }
    masters = Masters(model, phase.rate)
    per_step = arguments.batch * SHORT
    total = math.ceil(phase.tokens * 1e6 / per_step)
    last = min(phase.stop or total, total)
    # the second phase's shards are never those of the first
    number = (arguments.seed << 20) + (phase.second << 19)
    shards = stream(number, out_of(arguments), phase.second)
    rest = next(shards)
    start, saved = time.monotonic(), time.monotonic()
    before = curve[-1] if curve else {"step": 0, "tokens": 0, "seconds": 0.0}
    step = 0
    while step < last:
        while len(rest) < per_step:
            rest = np.concatenate([rest, next(shards)])
        flat = torch.from_numpy(rest[:per_step].astype(np.int64)).to(device)
        rest = rest[per_step:]
        batch = flat.view(-1, CONTEXT if step >= phase.long_from * total else SHORT)
        step += 1
        known = answers_in(batch, roles)[:, 1:]
        chosen = known | (torch.rand(known.shape, device=device) < ASKED_SHARE)
        windows = ForwardBatch((batch.shape[1],) * len(batch))
        hidden = model.model(
            input_ids=flat[None], position_ids=windows.positions(device), use_cache=False,
            tsugiki_batch=windows,
        ).last_hidden_state.view(*batch.shape, -1)  # fmt: skip
        each = CrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden[:, :-1][chosen], model.get_output_embeddings().weight, batch[:, 1:][chosen]
        )
        loss = each.mean()
        loss.backward()
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        masters.step(min(1.0, step / 50) * (0.03 + 0.97 * cosine))
        if step % arguments.log_every == 0 or step == last:
            entry = {
                "step": before["step"] + step,
                "tokens": before["tokens"] + step * per_step,
                "loss": round(float(loss.detach()), 4),
                "answers": round(float(each.detach()[known[chosen]].mean()), 4),
                "seconds": round(before["seconds"] + time.monotonic() - start, 1),
            }
            curve.append(entry)
            print(json.dumps(entry), flush=True)
        if time.monotonic() - saved > 180 or step == last:
            saved = time.monotonic()
            write(model, tokenizer, arguments, curve)


def out_of(arguments: argparse.Namespace) -> Path:
    """The folder being written."""
    return Path(arguments.output)


def write(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    curve: list[dict[str, float]],
) -> None:
    """The model folder as it is now, and how it came to be."""
    out, device = out_of(arguments), model.device.type
    model.save_pretrained(out)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    record = {
        "command": " ".join(["python tools/grow_sprout.py", *sys.argv[1:]]),
        "tokens": curve[-1]["tokens"] if curve else 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": arguments.seed,
        "machine": torch.cuda.get_device_name(0)
        if device == "cuda"
        else f"{os.cpu_count()} CPU cores",
        "seconds": curve[-1]["seconds"] if curve else 0,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "curve": curve[:: max(1, len(curve) // 40)] + curve[-1:],
    }
    (out / "growth.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Parse and grow."""
    parser = argparse.ArgumentParser(description="grow the embedded base")
    parser.add_argument("--tokens", type=float, default=36, help="millions of tokens")
    parser.add_argument("--stop", type=int, help="end after so many steps of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--then", type=float, help="millions of tokens at full context after it")
    parser.add_argument("--grown", help="a folder with the first phase's weights: only --then")
    parser.add_argument("--new-tokenizer", action="store_true")
    parser.add_argument("--output", default=str(FOLDER))
    grow(parser.parse_args())


if __name__ == "__main__":
    main()
