"""Triton bodies of `kernels/lowrank.py`: thin products that read their wide operand once.

Dropout happens inside (`gpu/masks.py`). Sums over rows are taken in a fixed number of parts that
are added in a fixed order, never with atomics, so that a step repeats bit for bit. Sums are fp32;
fp32 inputs are multiplied as such, never in TF32. (The fusions are LoRAFusion's, arXiv:2510.00206:
dropout with shrink, and one pass over dY for dS and dB.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tsugiki.kernels.gpu.masks import SEEDS, kept, mask_of

PROGRAMS = 256  # wanted at least: a constant, so that sums do not depend on the GPU
ROWS = 64
WIDE = 256  # bytes of a tile's row: 128 columns of half precision, 64 of single


def rank_block(rank: int) -> int:
    """Ranks of one tile: what `tl.dot` takes, at most 64."""
    return min(64, max(16, 1 << (rank - 1).bit_length()))


@triton.jit(do_not_specialize=SEEDS)
def _shrink(
    x, a, s, T, K, R, xt, xk, ar, ak, st, low, high, limit, gain,
    DROP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    at = rows.to(tl.int64)[:, None]
    total = tl.zeros((BT, BR), tl.float32)
    for k in range(0, K, BK):
        columns = k + tl.arange(0, BK)
        inside = columns < K
        tile = tl.load(
            x + at * xt + columns[None] * xk, mask=(rows < T)[:, None] & inside[None], other=0.0
        )
        if DROP:
            tile = tl.where(kept(rows, columns, low, high, limit), tile, 0.0)
        matrix = tl.load(
            a + ranks[None] * ar + columns[:, None] * ak,
            mask=(ranks < R)[None] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(tile, matrix, total, input_precision="ieee")
    tl.store(s + at * st + ranks[None], total * gain, mask=(rows < T)[:, None] & (ranks < R)[None])


def shrink(x: Tensor, a: Tensor, rate: float, seed: int) -> Tensor:
    """dropout(x)·aᵀ: x (T, k), a (R, k) → (T, R) in x's type."""
    (count, width), rank = x.shape, a.shape[0]
    s = torch.empty(count, rank, dtype=x.dtype, device=x.device)
    block = rank_block(rank)
    rows = 16 if count <= 16 else 32 if count < ROWS * PROGRAMS else ROWS
    grid = (triton.cdiv(count, rows), triton.cdiv(rank, block))
    wide = WIDE // x.element_size()
    _shrink[grid](
        x, a, s, count, width, rank, *x.stride(), *a.stride(), rank, *mask_of(rate, seed),
        DROP=rate > 0, BT=rows, BK=wide, BR=block, num_warps=4,
    )  # fmt: skip
    return s


