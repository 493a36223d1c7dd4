"""Dropout that keeps no mask: a mask is a place in a table of random bits, found again by its seed.

One table per rate and type is drawn once; a mask of any shape is made of slices of it, at offsets
that a counter-based hash (splitmix64) of a seed gives. The backward pass needs the seed alone, and
drawing a mask costs nothing, where generating one costs more than the product it feeds. Two masks
agree on more than chance only where their offsets are equal. Knows no layers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SIZE = 1 << 22  # entries of a table
ALIGN = 16  # entries: offsets stay on vector boundaries
_WORD = (1 << 64) - 1


def draw_seed() -> int:
    """A seed from torch's own generator, so that runs repeat and resume."""
    return int(torch.randint(0, 1 << 62, ()).item())


def dropped(x: Tensor, rate: float, seed: int, out: Tensor | None = None) -> Tensor:
    """x · mask / (1 - rate), the mask given by (rate, seed, shape).

    Args:
        x: (T, k).
        rate: share of entries set to zero, in (0, 1).
        seed: from `draw_seed`; the same seed gives the same mask.
        out: (T, k) to write to; may be x itself.
    """
    out = torch.empty_like(x) if out is None else out
    table = _table(rate, x.dtype, x.device)
    width = x.shape[1]
    # half a table at most, so that at least half of the offsets remain
    rows = max(1, min(SIZE // 2, 1 << 20) // width)
    for number, begin in enumerate(range(0, x.shape[0], rows)):
        part = x[begin : begin + rows]
        count = part.shape[0] * width
        if count <= SIZE - ALIGN:
            at = _mixed(seed + number) % ((SIZE - count) // ALIGN) * ALIGN
            mask = table[at : at + count].view(part.shape)
        else:  # one row wider than the table
            mask = table.repeat(count // SIZE + 1)[:count].view(part.shape)
        torch.mul(part, mask, out=out[begin : begin + rows])
    return out


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


@lru_cache(maxsize=4)
def _table(rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(SIZE,) entries 0 or 1/(1 - rate); a constant, the same in every process."""
    generator = torch.Generator().manual_seed(0x7375676B69)
    kept = torch.rand(SIZE, generator=generator) >= rate
    return (kept.to(torch.float64) / (1.0 - rate)).to(device, dtype)
