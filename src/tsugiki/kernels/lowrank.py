"""The thin products of a low-rank term, dropout on their wide operand included.

Plain bodies, and the choice of those that read the wide operand once: Triton's, and a CPU's in
tiles. A mask is a function of (rate, seed, shape) within a device's bodies, so the backward
pass finds the forward's. Knows no adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tsugiki.kernels.backend import compiled_bodies, triton_runs
from tsugiki.kernels.cpu.tiles import FEW, SIDE, Bits
from tsugiki.kernels.dropout import add_dropped, bits_of, dropped


def shrink(x: Tensor, a: Tensor, rate: float = 0.0, seed: int = 0) -> Tensor:
    """dropout(x)·aᵀ: x (T, k), a (R, k) → (T, R)."""
    if triton_runs(x, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.shrink(x, a, rate, seed)
    tiles = _tiles(x, a, rate, seed)
    if tiles is not None:
        fused, bits = tiles
        out = x.new_empty(x.shape[0], a.shape[0])
        shrunk: Tensor = fused.shrink(x, a, 1 / (1 - rate), bits, out)
        return shrunk
    return (x if rate == 0 else dropped(x, rate, seed)) @ a.T


def add_product(
    onto: Tensor, s: Tensor, b: Tensor, scale: float = 1.0, rate: float = 0.0, seed: int = 0
) -> Tensor:
    """onto (T, n) += dropout(scale·s·bᵀ) in place; s (T, R), b (n, R)."""
    if triton_runs(onto, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.add_product(onto, s, b, scale, rate, seed)
    tiles = _tiles(onto, b, rate, seed)
    if tiles is not None:
        fused, bits = tiles
        fused.expand(onto, s, b, scale / (1 - rate), bits)
        return onto
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
    tiles = _tiles(grad, b)
    if tiles is not None:
        fused, _ = tiles
        fused.shrink(grad, b.T, scale, None, out)
        gathered: Tensor = fused.gather(grad, s, scale, None)
        return gathered.T
    torch.mul(grad @ b, scale, out=out)
    # scaled in fp32: a scale that is no power of two would round once more
    return (grad.T @ s).to(torch.promote_types(grad.dtype, torch.float32)).mul_(scale)


def grad_of_a(grad_s: Tensor, x: Tensor, rate: float = 0.0, seed: int = 0) -> Tensor:
    """dA = dSᵀ·dropout(x): dS (T, R), x (T, k) → (R, k), in x's type or wider."""
    if triton_runs(x, "lowrank"):
        from tsugiki.kernels.gpu import lowrank

        return lowrank.grad_of_a(grad_s, x, rate, seed)
    tiles = _tiles(x, grad_s, rate, seed)
    if tiles is not None:
        fused, bits = tiles
        gathered: Tensor = fused.gather(x, grad_s, 1 / (1 - rate), bits)
        return gathered
    return grad_s.T @ (x if rate == 0 else dropped(x, rate, seed))


def _tiles(
    wide: Tensor, thin: Tensor, rate: float = 0.0, seed: int = 0
) -> tuple[Any, Bits | None] | None:
    """The compiled bodies in tiles and the mask's bits, where they take these."""
    rows, width = wide.shape
    suits = (
        wide.dtype == thin.dtype == torch.bfloat16
        and rows >= FEW
        and width % SIDE == 0
        and wide.stride(1) == 1
        and 1 in thin.stride()
    )
    fused = compiled_bodies(wide, "tiles") if suits else None
    if fused is None:
        return None
    bits = None if rate == 0 else bits_of(rate, seed, (rows, width))
    return None if rate > 0 and bits is None else (fused, bits)