@triton.jit(do_not_specialize=SEEDS)
def _add(
    onto, s, b, T, N, R, ot, on, st, sr, bn, br, scale, low, high, limit, gain,
    DROP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BT, BN), tl.float32)
    for r in range(0, R, BR):
        ranks = r + tl.arange(0, BR)
        left = tl.load(
            s + rows.to(tl.int64)[:, None] * st + ranks[None] * sr,
            mask=(rows < T)[:, None] & (ranks < R)[None],
            other=0.0,
        )
        right = tl.load(
            b + columns[None] * bn + ranks[:, None] * br,
            mask=(columns < N)[None] & (ranks < R)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    total *= scale
    if DROP:
        total = tl.where(kept(rows, columns, low, high, limit), total * gain, 0.0)
    place = onto + rows.to(tl.int64)[:, None] * ot + columns[None] * on
    inside = (rows < T)[:, None] & (columns < N)[None]
    tl.store(place, tl.load(place, mask=inside, other=0.0).to(tl.float32) + total, mask=inside)


def add_product(onto: Tensor, s: Tensor, b: Tensor, scale: float, rate: float, seed: int) -> Tensor:
    """onto (T, n) += dropout(scale·s·bᵀ) in place; s (T, R), b (n, R), any strides."""
    (count, width), rank = onto.shape, b.shape[1]
    wide = WIDE // onto.element_size()
    grid = (triton.cdiv(count, ROWS), triton.cdiv(width, wide))
    _add[grid](
        onto, s, b, count, width, rank, *onto.stride(), *s.stride(), *b.stride(), scale,
        *mask_of(rate, seed), DROP=rate > 0, BT=ROWS, BN=wide, BR=rank_block(rank), num_warps=4,
    )  # fmt: skip
    return onto


@triton.jit
def _pair(
    grad, s, b, part_s, part_b, T, N, R, each, gt, gn, st, sr, bn, br,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    matrix = tl.load(
        b + columns[:, None] * bn + ranks[None] * br,
        mask=(columns < N)[:, None] & (ranks < R)[None],
        other=0.0,
    )
    total = tl.zeros((BN, BR), tl.float32)
    begin = tl.program_id(0) * each
    for t in range(begin, tl.minimum(begin + each, T), BT):
        rows = t + tl.arange(0, BT)
        tile = tl.load(
            grad + rows.to(tl.int64)[:, None] * gt + columns[None] * gn,
            mask=(rows < T)[:, None] & (columns < N)[None],
            other=0.0,
        )
        thin = tl.dot(tile, matrix, input_precision="ieee")
        inside = (rows < T)[:, None] & (ranks < R)[None]
        place = (tl.program_id(1).to(tl.int64) * T + rows[:, None]) * R + ranks[None]
        tl.store(part_s + place, thin, mask=inside)
        left = tl.load(s + rows[:, None] * st + ranks[None] * sr, mask=inside, other=0.0)
        total = tl.dot(tl.trans(tile), left, total, input_precision="ieee")
    place = (tl.program_id(0).to(tl.int64) * N + columns[:, None]) * R + ranks[None]
    tl.store(part_b + place, total, mask=(columns < N)[:, None] & (ranks < R)[None])


def pair_gradients(grad: Tensor, s: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out (T, r) = scale·grad·b; returns scale·gradᵀ·s (n, r) in fp32. grad is read once."""
    (count, width), rank = grad.shape, b.shape[1]
    block = rank_block(rank)
    wide = 2 * WIDE // grad.element_size()
    across = triton.cdiv(width, wide)
    each = _share(count, across)
    down = triton.cdiv(count, each)
    part_s = torch.empty(across, count, rank, dtype=torch.float32, device=grad.device)
    part_b = torch.empty(down, width, rank, dtype=torch.float32, device=grad.device)
    _pair[(down, across, triton.cdiv(rank, block))](
        grad, s, b, part_s, part_b, count, width, rank, each, *grad.stride(), *s.stride(),
        *b.stride(), BT=32, BN=wide, BR=block, num_warps=8,
    )  # fmt: skip
    out.copy_(part_s.sum(0).mul_(scale))
    return part_b.sum(0).mul_(scale)


@triton.jit(do_not_specialize=SEEDS)
def _grad_a(
    grad, x, part, T, K, R, each, gt, gr, xt, xk, low, high, limit, gain,
    DROP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BK + tl.arange(0, BK)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BK), tl.float32)
    begin = tl.program_id(0) * each
    for t in range(begin, tl.minimum(begin + each, T), BT):
        rows = t + tl.arange(0, BT)
        tile = tl.load(
            x + rows.to(tl.int64)[:, None] * xt + columns[None] * xk,
            mask=(rows < T)[:, None] & (columns < K)[None],
            other=0.0,
        )
        if DROP:
            tile = tl.where(kept(rows, columns, low, high, limit), tile, 0.0)
        left = tl.load(
            grad + ranks[:, None] * gr + rows[None] * gt,
            mask=(ranks < R)[:, None] & (rows < T)[None],
            other=0.0,
        )
        total = tl.dot(left, tile, total, input_precision="ieee")
    place = (tl.program_id(0).to(tl.int64) * R + ranks[:, None]) * K + columns[None]
    tl.store(part + place, total * gain, mask=(ranks < R)[:, None] & (columns < K)[None])


def grad_of_a(grad_s: Tensor, x: Tensor, rate: float, seed: int) -> Tensor:
    """grad_sᵀ·dropout(x): grad_s (T, R), x (T, k) → (R, k) in fp32."""
    (count, width), rank = x.shape, grad_s.shape[1]
    block = rank_block(rank)
    wide = WIDE // x.element_size()
    across = triton.cdiv(width, wide)
    each = _share(count, across)
    down = triton.cdiv(count, each)
    part = torch.empty(down, rank, width, dtype=torch.float32, device=x.device)
    _grad_a[(down, across, triton.cdiv(rank, block))](
        grad_s, x, part, count, width, rank, each, *grad_s.stride(), *x.stride(),
        *mask_of(rate, seed), DROP=rate > 0, BT=32, BK=wide, BR=block, num_warps=4,
    )  # fmt: skip
    return part.sum(0)


def _share(count: int, across: int) -> int:
    """Rows of one part: enough parts to fill a GPU, whole tiles, no more than needed."""
    parts = max(1, PROGRAMS // across)
    return max(32, -(-count // (32 * parts)) * 32)
