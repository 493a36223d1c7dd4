"""The thin products of a low-rank term, dropout on their wide operand included.

Plain bodies, and the choice of Triton's. A mask is a function of (rate, seed, shape) within a
device's bodies, so the backward pass finds the forward's. Knows no adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsugiki.kernels.backend import triton_runs
from tsugiki.kernels.dropout import add_dropped, dropped


def shrink(x: Tensor, a: Tensor, rate: float = 0.0, seed: int = 0) -> Tensor:
    """dropout(x)·aᵀ: x (T, k), a (R, k) → (T, R)."""
    if triton_runs(x, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.shrink(x, a, rate, seed)
    return (x if rate == 0 else dropped(x, rate, seed)) @ a.T


def add_product(
    onto: Tensor, s: Tensor, b: Tensor, scale: float = 1.0, rate: float = 0.0, seed: int = 0
) -> Tensor:
    """onto (T, n) += dropout(scale·s·bᵀ) in place; s (T, R), b (n, R)."""
    if triton_runs(onto, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.add_product(onto, s, b, scale, rate, seed)
    if rate == 0:
        return onto.addmm_(s, b.T, alpha=scale)
    part = s @ b.T
    return add_dropped(onto, part, rate, seed, scale)


def pair_gradients(grad: Tensor, s: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """What dY (T, n) gives to S and to B.

    Args:
        s: (T, r).
        b: (n, r) in dY's type.
        out: (T, r), becomes dS = scale·dY·b.

    Returns:
        dB = scale·dYᵀ·s (n, r), in dY's type or wider.
    """
    if triton_runs(grad, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.pair_gradients(grad, s, b, scale, out)
    torch.mul(grad @ b, scale, out=out)
    # scaled in fp32: a scale that is no power of two would round once more
    return (grad.T @ s).to(torch.promote_types(grad.dtype, torch.float32)).mul_(scale)


def grad_of_a(grad_s: Tensor, x: Tensor, rate: float = 0.0, seed: int = 0) -> Tensor:
    """dA = dSᵀ·dropout(x): dS (T, R), x (T, k) → (R, k), in x's type or wider."""
    if triton_runs(x, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.grad_of_a(grad_s, x, rate, seed)
    return grad_s.T @ (x if rate == 0 else dropped(x, rate, seed))
