"""Frozen weights in few bits: unpacked by tiles into memory that is used again, then multiplied.

How codes become numbers is `kernels/nf4.py`'s and `kernels/int8_rows.py`'s. A tile is never larger
than a core's share of the last cache, so that a product reads it from there, and no page is touched
for the first time after the first step. Knows no model and no adapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tsugiki.kernels.products import LowRank, multiply_into, with_term

ALL = slice(None)
TILE = 6 << 20  # elements of a tile: 12 MB in bf16


class Workspace:
    """Memory that is overwritten by its next use; it belongs to one loaded base.

    Two bases in two threads never meet. A copy starts empty.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(count,) elements of whatever was left there."""
        key = (use, dtype, device)
        held = self._held.get(key)
        if held is None or held.numel() < count:
            self._held.pop(key, None)  # the smaller one goes before the larger one comes
            held = self._held[key] = torch.empty(count, dtype=dtype, device=device)
        return held[:count]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self._held.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()


class Codes(Protocol):
    """A matrix (out, in) in few bits."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def divisible(self) -> int:
        """Columns come in groups of so many; 0: only the whole matrix can be unpacked."""
        ...

    def unpack(
        self, rows: slice, columns: slice, dtype: torch.dtype, workspace: Workspace
    ) -> Tensor:
        """A part of the matrix, contiguous; good until the workspace is used again."""
        ...

    def product(self, x: Tensor) -> Tensor | None:
        """x (T, in)·Wᵀ without unpacking, where there is a better way for so many rows."""
        ...


@dataclass(frozen=True)
class QuantizedWeight:
    """Obeys `FrozenWeight`. Products see the numbers that `dense` gives in x's type.

    dtype: of `dense` and `rows`.
    """

    codes: Codes
    bias: Tensor | None
    workspace: Workspace
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory, without the workspace that all weights share."""
        return self.codes.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        """x (…, in) → (…, out), bias and term included. Not recorded by autograd."""
        out, width = self.shape
        flat = x.reshape(-1, width)
        with torch.no_grad():
            found = self.codes.product(flat)
            if found is not None:
                y = found if self.bias is None else found.add_(self.bias)
                return with_term(y, term).view(*x.shape[:-1], out)
            y = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
            for rows in self._slices(out, width, 1):
                tile = self.codes.unpack(rows, ALL, x.dtype, self.workspace)
                bias = None if self.bias is None else self.bias[rows]
                part = term and dataclasses.replace(term, b=term.b[rows])
                multiply_into(y[:, rows], flat, tile, bias, term=part)
        return y.view(*x.shape[:-1], out)

    def matmul_t(
        self, g: Tensor, onto: Tensor | None = None, term: LowRank | None = None
    ) -> Tensor:
        """g (…, out) → (…, in), with a term; added to `onto` in place where given. Not recorded by
        autograd.

        Tiles hold whole columns, so that no sum is rounded more often than in one product.
        """
        out, width = self.shape
        flat = g.reshape(-1, out)
        result = g.new_empty(*g.shape[:-1], width) if onto is None else onto
        x = result.view(-1, width)
        with torch.no_grad():
            for columns in self._slices(width, out, self.codes.divisible):
                tile = self.codes.unpack(ALL, columns, g.dtype, self.workspace)
                whole = columns == ALL  # a mask is one of all columns
                part = term if whole else None
                multiply_into(x[:, columns], flat, tile.T, add=onto is not None, term=part)
            if not whole:
                with_term(x, term)
        return result

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix."""
        return self.dense().index_select(0, index)

    def dense(self) -> Tensor:
        """The (out, in) matrix in memory of its own."""
        return self.codes.unpack(ALL, ALL, self.dtype, Workspace())

    def _slices(self, length: int, other: int, divisible: int) -> Iterator[slice]:
        """Slices of one side of the matrix whose tiles are at most `TILE` elements."""
        step = TILE // other // max(1, divisible) * divisible
        if self.codes.divisible == 0 or self.codes.device.type != "cpu" or step >= length:
            yield ALL
            return
        step = max(step, divisible)
        count = -(-length // step)
        even = -(-length // count // divisible) * divisible  # no small tile at the end
        for begin in range(0, length, even):
            yield slice(begin, min(begin + even, length))
