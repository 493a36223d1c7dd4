"""Dropout that keeps no mask: a mask is a place in a table of random bits, found again by its seed.

One table per rate and type is drawn once; a mask of any shape is made of slices of it, at offsets
that a counter-based hash (splitmix64) of a seed gives. The backward pass needs the seed alone, and
drawing a mask costs nothing, where generating one costs more than the product it feeds. Two masks
agree on more than chance only where their offsets are equal. Knows no layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsugiki.kernels.backend import compiled_bodies

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
    fused = _fused(x, out)
    for part, at, rows in _parts(x, seed):
        if fused is not None and at is not None:
            fused.dropped(part, _bits(rate)[at // ALIGN :], 1 / (1 - rate), out[rows], add=False)
        else:
            torch.mul(part, _mask(part, at, rate), out=out[rows])
    return out


def add_dropped(onto: Tensor, x: Tensor, rate: float, seed: int, scale: float = 1.0) -> Tensor:
    """onto (T, k) += scale · what `dropped` gives, in place; x is used up."""
    fused = _fused(x, onto)
    for part, at, rows in _parts(x, seed):
        if fused is not None and at is not None:
            bits = _bits(rate)[at // ALIGN :]
            fused.dropped(part, bits, scale / (1 - rate), onto[rows], add=True)
        else:
            onto[rows].add_(part.mul_(_mask(part, at, rate)), alpha=scale)
    return onto


def bits_of(rate: float, seed: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor, int] | None:
    """The mask of a (T, k) tensor, k in 16s, as bits: the table, each part's place in it in
    entries, and the rows of a part. None where a row is wider than the table."""
    places = [at for _, at in _places(shape, seed)]
    if any(at is None for at in places):
        return None
    return _bits(rate), torch.tensor(places), _rows_of_a_part(shape[1])


def _fused(x: Tensor, out: Tensor) -> Any:
    contiguous = x.is_contiguous() and out.is_contiguous()
    return compiled_bodies(x, "dropout") if contiguous else None


def _parts(x: Tensor, seed: int) -> Iterator[tuple[Tensor, int | None, slice]]:
    """Rows that share one place in the table, the place, and which rows; None: wider than it."""
    for rows, at in _places((x.shape[0], x.shape[1]), seed):
        yield x[rows], at, rows


def _places(shape: tuple[int, int], seed: int) -> Iterator[tuple[slice, int | None]]:
    rows = _rows_of_a_part(shape[1])
    for number, begin in enumerate(range(0, shape[0], rows)):
        end = min(begin + rows, shape[0])
        count, at = (end - begin) * shape[1], None
        if count <= SIZE - ALIGN:
            at = _mixed(seed + number) % ((SIZE - count) // ALIGN) * ALIGN
        yield slice(begin, end), at


def _rows_of_a_part(width: int) -> int:
    """Half a table at most, so that at least half of the offsets remain."""
    return max(1, min(SIZE // 2, 1 << 20) // width)


def _mask(part: Tensor, at: int | None, rate: float) -> Tensor:
    table, count = _table(rate, part.dtype, part.device), part.numel()
    if at is None:
        return table.repeat(count // SIZE + 1)[:count].view(part.shape)
    return table[at : at + count].view(part.shape)


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


@lru_cache(maxsize=4)
def _table(rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(SIZE,) entries 0 or 1/(1 - rate); a constant, the same in every process."""
    return (_kept(rate).to(torch.float64) / (1.0 - rate)).to(device, dtype)


@lru_cache(maxsize=4)
def _bits(rate: float) -> Tensor:
    """The same table, 16 entries a word (SIZE / 16,), the first in the lowest bit."""
    return torch.from_numpy(np.packbits(_kept(rate).numpy(), bitorder="little")).view(torch.int16)


def _kept(rate: float) -> Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(0x7375676B69)) >= rate
