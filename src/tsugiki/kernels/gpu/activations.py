"""Triton bodies of a feed-forward block's activation: one pass forward, one pass backward.

Computed in fp32 and rounded once. The backward pass may write over the gradient that it reads: each
program has read its part before it writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


@triton.jit
def _value_and_slope(e, KIND: tl.constexpr):
    """act(e) and act'(e) in fp32."""
    if KIND == 0:
        gate = 1.0 / (1.0 + tl.exp(-e))
        return e * gate, gate * (1.0 + e * (1.0 - gate))
    elif KIND == 1:  # e·Φ(e)
        below = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        return e * below, below + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
    else:  # e·(1 + tanh(u))/2, and (1 + tanh(u))/2 = 1/(1 + exp(-2u))
        u = 0.7978845608028654 * (e + 0.044715 * e * e * e)
        half = 1.0 / (1.0 + tl.exp(-2.0 * u))
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * e * e)
        return e * half, half + 2.0 * e * half * (1.0 - half) * slope


@triton.jit
def _gate(e, g, h, N, et, gt, KIND: tl.constexpr, GATED: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    inside = columns < N
    x = tl.load(e + row * et + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(x, KIND)
    if GATED:
        value *= tl.load(g + row * gt + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + row * N + columns, value, mask=inside)


def activates(activation: str) -> bool:
    """Whether this activation has a body here."""
    return activation in KINDS


def gate(e: Tensor, g: Tensor | None, activation: str) -> Tensor:
    """act(e)·g (T, m); e and g may be halves of one matrix."""
    count, width = e.shape
    h = torch.empty(count, width, dtype=e.dtype, device=e.device)
    _gate[(count, triton.cdiv(width, BLOCK))](
        e, e if g is None else g, h, width, e.stride(0), (e if g is None else g).stride(0),
        KIND=KINDS[activation], GATED=g is not None, B=BLOCK, num_warps=4,
    )  # fmt: skip
    return h


@triton.jit
def _gate_back(
    grad, e, g, h, grad_e, grad_g, N, dt, et, gt, ht, et_out, gt_out,
    KIND: tl.constexpr, GATED: tl.constexpr, AGAIN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    inside = columns < N
    d = tl.load(grad + row * dt + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(e + row * et + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(x, KIND)
    if GATED:
        y = tl.load(g + row * gt + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_g + row * gt_out + columns, d * value, mask=inside)
        d *= y
        value *= y
    if AGAIN:
        tl.store(h + row * ht + columns, value, mask=inside)
    tl.store(grad_e + row * et_out + columns, d * slope, mask=inside)


def gate_back(
    grad: Tensor,
    e: Tensor,
    g: Tensor | None,
    activation: str,
    h: Tensor | None,
    grad_e: Tensor,
    grad_g: Tensor | None,
) -> None:
    """From dh (T, m): dE and dG (which may be dh itself), and h again where it has a place."""
    count, width = e.shape
    unused = grad_e
    gate_in, again = unused if g is None else g, unused if h is None else h
    gate_out = unused if grad_g is None else grad_g
    _gate_back[(count, triton.cdiv(width, BLOCK))](
        grad, e, gate_in, again, grad_e, gate_out, width, grad.stride(0), e.stride(0),
        gate_in.stride(0), again.stride(0), grad_e.stride(0), gate_out.stride(0),
        KIND=KINDS[activation], GATED=g is not None, AGAIN=h is not None, B=BLOCK, num_warps=4,
    )  # fmt: skip
