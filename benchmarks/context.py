"""`python -m benchmarks.context`: what a token costs at contexts from 512 to 8,192 tokens.

Two rows of measurements on layers of Qwen2.5-0.5B's shape, in turn: as many tokens in a step, in
longer and longer documents, where only attention may cost more; and more and more documents of 512,
where nothing may. Attention is timed alone at the same shapes and taken off. Knows no peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from benchmarks import record
from benchmarks.contestants import ours, random_rows
from benchmarks.shapes import SHAPES, make_config, make_model
from tsugiki.device import keep_pages
from tsugiki.kernels.attention import packed_attention
from tsugiki.kernels.batch import ForwardBatch

SHAPE = SHAPES["qwen2.5-0.5b"]
LAYERS, VOCAB = 2, 8192
LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = 8192
MORE = 1.05  # noise of a shared machine


def attention_alone(lengths: tuple[int, ...]) -> float:
    """Seconds of one layer's attention, forward and backward, over these documents."""
    heads, kv = SHAPE.config["num_attention_heads"], SHAPE.config["num_key_value_heads"]
    width, tokens = SHAPE.config["hidden_size"] // heads, sum(lengths)
    q, k, v = (torch.randn(1, n, tokens, width, dtype=torch.bfloat16, requires_grad=True)
               for n in (heads, kv, kv))  # fmt: skip
    batch = ForwardBatch(lengths)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        out = packed_attention(q, k, v, batch, scale=width**-0.5)
        out.backward(torch.ones_like(out))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> bool:
    """Measure in turn, print, record."""
    parser = argparse.ArgumentParser(description="cost per token against context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_pages()
    config = make_config(SHAPE, LAYERS, VOCAB)
    model = make_model(config, torch.bfloat16)
    whole = [(TOKENS // length, length) for length in LENGTHS]
    short = [(count, 512) for count in (4, 8, 16)]
    cases = list(dict.fromkeys(whole + short))
    steps = {}
    for number, (count, length) in enumerate(cases):
        again = model if number == 0 else make_model(config, torch.bfloat16)
        steps[count, length], _ = ours("ours-dry", again, SHAPE, random_rows(VOCAB, count, length))
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    alone: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for turn in range(options.rounds + 1):
        for case, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first is warm-up
                seconds[case].append(time.perf_counter() - began)
                alone[case].append(LAYERS * attention_alone((case[1],) * case[0]))
    table = {}
    for case in cases:
        tokens = case[0] * case[1]
        step, attention = (statistics.median(x[case]) / tokens * 1e6 for x in (seconds, alone))
        table[f"{case[0]} x {case[1]}"] = {"step": step, "attention": attention}
        print(f"{case[0]:3d} × {case[1]:5d}: {step:7.1f} µs a token, attention {attention:7.1f}, "
              f"the rest {step - attention:7.1f}", flush=True)  # fmt: skip
    rest = {name: row["step"] - row["attention"] for name, row in table.items()}
    figures = {
        "the rest, context 8,192 / 512": rest["1 x 8192"] / rest["16 x 512"],
        "a step's token, 16 documents / 4": table["16 x 512"]["step"] / table["4 x 512"]["step"],
        "attention, context 8,192 / 512": table["1 x 8192"]["attention"]
        / table["16 x 512"]["attention"],
    }
    bounds = dict.fromkeys(list(figures)[:2], f"<= {MORE}")
    return record.write(
        "context", "python -m benchmarks.context", figures, bounds,
        microseconds_per_token=table, layers=LAYERS, vocabulary=VOCAB,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
