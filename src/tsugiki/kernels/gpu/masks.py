"""Dropout masks that are computed where they are needed: a hash of seed, row and column.

Nothing is stored and nothing is read: forward and backward kernels ask for the same (seed, row,
column) and get the same bit, whatever their tiles. The hash is two rounds of a 32-bit finaliser
(Wellons 2018, "lowbias32"), about ten integer operations an entry, where Philox needs sixty.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_FIRST = tl.constexpr(0x7FEB352D)
_SECOND = tl.constexpr(0x846CA68B)
_HALF = 0x7FFFFFFF
SEEDS = ["low", "high", "limit"]  # arguments that differ in every call: not compiled in


class Mask(NamedTuple):
    """What a kernel must know of a mask; limit: 31-bit share of dropped entries."""

    low: int
    high: int
    limit: int
    gain: float


def mask_of(rate: float, seed: int) -> Mask:
    """rate in [0, 1); seed from `draw_seed`."""
    return Mask(seed & _HALF, seed >> 31 & _HALF, round(rate * (_HALF + 1)), 1.0 / (1.0 - rate))


@triton.jit
def _mixed(x):
    x ^= x >> 16
    x *= tl.cast(_FIRST, tl.uint32)
    x ^= x >> 15
    x *= tl.cast(_SECOND, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def kept(rows, columns, low, high, limit):
    """rows (M,), columns (N,) → (M, N) booleans."""
    down = _mixed(rows.to(tl.uint32) ^ tl.cast(low, tl.uint32))
    across = _mixed(columns.to(tl.uint32) ^ tl.cast(high, tl.uint32))
    drawn = _mixed(down[:, None] + across[None, :])
    return (drawn >> 1).to(tl.int32) >= limit
