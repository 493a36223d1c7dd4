"""Triton body of the head's softmax: loss a row, and logits turned into their gradient in place.

Two passes over a row of logits in the type that they have; sums in fp32, so that the target's
p - 1 is taken before rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _capped(x, scale, cap, CAP: tl.constexpr):
    """The model's logits of W·h, in fp32."""
    x = x.to(tl.float32) * scale
    if CAP:  # c·tanh(x / c)
        x = cap - 2.0 * cap / (1.0 + tl.exp(2.0 * x / cap))
    return x


@triton.jit
def _softmax(
    logits, targets, losses, V, lt, scale, cap, factor,
    CAP: tl.constexpr, GRAD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * lt
    target = tl.load(targets + row)
    picked = _capped(tl.load(line + target), scale, cap, CAP)
    best = -float("inf")
    total = 0.0
    for begin in range(0, V, B):
        columns = begin + tl.arange(0, B)
        inside = columns < V
        x = _capped(tl.load(line + columns, mask=inside, other=0.0), scale, cap, CAP)
        x = tl.where(inside, x, -float("inf"))
        higher = tl.maximum(best, tl.max(x, axis=0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(x - higher), axis=0)
        best = higher
    tl.store(losses + row, tl.log(total) + best - picked)
    if GRAD:
        for begin in range(0, V, B):
            columns = begin + tl.arange(0, B)
            inside = columns < V
            x = _capped(tl.load(line + columns, mask=inside, other=0.0), scale, cap, CAP)
            slope = tl.exp(x - best) / total
            slope = tl.where(columns == target, slope - 1.0, slope)
            if CAP:
                slope *= 1.0 - (x / cap) * (x / cap)
            tl.store(line + columns, slope * (scale * factor), mask=inside)


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    factor: float,
    needs: bool,
) -> tuple[Tensor, None]:
    """−log p(target) of each row (n,), fp32, and nothing apart; logits (n, V) are W·h.

    With `needs` they become factor · d loss / d (W·h). p is the softmax of scale·logits, or of
    c·tanh(scale·logits / c) with a cap.
    """
    assert logits.stride(1) == 1
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(BLOCK, triton.next_power_of_2(vocab))
        _softmax[(rows,)](
            logits, targets, losses, vocab, logits.stride(0), scale, softcap or 1.0, factor,
            CAP=softcap is not None, GRAD=needs, B=block, num_warps=8,
        )  # fmt: skip
    return losses, None
