"""A frozen dense product with the low-rank term added before the result leaves the chip.

y = x·W + bias + onto + dropout(scale·s·p): forward with W = weightᵀ and p = Bᵀ, input gradient with
W = weight and p = A. Worth it where this product runs near the library's speed, since the library
must read and write y once more for the term (`kernels/backend.py` says where).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsugiki.kernels.gpu.lowrank import rank_block
from tsugiki.kernels.gpu.masks import SEEDS, kept, mask_of


class Tiles(NamedTuple):
    """Rows, columns, depth of a tile; warps and stages of a program."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Usual choices for each width of number; `benchmarks/gpu.py` measures others beside them.
HALF = Tiles(128, 128, 64, 8, 3)
SINGLE = Tiles(64, 64, 32, 4, 2)
GROUP = 8  # rows of tiles that share columns of W in the second cache


@triton.jit(do_not_specialize=SEEDS)
def _product(
    x, w, y, bias, onto, s, p, M, N, K, R,
    xm, xk, wk, wn, ym, yn, om, on, sm, sr, pr, pn, scale, low, high, limit, gain,
    BIAS: tl.constexpr, ONTO: tl.constexpr, TERM: tl.constexpr, DROP: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    one = tl.program_id(0)
    group = one // (GROUPED * across)
    height = tl.minimum(down - group * GROUPED, GROUPED)
    within = one % (GROUPED * across)
    rows = (group * GROUPED + within % height) * BM + tl.arange(0, BM)
    columns = (within // height) * BN + tl.arange(0, BN)
    at, over = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None]
    rows_in, columns_in = (rows < M)[:, None], (columns < N)[None]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        deep = k + tl.arange(0, BK)
        if EVEN:
            left = tl.load(x + at * xm + deep[None] * xk, mask=rows_in, other=0.0)
            right = tl.load(w + deep[:, None] * wk + over * wn, mask=columns_in, other=0.0)
        else:
            inside = deep < K
            left = tl.load(x + at * xm + deep[None] * xk, mask=rows_in & inside[None], other=0.0)
            right = tl.load(
                w + deep[:, None] * wk + over * wn, mask=columns_in & inside[:, None], other=0.0
            )
        total = tl.dot(left, right, total, input_precision="ieee")
    if TERM:
        term = tl.zeros((BM, BN), tl.float32)
        for r in range(0, R, BR):
            ranks = r + tl.arange(0, BR)
            inside = ranks < R
            left = tl.load(s + at * sm + ranks[None] * sr, mask=rows_in & inside[None], other=0.0)
            right = tl.load(
                p + ranks[:, None] * pr + over * pn, mask=columns_in & inside[:, None], other=0.0
            )
            term = tl.dot(left, right, term, input_precision="ieee")
        term *= scale
        if DROP:
            term = tl.where(kept(rows, columns, low, high, limit), term * gain, 0.0)
        total += term
    inside = rows_in & columns_in
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None]
    if ONTO:
        total += tl.load(onto + at * om + over * on, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at * ym + over * yn, total, mask=inside)


def product(
    x: Tensor,
    w: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    add: bool = False,
    term: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    rate: float = 0.0,
    seed: int = 0,
    tiles: Tiles | None = None,
) -> Tensor:
    """x (M, K)·w (K, N) + bias (N,) + dropout(scale·s·p), any strides.

    Args:
        out: (M, N), written to; add: what it holds is added.
        term: s (M, R) and p (R, N).
        tiles: for measurements.

    Returns:
        (M, N) in x's type: `out` where given, else new.
    """
    (rows, depth), columns = x.shape, w.shape[1]
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if out is None else out
    s, p = (x, w) if term is None else term  # unused without a term
    tiles = tiles or (SINGLE if x.dtype == torch.float32 else HALF)
    grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)
    rank = 0 if term is None else s.shape[1]
    _product[grid](
        x, w, y, y if bias is None else bias, y, s, p, rows, columns, depth, rank,
        *x.stride(), *w.stride(), *y.stride(), *y.stride(), *s.stride(), *p.stride(),
        scale, *mask_of(rate, seed),
        BIAS=bias is not None, ONTO=add, TERM=term is not None, DROP=rate > 0,
        EVEN=depth % tiles.k == 0, BM=tiles.m, BN=tiles.n, BK=tiles.k, BR=rank_block(rank or 1),
        GROUPED=GROUP, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y
