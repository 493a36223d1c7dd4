"""`python -m benchmarks.context`: what a token costs at contexts from 512 to 8,192 tokens.

Two rows of measurements on layers of Qwen2.5-0.5B's shape, in turn: as many tokens in a step, in
longer and longer documents, where only attention may cost more; and more and more documents of 512,
where nothing may. Attention is timed within the very steps, both ways. Knows no peers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.contestants import ours, random_rows
from benchmarks.shapes import SHAPES, make_config, make_model
from tsugiki.device import keep_pages
from tsugiki.kernels.attention import packed_attention
from tsugiki.models import tuned

SHAPE = SHAPES["qwen2.5-0.5b"]
LAYERS, VOCAB = 1, 8192
LENGTHS = (1024, 2048, 4096)
TOKENS = 8192
MORE = 1.05  # noise of a shared machine


class Attention:
    """packed_attention as the model calls it, with the seconds that it took, forward and back."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        """Backward lies between the gradient of the result and those of q, k and v."""
        self._begin()
        out = packed_attention(q, k, v, *rest, **more)
        self._end()
        if out.requires_grad:
            out.register_hook(self._begin)  # type: ignore[no-untyped-call]
            for x in (q, k, v):
                x.register_hook(self._end)  # type: ignore[no-untyped-call]
        return out

    def _begin(self, _: Tensor | None = None) -> None:
        self.began = time.perf_counter()

    def _end(self, _: Tensor | None = None) -> None:
        now = time.perf_counter()
        self.seconds += now - self.began
        self.began = now


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    """Of each pair's first to its second."""
    return statistics.median(a / b for a, b in pairs)


def main() -> bool:
    """Measure in turn, print, record."""
    parser = argparse.ArgumentParser(description="cost per token against context")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_pages()
    config = make_config(SHAPE, LAYERS, VOCAB)
    model = make_model(config, torch.bfloat16)
    # those whose ratio is taken next to each other: the machine's speed drifts
    cases = [(1, TOKENS), (TOKENS // 512, 512), (4, 512), (8, 512)]
    cases += [(TOKENS // length, length) for length in LENGTHS]
    steps = {}
    for number, (count, length) in enumerate(cases):
        again = model if number == 0 else make_model(config, torch.bfloat16)
        steps[count, length], _ = ours("ours-dry", again, SHAPE, random_rows(VOCAB, count, length))
    seconds: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    attention = Attention()
    vars(tuned)["packed_attention"] = attention  # the proven attention modules call it
    for turn in range(options.rounds + 1):
        for case, step in steps.items():
            attention.seconds, began = 0.0, time.perf_counter()
            step()
            assert attention.seconds, "attention is what was timed"
            if turn:  # the first is warm-up
                seconds[case].append((time.perf_counter() - began, attention.seconds))
    table = {}
    for case in cases:
        micro = 1e6 / (case[0] * case[1])
        step, inside = (statistics.median(x) * micro for x in zip(*seconds[case], strict=True))
        table[f"{case[0]} x {case[1]}"] = {"step": step, "attention": inside}
        print(f"{case[0]:3d} × {case[1]:5d}: {step:7.1f} µs a token, attention {inside:7.1f}, "
              f"the rest {step - inside:7.1f}", flush=True)  # fmt: skip
    long, short, few = seconds[1, TOKENS], seconds[16, 512], seconds[4, 512]
    rests = [[(a - b) / n for a, b in seconds[n, 512]] for n in (4, 8, 16)]
    usual = [16 * statistics.mean(turn) for turn in zip(*rests, strict=True)]
    figures = {  # of runs that follow one another
        "the rest, context 8,192 / 512": median_ratio(
            [(a - b, c) for (a, b), c in zip(long, usual, strict=True)]
        ),
        "a step's token, 16 documents / 4": median_ratio(
            [(a / 16, b / 4) for (a, _), (b, _) in zip(short, few, strict=True)]
        ),
        "attention, context 8,192 / 512": median_ratio(
            [(a, b) for (_, a), (_, b) in zip(long, short, strict=True)]
        ),
    }
    bounds = dict.fromkeys(list(figures)[:2], f"<= {MORE}")
    return record.write(
        "context", "python -m benchmarks.context", figures, bounds,
        microseconds_per_token=table, layers=LAYERS, vocabulary=VOCAB,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
