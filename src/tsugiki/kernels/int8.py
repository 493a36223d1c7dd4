"""Products with a frozen weight in int8: twice the speed of bf16 on a CPU that multiplies bytes.

Each row of the input gets a scale as it comes, each row of the weight has one; products and sums
are exact integers. Entries too large for the rest of their row are multiplied apart, in the
input's own type, with whole columns (LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339). One set
of codes serves both directions: for the way back the weight's scales are put into the gradient
before it is rounded, so that no second, transposed copy is needed. A softmax's gradient is rounded
up or down by chance: its many small entries have one sign, and rounded to the nearest, which is
zero, they bend the sum over all rows. Knows no model.

Shapes: T rows of an input, weight (out, in), K the dimension that is summed over.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from tsugiki.device import shortest
from tsugiki.kernels.backend import compiled_bodies
from tsugiki.kernels.int8_rows import Int8Codes, quantize_int8
from tsugiki.kernels.linear import DenseWeight, FrozenWeight
from tsugiki.kernels.products import LowRank, tiles_for_codes, with_term, within
from tsugiki.kernels.quantized import QuantizedWeight, Workspace

LEVELS = 127  # each side of zero
# An entry so many times its row's root mean square is an outlier. A row of a normal distribution
# stays below 5, one of a gated activation mostly below 16; at 16 the rounding of the others is
# 16 / 127 / sqrt(12) = 3.6 % of their root mean square.
OUTLIER = 16.0
ROUNDS = 3  # removing the largest entries uncovers others
SHARE = 8  # of the columns at most one in so many goes apart: more would cost what int8 gains
CELLS = 1 << 19  # fp32 numbers of one elementwise block: they stay in the cores' own cache
PRODUCTS = 1 << 23  # int32 products in memory at a time: 32 MB
TALLEST = 2048  # rows of one product: so that it is wide enough to use the weight well
GROUP = 1 << 14  # K with one scale a row; the head's gradient has a few large entries in 150,000
DEEPEST = 1 << 17  # K whose sum of products of two codes fits in int32
NOISE = 1 << 20  # entries of the table that chance comes from
_TINY = 1e-30  # scale of a row of zeros


@dataclass(frozen=True)
class Apart:
    """Outliers: at these rows (n,) and columns (c,) the codes are zero."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Quantised:
    """An input (T, K) ≈ codes · scale: int8 (T, K), fp32 (T, 1). Codes are the scratch's own."""

    codes: Tensor
    scale: Tensor
    apart: Apart | None


