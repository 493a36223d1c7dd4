"""Attention of packed documents by compiled bodies, without a matrix of scores in memory: bf16 in
a CPU's tiles, fp32 in its vector registers.

What is kept for the way back are its inputs, its output and a number or two a query. Documents are
rows of the flat batch, as they lie. Heads that tiles do not divide into get columns of zeros, which
no score and no result notices. Knows no cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsugiki.kernels.backend import compiled_bodies
from tsugiki.kernels.cpu.attention import Documents, attend, attend_back
from tsugiki.kernels.cpu.tiles import SIDE

WIDEST = 256  # of a head: a block of queries and what belongs to it stay in a core's cache


FAMILIES = {torch.bfloat16: "tiles", torch.float32: "attention"}


def bodies_attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> bool:
    """Whether compiled bodies take these: bf16 or fp32, heads not too wide, sinks not trained."""
    return (
        not (sinks is not None and sinks.requires_grad and torch.is_grad_enabled())
        and q.dtype == k.dtype == v.dtype
        and q.dtype in FAMILIES
        and max(q.shape[-1], v.shape[-1]) <= WIDEST
        and compiled_bodies(q, FAMILIES[q.dtype]) is not None
    )


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Each token over itself and before, within its document.

    Args:
        q: (1, H, T, d).
        k, v: (1, Hkv, T, d), v perhaps of another d; Hkv divides H.
        lengths: of the documents, T in all.
        scale: factor on q·k.
        window: a token sees itself and window - 1 tokens before it.
        softcap: c·tanh(x / c) on the scores.
        sinks: (H,) a score per head that takes probability and gives nothing.

    Returns:
        (1, T, H, d) with v's d.

    Raises:
        MemoryError: no memory for one document's keys and values.
    """
    beside = None if sinks is None else sinks.detach().float().contiguous()
    how = Documents(torch.tensor(lengths), scale, window, softcap, beside)
    given = v.shape[-1]
    width = max(q.shape[-1], given)
    if q.dtype == torch.bfloat16:
        width = -(-width // SIDE) * SIDE
    q, k, v = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    out = _Fused.apply(q, k, v, how)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out[..., :given]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Documents) -> Tensor:
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        out, norms = attend(q[0], k[0], v[0], how)
        ctx.how = how
        ctx.save_for_backward(q, k, v, out, norms)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, norms = ctx.saved_tensors
        grad = grads[0][0].contiguous()
        found = attend_back(q[0], k[0], v[0], ctx.how, out, norms, grad)
        return (*(x.transpose(0, 1)[None] for x in found), None)
