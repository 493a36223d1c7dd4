"""How fast this machine multiplies: the rates behind a step's floor. Knows no model and no step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsugiki.kernels.backend import compiled_bodies
from tsugiki.kernels.products import tiles_for_codes


def product_rates(
    out: int, width: int, tokens: int, clock: Callable[[], float], seconds: float = 1.0
) -> list[float]:
    """FLOP/s of several products (T, in)·(in, out) and (T, out)·(out, in), warm: torch's, and ours
    where there are any."""
    tokens = min(tokens, max(128, 400_000_000 // (2 * out)))
    x = torch.randn(tokens, width).bfloat16()
    w = torch.randn(out, width).bfloat16()
    y, back = torch.randn(tokens, out).bfloat16(), torch.empty(tokens, width).bfloat16()
    rates: list[float] = []
    runs: list[Callable[[], object]] = [
        lambda: torch.mm(x, w.T, out=y),
        lambda: torch.mm(y, w, out=back),
    ]
    own = compiled_bodies(x, "tiles")
    if own is not None and width % 32 == out % 32 == 0:
        runs += [
            lambda: own.multiply(x, w, None, y, add=False),
            lambda: own.multiply(y, w.T, None, back, add=False),
        ]
    until = clock() + seconds
    while len(rates) < 6 or clock() < until:
        for run_product in runs:
            began = clock()
            run_product()
            rates.append(2 * tokens * out * width / (clock() - began))
    return rates


def best_int8_rate(
    out: int, width: int, tokens: int, clock: Callable[[], float], seconds: float = 1.0
) -> float:
    """The best of int8 codes, torch's with int32 sums or ours, without what makes codes."""
    tokens = min(tokens, max(128, 400_000_000 // (2 * out)))
    x = torch.randint(-127, 128, (tokens, width), dtype=torch.int8)
    w = torch.randint(-127, 128, (out, width), dtype=torch.int8)
    y = torch.empty(tokens, out, dtype=torch.int32)
    runs: list[Callable[[], object]] = [lambda: torch._int_mm(x, w.T, out=y)]
    scale, real = torch.ones(tokens, 1), torch.empty(tokens, out).bfloat16()
    own = tiles_for_codes(x, real)
    if own is not None:
        runs.append(lambda: own.multiply_codes(x, w, scale, None, None, real, add=False))
    best, rounds, until = 0.0, 0, clock() + seconds
    while rounds < 3 or clock() < until:
        rounds += 1
        for run_product in runs:
            began = clock()
            run_product()
            best = max(best, 2 * tokens * out * width / (clock() - began))
    return best