@dataclass
class Scratch:
    """Memory of one run's int8 products, and the input quantised last: q, k and v read the same."""

    workspace: Workspace = field(default_factory=Workspace)
    _last: tuple[weakref.ref[Tensor], int, Quantised] | None = None

    def take(self, use: str, shape: tuple[int, int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix of whatever was left there."""
        return self.workspace.take(use, shape[0] * shape[1], dtype, like.device).view(shape)

    def quantised(self, x: Tensor) -> Quantised:
        """x (T, K) in codes; those of a moment ago where it is the very same tensor, unchanged."""
        if self._last is not None:
            reference, version, codes = self._last
            if reference() is x and version == x._version:
                return codes
        codes = quantise(x, self)
        self._last = (weakref.ref(x), x._version, codes)
        return codes

    def forget(self) -> None:
        """The codes' memory is about to be used again."""
        self._last = None


def quantise(
    x: Tensor, scratch: Scratch, fold: Tensor | None = None, *, dither: bool = False
) -> Quantised:
    """x (T, K), each column times fold (K,) first: codes, scales, and which entries go apart.

    dither: the mean of an entry's code is the entry, and not the code that is nearest.
    """
    scratch.forget()
    count, width = x.shape
    codes = scratch.take("codes", (count, width), x, torch.int8)
    scale = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    ratio = torch.empty_like(scale)
    fused = compiled_bodies(x, "int8")
    if fused is not None:
        chance = _noise(x.device) if dither else None
        if chance is not None and width > len(chance) // 2:
            chance = chance.repeat(width // len(chance) + 2)
        fused.quantise(x, fold, chance, codes, scale, ratio, LEVELS)
    for rows in _blocks(0 if fused is not None else count, max(1, CELLS // width)):
        block = _wide(x[rows], fold, scratch)
        peak = _peak(block)
        torch.div(peak, _root_mean_square(block), out=ratio[rows])
        torch.mul(peak, 1 / LEVELS, out=scale[rows])
        codes[rows] = _rounded(block, scale[rows], rows.start, dither)
    over = (ratio.view(-1) > OUTLIER).nonzero().view(-1)
    if not len(over):
        return Quantised(codes, scale, None)
    return Quantised(codes, scale, _set_apart(x, over, fold, codes, scale, dither))


def _set_apart(
    x: Tensor, rows: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor, dither: bool
) -> Apart | None:
    """Quantise these rows again without the columns in which one of them has an outlier."""
    block = x.index_select(0, rows).float()
    if fold is not None:
        block.mul_(fold)
    limit = x.shape[1] // SHARE
    columns = rows.new_empty(0)
    for _ in range(ROUNDS):
        score = (block.abs() / _root_mean_square(block)).amax(0)
        best = score.topk(min(limit - len(columns), len(score)))
        new = best.indices[best.values > OUTLIER]
        if not len(new):
            break
        block[:, new] = 0
        columns = torch.cat((columns, new))
    if not len(columns):
        return None
    level = _peak(block).mul_(1 / LEVELS)
    codes[rows] = _rounded(block, level, len(rows), dither).to(torch.int8)
    scale[rows] = level
    return Apart(rows, columns)


@dataclass(frozen=True)
class Int8Weight:
    """Obeys `FrozenWeight`; its products are int8, `rows` and `dense` are those of its source.

    packed: (out, in) int8. scales: (out,) fp32. bias: (out,) fp32 or None.
    forward: False: only the way back is int8.
    dither: on the way back; see `quantise`.
    """

    source: FrozenWeight
    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    scratch: Scratch
    forward: bool = True
    dither: bool = False

    @classmethod
    def of(cls, source: FrozenWeight, scratch: Scratch) -> Int8Weight:
        """The codes of any frozen weight; one that is stored as such codes gives its own.

        Raises:
            ValueError: the weight holds NaN or inf.
        """
        if isinstance(source, QuantizedWeight) and isinstance(source.codes, Int8Codes):
            codes = source.codes
        else:
            codes = quantize_int8(source.dense().detach())
        bias = None if source.bias is None else source.bias.detach().float()
        return cls(source, codes.packed, codes.scales.view(torch.bfloat16).float(), bias, scratch)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory, the source's included, the scratch not."""
        source = self.source
        shared = isinstance(source, QuantizedWeight) and isinstance(source.codes, Int8Codes)
        return source.nbytes + self.scales.nbytes + (0 if shared else self.packed.nbytes)

    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        """x (…, in) → (…, out), bias and term included. Not recorded by autograd."""
        if not self.forward:
            return self.source.matmul(x, term)
        out, width = self.shape
        flat = x if x.dim() == 2 else x.reshape(-1, width)
        y = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            codes = self.scratch.quantised(flat)
            self._multiply(codes, self.packed, self.scales, self.bias, y, add=False, term=term)
            if codes.apart is not None:
                _add_apart(y, flat, codes.apart, self._columns(codes.apart.columns, x.dtype))
        return y.view(*x.shape[:-1], out)

    def matmul_t(
        self, g: Tensor, onto: Tensor | None = None, term: LowRank | None = None
    ) -> Tensor:
        """g (…, out) → (…, in), with a term; added to `onto` in place where given. Not recorded by
        autograd."""
        out, width = self.shape
        flat = g.reshape(-1, out)
        result = g.new_empty(*g.shape[:-1], width) if onto is None else onto
        x = result.view(-1, width)
        with torch.no_grad():
            groups = list(_blocks(out, GROUP))
            total = x
            if len(groups) > 1:  # summed in fp32
                total = self.scratch.take("total", (len(flat), width), g, torch.float32).zero_()
            for group in groups:
                part = flat[:, group]
                codes = quantise(part, self.scratch, self.scales[group], dither=self.dither)
                add = onto is not None or total is not x
                whole = term if total is x else None
                self._multiply(codes, self.packed[group].T, None, None, total, add=add, term=whole)
                if codes.apart is not None:
                    matrix = self._rows(codes.apart.columns + group.start, g.dtype)
                    _add_apart(total, part, codes.apart, matrix)
            if total is not x:
                x.copy_(total) if onto is None else x.add_(total)
                with_term(x, term)
        return result

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix, as stored."""
        return self.source.rows(index)

    def dense(self) -> Tensor:
        """The (out, in) matrix, as stored."""
        return self.source.dense()

    def _multiply(
        self,
        codes: Quantised,
        matrix: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        *,
        add: bool,
        term: LowRank | None,
    ) -> None:
        """y (T, n) = or += codes (T, K) · matrixᵀ (n, K) · scales (n,) + bias (n,) + term."""
        tiles = tiles_for_codes(codes.codes, y)
        if tiles is not None:
            inside = within(term, y)
            tiles.multiply_codes(codes.codes, matrix, codes.scale, scales, bias, y, add, inside)
            with_term(y, term if inside is None else None)
            return
        fused = compiled_bodies(y, "int8")
        for rows, columns in _tiles(*y.shape):
            products = self._products(codes.codes[rows], matrix[columns].T)
            factor = None if scales is None else scales[columns]
            plus = None if bias is None else bias[columns]
            if fused is not None:
                fused.scaled(products, codes.scale[rows], factor, plus, y[rows, columns], add=add)
                continue
            for part, block in self._real(products, codes.scale[rows]):
                if factor is not None:
                    block.mul_(factor)
                if plus is not None:
                    block.add_(plus)
                if add:
                    y[rows][part, columns].add_(block)
                else:
                    y[rows][part, columns] = block
        with_term(y, term)

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """int8 (t, k) · (k, n) → int32 (t, n)."""
        shape = (left.shape[0], right.shape[1])
        out = self.scratch.take("products", shape, left, torch.int32)
        if left.shape[1] == 1:  # torch 2.13 multiplies a single column by the wrong numbers
            return torch.mul(left, right.to(torch.int32), out=out)
        torch._int_mm(left, right, out=out)
        return out

    def _real(self, products: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, products · scale in fp32) by blocks."""
        count, width = products.shape
        for rows in _blocks(count, max(1, CELLS // width)):
            shape = (rows.stop - rows.start, width)
            block = self.scratch.take("cells", shape, products, torch.float32)
            yield rows, block.copy_(products[rows]).mul_(scale[rows])

    def _columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, out): these columns of the matrix, transposed."""
        return (self.packed.index_select(1, index) * self.scales[:, None]).to(dtype).T

    def _rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, in): these rows of the matrix."""
        return (self.packed.index_select(0, index) * self.scales[index, None]).to(dtype)


def int8_speedup(width: int, dtype: torch.dtype) -> float:
    """How many times faster than in its type a (256, width)·(width, 2·width) product with a frozen
    weight is in int8 on this CPU, as a run computes both; rounding the input included."""
    x = torch.randn(256, width).to(dtype)
    plain, scratch = DenseWeight(torch.randn(2 * width, width).to(dtype)), Scratch()
    int8 = Int8Weight.of(plain, scratch)

    def rounded() -> None:
        scratch.forget()
        int8.matmul(x)

    with torch.no_grad():
        wide, narrow = shortest(lambda: plain.matmul(x), rounded)
    return wide / narrow


def _add_apart(y: Tensor, x: Tensor, apart: Apart, matrix: Tensor) -> None:
    """y (T, n) += the outliers of x (T, K) · matrix (c, n), in place."""
    outliers = x.index_select(0, apart.rows).index_select(1, apart.columns)
    y.index_add_(0, apart.rows, (outliers @ matrix).to(y.dtype))


def _wide(x: Tensor, fold: Tensor | None, scratch: Scratch) -> Tensor:
    """x (t, K) in fp32, times fold (K,), in the scratch."""
    block = scratch.take("cells", (x.shape[0], x.shape[1]), x, torch.float32).copy_(x)
    return block if fold is None else block.mul_(fold)


def _rounded(block: Tensor, scale: Tensor, number: int, dither: bool) -> Tensor:
    """block (t, K) over scale (t, 1) in whole numbers, in place; number: which chance."""
    if not dither:
        return block.mul_(scale.reciprocal()).round_()
    table = _noise(block.device)
    count = block.numel()
    if count > len(table) // 2:
        table = table.repeat(count // len(table) + 2)
    begin = number * 7919 % (len(table) - count)
    chance = table[begin : begin + count].view(block.shape)
    return torch.addcmul(chance, block, scale.reciprocal(), out=block).round_()


@lru_cache(maxsize=1)
def _noise(device: torch.device) -> Tensor:
    """(NOISE,) even between -1/2 and 1/2, and never so near to either that 127 becomes 128."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(NOISE, generator=generator).sub_(0.5).mul_(0.9999).to(device)


def _peak(block: Tensor) -> Tensor:
    """(t, 1): the largest size in each row; NaN stays NaN."""
    # twice a reduction is faster than once one over sizes: neither writes the block
    largest, smallest = block.amax(1, keepdim=True), block.amin(1, keepdim=True)
    return torch.maximum(largest, smallest.neg_()).clamp_min_(_TINY)


def _root_mean_square(block: Tensor) -> Tensor:
    """(t, 1) of each row."""
    norm: Tensor = torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return norm.mul_(block.shape[1] ** -0.5).clamp_min_(_TINY)


def _blocks(count: int, step: int) -> Iterator[slice]:
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def _tiles(count: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a (count, width) product of at most `PRODUCTS` numbers, as wide as can be."""
    tall = max(1, min(count, TALLEST))
    for rows in _blocks(count, tall):
        for columns in _blocks(width, max(1, PRODUCTS // tall)):
            yield rows, columns
