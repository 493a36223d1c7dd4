"""The one way into a projection: a frozen product plus the low-rank terms of one or many adapters.

`grouped_linear` computes projections that read the same input in one go, and never knows how the
frozen weight is stored (`FrozenWeight`). For one adapter a hand-written backward saves only the
input and S = X·Aᵀ; for rows with different adapters each segment gets its own term. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.dropout import draw_seed
from tsugiki.kernels.lowrank import grad_of_a, pair_gradients, shrink
from tsugiki.kernels.products import LowRank, multiply, multiply_into, with_term

WIDE = 1 << 24  # weights widened at a time: 64 MB


class FrozenWeight(Protocol):
    """A weight that is not trained, however it is stored. `shape` is (out, in)."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bias(self) -> Tensor | None: ...
    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        """x (…, in) → (…, out), the bias and a term of low rank included."""
        ...

    def matmul_t(
        self, g: Tensor, onto: Tensor | None = None, term: LowRank | None = None
    ) -> Tensor:
        """g (…, out) → (…, in), with a term; added to `onto` in place where given."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix."""
        ...

    def dense(self) -> Tensor:
        """The (out, in) matrix."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A dense weight; `transposed` for GPT-2's Conv1D, which stores (in, out)."""

    weight: Tensor
    bias: Tensor | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        """x (…, in) → (…, out), the bias and a term of low rank included."""
        return multiply(x, self.dense(), self.bias, term)

    def matmul_t(
        self, g: Tensor, onto: Tensor | None = None, term: LowRank | None = None
    ) -> Tensor:
        """g (…, out) → (…, in), with a term; added to `onto` in place where given."""
        matrix = self.dense().T
        if onto is None:
            return multiply(g, matrix, term=term)
        flat = g.reshape(-1, g.shape[-1])
        multiply_into(onto.view(-1, onto.shape[-1]), flat, matrix, add=True, term=term)
        return onto

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix."""
        return self.dense().index_select(0, index)

    def dense(self) -> Tensor:
        """The (out, in) matrix, a view."""
        return self.weight.T if self.transposed else self.weight


@dataclass(frozen=True)
class WideWeight:
    """Another weight's numbers multiplied in fp32, widened by row blocks: slow, for comparisons."""

    source: FrozenWeight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.source.nbytes

    @property
    def bias(self) -> Tensor | None:
        """(out,)"""
        return self.source.bias

    def matmul(self, x: Tensor, term: LowRank | None = None) -> Tensor:
        """x (…, in) → (…, out), the bias and a term of low rank included."""
        y = [F.linear(x.float(), part.float()) for part in self._parts()]
        out = y[0] if len(y) == 1 else torch.cat(y, dim=-1)
        if self.bias is not None:
            out.add_(self.bias.float())
        return with_term(out, term)

    def matmul_t(
        self, g: Tensor, onto: Tensor | None = None, term: LowRank | None = None
    ) -> Tensor:
        """g (…, out) → (…, in), with a term; added to `onto` in place where given."""
        parts = list(self._parts())
        pieces = torch.split(g.float(), [len(part) for part in parts], dim=-1)
        out = pieces[0] @ parts[0].float() if onto is None else onto
        flat = out.view(-1, out.shape[-1])
        for piece, part in list(zip(pieces, parts, strict=True))[onto is None :]:
            flat.addmm_(piece.reshape(-1, piece.shape[-1]), part.float())
        return with_term(out, term)

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix."""
        return self.source.rows(index).float()

    def dense(self) -> Tensor:
        """The (out, in) matrix."""
        return self.source.dense().float()

    def _parts(self) -> Iterator[Tensor]:
        matrix = self.source.dense()
        return iter(torch.split(matrix, max(1, WIDE // matrix.shape[1])))


@dataclass(frozen=True)
class LoraTerm:
    """One adapter's part in one projection: scale · (dropout(x)·Aᵀ)·Bᵀ; A (r, in), B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0


