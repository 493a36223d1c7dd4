"""Triton bodies for NF4 codes: the whole matrix unpacked, or multiplied while it is unpacked.

Codes are bitsandbytes': two weights a byte, the first one high; a scale for 64 weights in eight
bits, those scaled again in groups of 256 and shifted. Multiplications and additions are kept apart
(no fused multiply-add), so that each number is the one that the plain body gives, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES = 1024  # unpacked by one program
SKINNY = 64  # rows up to which codes are multiplied as they are: above, the matrix is unpacked once
PER_SCALE = tl.constexpr(32)  # bytes of a block of 64 weights
NESTED = tl.constexpr(256)


class Packed(NamedTuple):
    """An NF4 matrix of n weights in B = ⌈n / 64⌉ blocks.

    codes (32·B,) uint8; absmax (B,) uint8, places in `map`; scales (⌈B / 256⌉,) and offset (1,)
    fp32; levels (16,) and map (256,) fp32: the two tables.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor
    offset: Tensor
    levels: Tensor
    map: Tensor


@triton.jit
def _block_scale(block, absmax, scales, offset, table, inside):
    """fp32 scale of each block."""
    place = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    group = tl.load(scales + block // NESTED, mask=inside, other=0.0)
    return tl.load(table + place) * group + tl.load(offset)


@triton.jit
def _unpack(codes, absmax, scales, offset, levels, table, out, N, B: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place * 2 < N
    byte = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    scale = _block_scale(place // PER_SCALE, absmax, scales, offset, table, inside)
    high = tl.load(levels + (byte >> 4)) * scale
    low = tl.load(levels + (byte & 15)) * scale
    where = tl.program_id(0).to(tl.int64) * (2 * B) + tl.arange(0, 2 * B)
    tl.store(out + where, tl.interleave(high, low), mask=where < N)


def unpack(packed: Packed, out: Tensor) -> Tensor:
    """Every weight into `out`, contiguous, of any floating type; `out` says how many there are."""
    count = out.numel()
    _unpack[(triton.cdiv(count, 2 * BYTES),)](
        *packed, out, count, B=BYTES, num_warps=4, enable_fp_fusion=False
    )
    return out


@triton.jit
def _matmul(
    x, codes, absmax, scales, offset, levels, table, y, M, N, K, xm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K // 2, BK):
        pairs = k + tl.arange(0, BK)
        inside = (outs < N)[None] & (pairs * 2 < K)[:, None]
        place = outs.to(tl.int64)[None] * (K // 2) + pairs[:, None]
        byte = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
        scale = _block_scale(place // PER_SCALE, absmax, scales, offset, table, inside)
        high = (tl.load(levels + (byte >> 4)) * scale).to(x.dtype.element_ty)
        low = (tl.load(levels + (byte & 15)) * scale).to(x.dtype.element_ty)
        seen = (rows < M)[:, None] & (pairs * 2 < K)[None]
        even = x + rows.to(tl.int64)[:, None] * xm + pairs[None] * 2
        total = tl.dot(tl.load(even, mask=seen, other=0.0), high, total, input_precision="ieee")
        total = tl.dot(tl.load(even + 1, mask=seen, other=0.0), low, total, input_precision="ieee")
    tl.store(
        y + rows.to(tl.int64)[:, None] * N + outs[None], total,
        mask=(rows < M)[:, None] & (outs < N)[None],
    )  # fmt: skip


def matmul(x: Tensor, packed: Packed, out_features: int) -> Tensor:
    """x (T, in)·Wᵀ → (T, out) for few rows; in must be a multiple of 64.

    The codes are read once, where unpacking first would write and read four times as many bytes
    again. Numbers are those of a product with the unpacked matrix in x's type.
    """
    rows, width = x.shape
    assert width % 64 == 0, "blocks cross rows"
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    high = 16 if rows <= 16 else 32
    grid = (triton.cdiv(out_features, 32), triton.cdiv(rows, high))
    _matmul[grid](
        x, *packed, y, rows, out_features, width, x.stride(0),
        BM=high, BN=32, BK=128 // x.element_size(), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y
