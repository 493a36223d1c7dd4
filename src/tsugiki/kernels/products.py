"""Products with a frozen matrix: torch's, or compiled ones on a CPU with tile registers.

Compiled ones read the matrix as it is stored and round each sum once, however many threads there
are; torch's are taken for few rows, odd widths and whatever autograd must see. Knows no adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.backend import compiled_bodies

FEW = 64  # rows: below, laying out the matrix costs more than the tiles save
DEEP = 8192  # of K: beyond, torch's products are as fast
STEP = 64  # bytes: the depth of a tile; a matrix of other width is not taken


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) · matrixᵀ (n, K) + bias (n,) → (…, n); seen by autograd where it records."""
    if _tiles(x, matrix) is None:
        return F.linear(x, matrix, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], matrix.shape[0])
    return multiply_into(y, flat, matrix, bias).view(*x.shape[:-1], -1)


def multiply_into(
    y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> Tensor:
    """y (T, n) = x (T, K) · matrixᵀ (n, K) + bias (n,), or added to y without a bias; in place and
    not recorded by autograd."""
    fused = _tiles(x, matrix)
    if fused is not None:
        fused.multiply(x, matrix, None if bias is None else bias.float(), y, add)
    elif add:
        y.addmm_(x, matrix.T)
    elif bias is None:
        torch.mm(x, matrix.T, out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, matrix.T, out=y)
    return y


def _tiles(x: Tensor, matrix: Tensor) -> Any:
    """The compiled product, where it takes these and is the faster one."""
    width = matrix.shape[1]
    suits = (
        x.dtype == matrix.dtype == torch.bfloat16
        and 2 * width % STEP == 0
        and width <= DEEP
        and x.numel() >= FEW * width
        and 1 in matrix.stride()
    )
    if not suits or (torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)):
        return None
    return compiled_bodies(x, "tiles")


def tiles_for_codes(codes: Tensor, y: Tensor) -> Any:
    """What multiplies codes (T, K) int8 on tiles into y (T, n), with their scales; None: torch."""
    taken = codes.shape[1] % STEP == 0 and codes.numel() > 0
    return compiled_bodies(y, "tiles") if taken else None
