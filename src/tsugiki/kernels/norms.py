"""RMSNorm and rotary embedding without wide temporaries.

Each keeps its input and a few numbers a row for the backward pass, computes in fp32 over row
blocks that stay in a core's cache, and rounds once. Knows no model.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsugiki.kernels.backend import bodies

CELLS = 1 << 18  # of one fp32 block: fewer waste time between operations


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """x / rms(x) · (weight + offset) over the last dimension; the weight is frozen.

    (Zhang & Sennrich 2019, arXiv:1910.07467.) Gemma stores its weight less one: offset 1.

    Args:
        x: (…, k), contiguous or not.
        weight: (k,)
    """
    out = _RmsNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """The plain meaning of `rms_norm`, as Llama computes it."""
    wide = _wide(x.dtype)
    y = x.to(wide)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide) + offset).to(x.dtype) * y.to(x.dtype)


def _step(x: Tensor) -> int:
    """Rows of a block; a GPU takes all at once."""
    return max(1, CELLS // x.shape[1] if x.device.type == "cpu" else x.shape[0])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _RmsNorm(torch.autograd.Function):
    """Saves x and 1/rms a row; x̂ is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.offset, ctx.shape = offset, x.shape
        fused = bodies(flat, "norms") if weight.dtype == x.dtype else None
        if fused is not None:
            out, inverse = fused.norm_rows(flat, weight, eps, offset)
            ctx.save_for_backward(flat, inverse, weight)
            return cast(Tensor, out.view(x.shape).data)  # no view: it may be changed in place
        wide = _wide(x.dtype)
        scale = weight.to(wide) + offset
        inverse = torch.empty(flat.shape[0], 1, dtype=wide, device=x.device)
        out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        step = _step(flat)
        for begin in range(0, flat.shape[0], step):
            rows = slice(begin, begin + step)
            block = flat[rows].to(wide, copy=True)
            mean = block.square().mean(-1, keepdim=True).add_(eps)
            r = torch.rsqrt(mean, out=inverse[rows])
            out[rows] = block.mul_(r).mul_(scale)
        ctx.save_for_backward(flat, inverse, weight)
        return out.view(x.shape).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, inverse, weight = ctx.saved_tensors
        grad = grads[0].reshape(flat.shape)
        fused = bodies(flat, "norms") if weight.dtype == flat.dtype else None
        if fused is not None:
            out = fused.norm_rows_back(grad, flat, weight, inverse, ctx.offset)
            return out.view(ctx.shape), None, None, None
        wide = inverse.dtype
        scale = weight.to(wide) + ctx.offset
        out = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
        step = _step(flat)
        for begin in range(0, flat.shape[0], step):
            rows = slice(begin, begin + step)
            r = inverse[rows]
            unit = flat[rows] * r  # x̂; promoted to fp32 by r
            upstream = grad[rows] * scale
            mean = (unit * upstream).mean(-1, keepdim=True)
            out[rows] = upstream.addcmul_(unit, mean, value=-1).mul_(r)
        return out.view(ctx.shape), None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotary embedding of the first 2·h of each head's columns, halves paired.

    (Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX and Llama.)

    Args:
        x: (1, T, heads·d), as a projection gives it; not changed.
        cos, sin: (1, T, 2·h), 2·h ≤ d.

    Returns:
        (1, heads, T, d)
    """
    out = _Rotary.apply(x, cos, sin, heads)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The plain meaning of `rotary`."""
    x = x.view(1, x.shape[1], heads, -1).transpose(1, 2)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    one, two = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-two, one), dim=-1) * sin[:, None]
    return torch.cat((turned, rest), dim=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    """x, out (T, heads, d); cos, sin (T, 1, 2·h). The two halves of cos and sin may differ."""
    fused = bodies(x, "norms")
    if fused is not None and cos.dtype == x.dtype:
        fused.turn(x, cos[:, 0], sin[:, 0], out, direction)
        return
    half = cos.shape[-1] // 2
    one, two = x[..., :half], x[..., half : 2 * half]
    c1, c2, s1, s2 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if direction < 0:  # the transpose of the same matrix
        s1, s2 = s2, s1
    torch.mul(one, c1, out=out[..., :half]).addcmul_(two, s1, value=-direction)
    torch.mul(two, c2, out=out[..., half : 2 * half]).addcmul_(one, s2, value=direction)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]


class _Rotary(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        tokens = x.shape[1]
        # a CPU's attention folds heads, a GPU's reads tokens: each gets its rows contiguous
        by_head = x.device.type == "cpu"
        shape = (heads, tokens) if by_head else (tokens, heads)
        out = torch.empty(*shape, x.shape[2] // heads, dtype=x.dtype, device=x.device)
        by_token = out.transpose(0, 1) if by_head else out
        _turn(x.view(tokens, heads, -1), cos[0, :, None], sin[0, :, None], by_token, 1)
        ctx.save_for_backward(cos, sin)
        return by_token.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = grads[0][0].transpose(0, 1)  # (T, heads, d)
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _turn(grad, cos[0, :, None], sin[0, :, None], out, -1)
        return out.view(1, grad.shape[0], -1), None, None, None
