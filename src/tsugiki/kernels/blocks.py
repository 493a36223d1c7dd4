"""Causal attention of equal lengths by plain batched products: on a CPU faster than ATen's.

Query heads that share a key head are folded into the rows of one product, and a block of queries
meets only the keys up to its own end (or from its window's start), so that half of the products
and exponentials are never computed. Probabilities are kept for the backward pass where sequences
are short and computed again where they are long or capped. Knows no documents and no sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Queries of one block: fewer waste less above the diagonal, more make faster products.
BLOCK = 128
# Tokens: probabilities of longer sequences would outgrow all other activations.
KEEP = 768


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    keep: bool | None = None,
) -> Tensor:
    """Each token over itself and before.

    Args:
        q: (n, H, L, d).
        k, v: (n, Hkv, L, d) and (n, Hkv, L, dv); Hkv divides H.
        scale: factor on q·k.
        window: a token sees itself and window - 1 tokens before it.
        softcap: c·tanh(x / c) on the scores.
        keep: keep probabilities for the backward pass; by length when None.

    Returns:
        (n, L, H, dv)
    """
    if keep is None:
        keep = q.shape[2] <= KEEP
    keep = keep and softcap is None and torch.is_grad_enabled()
    out = _Blocks.apply(q, k, v, scale, window, softcap, keep)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def _spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries = end of keys, first key) of every block."""
    return [
        (at, min(at + BLOCK, length), 0 if window is None else max(0, at - window + 1))
        for at in range(0, length, BLOCK)
    ]


def _hidden(begin: int, end: int, first: int, window: int | None, like: Tensor) -> Tensor:
    """(end - begin, end - first) added to the scores: -inf where a query must not look."""
    rows = torch.arange(begin, end, device=like.device)[:, None]
    columns = torch.arange(first, end, device=like.device)[None]
    seen = columns <= rows
    if window is not None:
        seen &= columns > rows - window
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, float("-inf")
    )


def _fold(x: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """(n, H, L, d) → (n·Hkv, L·G, d), contiguous: the heads of one group become rows."""
    n, all_heads, length, d = x.shape
    groups = all_heads // heads
    grouped = x.view(n, heads, groups, length, d).transpose(2, 3)
    if scale is None:
        return grouped.reshape(n * heads, length * groups, d)
    out = torch.empty(n, heads, length, groups, d, dtype=x.dtype, device=x.device)
    return torch.mul(grouped, scale, out=out).view(n * heads, length * groups, d)


def _unfold(x: Tensor, n: int, heads: int, length: int) -> Tensor:
    """(n·Hkv, L·G, d) → (n, L, H, d)."""
    groups, d = x.shape[1] // length, x.shape[2]
    return x.view(n, heads, length, groups, d).transpose(1, 2).reshape(n, length, -1, d)


class _Blocks(torch.autograd.Function):
    """Scores are rounded to the inputs' type once, the softmax inside is fp32; gradients of keys
    and values are summed over blocks in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        keep: bool,
    ) -> Tensor:
        n, _, length, _ = q.shape
        heads = k.shape[1]
        groups = q.shape[1] // heads
        rows = _fold(q, heads, scale)
        keys, values = _fold(k, heads), _fold(v, heads)
        out = rows.new_empty(rows.shape[0], rows.shape[1], values.shape[2])
        kept = []
        for begin, end, first in _spans(length, window):
            weights, _ = _weights(
                rows, keys, (begin, end, first), groups, window, softcap, back=False
            )
            block = slice(begin * groups, end * groups)
            out[:, block] = torch.bmm(weights, values[:, first:end])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(rows, keys, values, *kept)
        ctx.scale, ctx.window, ctx.softcap = scale, window, softcap
        ctx.shape = (n, heads, length, groups)
        return _unfold(out, n, heads, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, *kept = ctx.saved_tensors
        n, heads, length, groups = ctx.shape
        grad_out = _fold(grads[0].transpose(1, 2), heads)
        grad_rows = torch.empty_like(rows)
        wide = torch.promote_types(keys.dtype, torch.float32)
        grad_keys = torch.zeros_like(keys, dtype=wide)
        grad_values = torch.zeros_like(values, dtype=wide)
        for index, (begin, end, first) in enumerate(_spans(length, ctx.window)):
            block = slice(begin * groups, end * groups)
            if kept:
                weights, slope = kept[index], None
            else:
                weights, slope = _weights(
                    rows, keys, (begin, end, first), groups, ctx.window, ctx.softcap, back=True
                )
            upstream = grad_out[:, block].contiguous()
            grad_values[:, first:end] += torch.bmm(weights.transpose(1, 2), upstream)
            scores = torch.bmm(upstream, values[:, first:end].transpose(1, 2))
            torch.ops.aten._softmax_backward_data.out(
                scores, weights, -1, scores.dtype, grad_input=scores
            )
            if slope is not None:
                scores *= slope
            grad_rows[:, block] = torch.bmm(scores, keys[:, first:end])
            grad_keys[:, first:end] += torch.bmm(
                scores.transpose(1, 2), rows[:, block].contiguous()
            )
        grad_q = grad_rows.view(n, heads, length, groups, -1).mul_(ctx.scale)
        return (
            grad_q.transpose(2, 3).reshape(n, heads * groups, length, -1),
            grad_keys.to(keys.dtype).view(n, heads, length, -1),
            grad_values.to(values.dtype).view(n, heads, length, -1),
            None,
            None,
            None,
            None,
        )


def _weights(
    rows: Tensor,
    keys: Tensor,
    span: tuple[int, int, int],
    groups: int,
    window: int | None,
    softcap: float | None,
    *,
    back: bool,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (n·Hkv, queries·G, keys) of one block; on the way back the slope of a cap."""
    begin, end, first = span
    scores = torch.bmm(rows[:, begin * groups : end * groups], keys[:, first:end].transpose(1, 2))
    slope = None
    if softcap is not None:
        scores.div_(softcap).tanh_()
        slope = scores.square().neg_().add_(1.0) if back else None
        scores *= softcap
    by_query = scores.view(scores.shape[0], end - begin, groups, end - first)
    if window is None:
        by_query[..., begin - first :] += _hidden(begin, end, begin, None, scores)[None, :, None]
    else:
        by_query += _hidden(begin, end, first, window, scores)[None, :, None]
    torch.ops.aten._softmax.out(scores, -1, False, out=scores)
    return scores, slope
