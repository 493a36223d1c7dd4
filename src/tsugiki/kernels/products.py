"""Products with a frozen matrix and a term of low rank: torch's, Triton's, or compiled ones on a
CPU that computes in tiles.

Compiled ones read the matrix as it is stored and round each sum once, a term of low rank included,
however many threads there are; torch's are taken for few rows, odd widths and whatever autograd
must see. Knows no adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.backend import compiled_bodies, triton_runs
from tsugiki.kernels.cpu.tiles import DEPTH, FEW, SIDE, Term
from tsugiki.kernels.dropout import bits_of
from tsugiki.kernels.lowrank import add_product

DEEP = 8192  # of K: beyond, torch's products are as fast


@dataclass(frozen=True)
class LowRank:
    """scale · dropout(s·bᵀ), which a product is added to: s (T, r), b (n, r)."""

    s: Tensor
    b: Tensor
    scale: float = 1.0
    rate: float = 0.0
    seed: int = 0


def multiply(
    x: Tensor, matrix: Tensor, bias: Tensor | None = None, term: LowRank | None = None
) -> Tensor:
    """x (…, K) · matrixᵀ (n, K) + bias (n,) + term → (…, n); without a term seen by autograd."""
    if term is None and _tiles(x, matrix) is None:
        return F.linear(x, matrix, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], matrix.shape[0])
    return multiply_into(y, flat, matrix, bias, term=term).view(*x.shape[:-1], matrix.shape[0])


def multiply_into(
    y: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None = None, *, add: bool = False,
    term: LowRank | None = None,
) -> Tensor:  # fmt: skip
    """y (T, n) = x (T, K) · matrixᵀ (n, K) + bias (n,) + term, or added to y without a bias; in
    place and not recorded by autograd."""
    if term is not None and triton_runs(x, "product"):
        from tsugiki.kernels.gpu.product import product

        return product(
            x, matrix.T, bias=bias, out=y, add=add, term=(term.s, term.b.T),
            scale=term.scale, rate=term.rate, seed=term.seed,
        )  # fmt: skip
    fused = _tiles(x, matrix)
    if fused is not None:
        inside = within(term, y)
        fused.multiply(x, matrix, None if bias is None else bias.float(), y, add, inside)
        if inside is not None:
            return y
    elif add:
        y.addmm_(x, matrix.T)
    elif bias is None:
        torch.mm(x, matrix.T, out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, matrix.T, out=y)
    return with_term(y, term)


def with_term(y: Tensor, term: LowRank | None) -> Tensor:
    """y (…, n) plus the term, if any, in place."""
    if term is not None:
        flat = y.view(-1, y.shape[-1])
        add_product(flat, term.s, term.b, term.scale, term.rate, term.seed)
    return y


def within(term: LowRank | None, y: Tensor) -> Term | None:
    """The term as compiled products into y (T, n) take it; None: it is to be added apart."""
    if term is None or y.shape[1] % SIDE:
        return None
    if not y.dtype == term.s.dtype == term.b.dtype == torch.bfloat16:
        return None
    bits = bits_of(term.rate, term.seed, (y.shape[0], y.shape[1])) if term.rate > 0 else None
    if term.rate > 0 and bits is None:
        return None
    return term.s, term.b, term.scale / (1 - term.rate), bits


def _tiles(x: Tensor, matrix: Tensor) -> Any:
    """The compiled product, where it takes these and is the faster one."""
    width = matrix.shape[1]
    suits = (
        x.dtype == matrix.dtype == torch.bfloat16
        and width % SIDE == 0
        and width <= DEEP
        and x.numel() >= FEW * width
        and 1 in matrix.stride()
    )
    if not suits or (torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)):
        return None
    return compiled_bodies(x, "tiles")


def tiles_for_codes(codes: Tensor, y: Tensor) -> Any:
    """What multiplies codes (T, K) int8 on tiles into y (T, n), with their scales; None: torch."""
    taken = codes.shape[1] % DEPTH == 0 and codes.numel() > 0
    found = compiled_bodies(y, "tiles") if taken else None
    return found if found and found.kind() == "tile registers" else None
