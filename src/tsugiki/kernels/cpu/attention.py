"""Compiled attention as functions of tensors: bf16 in tiles (`attend*.cpp`), fp32 in vector
registers (`rows.cpp`).

Checks nothing that its callers know. Raises MemoryError where a thread finds no room for a
document. Knows no layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tsugiki.kernels.cpu.compiled import call


class Documents(NamedTuple):
    """How attention goes: lengths (n,) int64 of documents that lie end to end, a factor on scores,
    how many tokens each sees, c of c·tanh(x / c), and a score (H,) fp32 beside each head's own."""

    lengths: Tensor
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, how: Documents) -> tuple[Tensor, Tensor]:
    """Causal attention: q (H, T, d), k and v (Hkv, T, d), all bf16 and d in 32s, or all fp32 →
    (T, H, d), and for the way back bf16's log Σ e^score (1, H, T), fp32's largest score and
    1 / Σ e^(score - largest) (2, H, T)."""
    heads, tokens, width = q.shape
    norms = torch.empty(1 if q.dtype == torch.bfloat16 else 2, heads, tokens)
    out = q.new_empty(tokens, heads, width)
    _attention("attend", q, k, v, how, out, norms)
    return out, norms


def attend_back(
    q: Tensor, k: Tensor, v: Tensor, how: Documents, out: Tensor, norms: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (T, H, d), dk and dv (T, Hkv, d) of grad (T, H, d), contiguous; out and norms as
    `attend` gave them."""
    heads, tokens, width = q.shape
    grad_q = torch.empty_like(out)
    grad_k, grad_v = (out.new_empty(tokens, k.shape[0], width) for _ in range(2))
    parts = torch.empty(2, heads, tokens, width)
    _attention("attend_back", q, k, v, how, out, grad, norms, grad_q, grad_k, grad_v, *parts)
    return grad_q, grad_k, grad_v


def _attention(name: str, q: Tensor, k: Tensor, v: Tensor, how: Documents, *given: Tensor) -> None:
    heads, tokens, width = q.shape
    assert int(how.lengths.sum()) == tokens
    assert all(x.is_contiguous() for x in given)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    sizes = (len(how.lengths), heads, k.shape[0], width, tokens)
    limits = (float(how.scale), float(how.softcap or 0), how.window or 0, how.sinks)
    if not call(name, q, q, k, v, how.lengths, *sizes, *strides, *limits, *given):
        longest = int(how.lengths.max())
        raise MemoryError(f"no memory for attention over {longest} tokens")