def grouped_linear(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    adapters: Sequence[Sequence[LoraTerm | None]],
    batch: ForwardBatch | None = None,
) -> list[Tensor]:
    """y_j = W_j·x + b_j + the adapter's term, for projections j that read the same x.

    Args:
        x: (…, in); with several adapters (1, T, in).
        weights: p frozen weights.
        adapters: adapters[i][j] is adapter i's term on projection j, or None.
        batch: says which rows belong to which adapter; None (or no `adapters` in it) means
            adapter 0 on every row. Dropout only where gradients are recorded.

    Returns:
        p tensors (…, out_j) in x's dtype.
    """
    if batch is not None and batch.adapters is not None:
        return _many_adapters(x, weights, adapters, batch)
    terms = list(adapters[0]) if adapters else [None] * len(weights)
    rates = {term.dropout for term in terms if term is not None}
    if not torch.is_grad_enabled():
        flat = x.reshape(-1, x.shape[-1])
        return [
            _add_term(weight.matmul(x), flat, term)
            for weight, term in zip(weights, terms, strict=True)
        ]
    if len(rates) > 1:  # one mask serves a group, so unequal rates go apart
        return [grouped_linear(x, [w], [[t]])[0] for w, t in zip(weights, terms, strict=True)]
    pairs = [tensor for t in terms if t is not None for tensor in (t.A, t.B)]
    rate = rates.pop() if rates else 0.0
    out = _Grouped.apply(x, tuple(weights), tuple(terms), rate, *pairs)  # type: ignore[no-untyped-call]
    return list(out)


def reference_linear(
    x: Tensor, weights: Sequence[FrozenWeight], terms: Sequence[LoraTerm | None]
) -> list[Tensor]:
    """The plain meaning of `grouped_linear` for one adapter without dropout, for tests."""
    out = []
    for weight, term in zip(weights, terms, strict=True):
        y = weight.matmul(x)
        if term is not None:
            a, b = term.A.to(x.dtype), term.B.to(x.dtype)
            y = y + term.scale * F.linear(F.linear(x, a), b)
        out.append(y)
    return out


def _add_term(y: Tensor, x: Tensor, term: LoraTerm | None) -> Tensor:
    """y (…, out) plus the term of x (T, in), in place."""
    if term is not None:
        shrunk = x @ term.A.to(x.dtype).T
        y.view(-1, y.shape[-1]).addmm_(shrunk, term.B.to(x.dtype).T, alpha=term.scale)
    return y


@dataclass(frozen=True)
class Shrunk:
    """The terms of one group on one input: S = dropout(x)·[A_1; …; A_p]ᵀ and what made it.

    x (T, in), a (R, in) in x's type, s (T, R), columns: those of each term, in order.
    """

    x: Tensor
    a: Tensor
    s: Tensor
    columns: tuple[slice, ...]
    rate: float
    seed: int


def project(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    terms: Sequence[LoraTerm | None],
    rate: float,
) -> tuple[list[Tensor], Shrunk | None]:
    """Outputs (T, out) of projections of x (T, in), terms included; all A in one product."""
    present = [term for term in terms if term is not None]
    if not present:
        return [weight.matmul(x) for weight in weights], None
    matrices = [term.A.to(x.dtype) for term in present]
    a = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    seed = draw_seed() if rate > 0 else 0
    s = shrink(x, a, rate, seed)
    outputs: list[Tensor] = []
    columns, at = [], 0
    for weight, term in zip(weights, terms, strict=True):
        if term is None:
            outputs.append(weight.matmul(x))
            continue
        part = slice(at, at + term.A.shape[0])
        low = LowRank(s[:, part], term.B.to(x.dtype), term.scale)
        outputs.append(weight.matmul(x, low))
        columns.append(part)
        at = part.stop
    return outputs, Shrunk(x, a, s, tuple(columns), rate, seed)


def grad_shrunk(
    group: Shrunk | None, terms: Sequence[LoraTerm | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor]]:
    """Of each output's dY (T, out): dS (T, R) = s·dY·B, and [dB_1, dB_2, …]; no group, nothing."""
    if group is None:
        return None, []
    grad_s = torch.empty_like(group.s)
    places, grads_b = iter(group.columns), []
    for term, grad in zip(terms, grads, strict=True):
        if term is not None:
            part = next(places)
            b = term.B.to(grad.dtype)
            grad_b = pair_gradients(grad, group.s[:, part], b, term.scale, out=grad_s[:, part])
            grads_b.append(grad_b.to(term.B.dtype))
    return grad_s, grads_b


def grads_of_pairs(
    group: Shrunk | None,
    terms: Sequence[LoraTerm | None],
    grad_s: Tensor | None,
    grads_b: Sequence[Tensor],
) -> list[Tensor]:
    """[dA_1, dB_1, dA_2, …] of what `grad_shrunk` gave."""
    if group is None or grad_s is None:
        return []
    grad_a = grad_of_a(grad_s, group.x, group.rate, group.seed)
    present = [term for term in terms if term is not None]
    out = []
    for part, term, grad_b in zip(group.columns, present, grads_b, strict=True):
        out += [grad_a[part].to(term.A.dtype), grad_b]
    return out


def grad_input(
    weights: Sequence[FrozenWeight],
    grads: Sequence[Tensor],
    group: Shrunk | None,
    grad_s: Tensor | None,
) -> Tensor:
    """dX (T, in) = Σ dY_i·W_i + dropout(dS·A), accumulated in one buffer."""
    grad_x: Tensor | None = None
    for number, (weight, grad) in enumerate(zip(weights, grads, strict=True), 1):
        if group is None or grad_s is None or number < len(weights):
            grad_x = weight.matmul_t(grad, grad_x)
        else:
            term = LowRank(grad_s, group.a.T, rate=group.rate, seed=group.seed)
            grad_x = weight.matmul_t(grad, grad_x, term)
    assert grad_x is not None
    return grad_x


class _Grouped(torch.autograd.Function):
    """Frozen products + LoRA with a lean saved set: x and S, never a mask.

    x is read once for all A of the group; dS = s·dY·B is computed once and used twice; everything
    is accumulated into the frozen products' buffers. (LoRAFusion, arXiv:2510.00206, splits the
    graph at S in the same way.) One dropout mask serves the whole group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[FrozenWeight, ...],
        terms: tuple[LoraTerm | None, ...],
        rate: float,
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        out, group = project(flat, weights, terms, rate)
        ctx.weights, ctx.terms, ctx.shape, ctx.layout = weights, terms, x.shape, None
        if group is not None:
            ctx.save_for_backward(flat, group.a, group.s, *pairs)
            ctx.layout = (group.columns, rate, group.seed)
        # no views, which could not be changed in place, as Falcon does
        return tuple(y.view(*x.shape[:-1], y.shape[-1]).data for y in out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat_grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        group = None
        if ctx.layout is not None:
            flat, a, s, *_ = ctx.saved_tensors
            group = Shrunk(flat, a, s, *ctx.layout)
        grad_s, grads_b = grad_shrunk(group, ctx.terms, flat_grads)
        pair_grads = grads_of_pairs(group, ctx.terms, grad_s, grads_b)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(ctx.weights, flat_grads, group, grad_s).view(ctx.shape)
        return grad_x, None, None, None, *pair_grads


def _many_adapters(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    adapters: Sequence[Sequence[LoraTerm | None]],
    batch: ForwardBatch,
) -> list[Tensor]:
    """Rows of sequence i get adapter batch.adapters[i]; -1 is the base. No gradient.

    Neighbouring sequences with one adapter share a segment; each segment is computed at its
    adapter's true rank, straight into the frozen product's buffer.
    """
    assert batch.adapters is not None
    segments: list[tuple[int, int, int]] = []
    for which, begin, length in zip(batch.adapters, batch.offsets, batch.lengths, strict=True):
        if segments and segments[-1][0] == which:
            segments[-1] = (which, segments[-1][1], begin + length)
        else:
            segments.append((which, begin, begin + length))
    flat = x.reshape(-1, x.shape[-1])
    out = []
    for j, weight in enumerate(weights):
        y = weight.matmul(x)
        flat_y = y.view(-1, y.shape[-1])
        for which, begin, end in segments:
            term = adapters[which][j] if which >= 0 else None
            if term is not None:
                shrunk = flat[begin:end] @ term.A.to(x.dtype).T
                flat_y[begin:end].addmm_(shrunk, term.B.to(x.dtype).T, alpha=term.scale)
        out.append(y)
    return out
