"""The one way into a projection: a frozen product plus the low-rank terms of one or many adapters.

`grouped_linear` computes projections that read the same input in one go, and never knows how the
frozen weight is stored (`FrozenWeight`). For one adapter a hand-written backward saves only the
input and S = X·Aᵀ; for rows with different adapters each segment gets its own term. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.batch import ForwardBatch


class FrozenWeight(Protocol):
    """A weight that is not trained, however it is stored. `shape` is (out, in)."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def matmul(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), the bias included."""
        ...

    def matmul_t(self, g: Tensor) -> Tensor:
        """g (…, out) → (…, in)."""
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

    def matmul(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), the bias included."""
        return F.linear(x, self.dense(), self.bias)

    def matmul_t(self, g: Tensor) -> Tensor:
        """g (…, out) → (…, in)."""
        return torch.matmul(g, self.dense())

    def rows(self, index: Tensor) -> Tensor:
        """Rows (n, in) of the (out, in) matrix."""
        return self.dense().index_select(0, index)

    def dense(self) -> Tensor:
        """The (out, in) matrix, a view."""
        return self.weight.T if self.transposed else self.weight


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
            adapter 0 on every row.

    Returns:
        p tensors (…, out_j) in x's dtype.
    """
    if batch is not None and batch.adapters is not None:
        return _many_adapters(x, weights, adapters, batch)
    terms = adapters[0] if adapters else [None] * len(weights)
    return [
        weight.matmul(x) if term is None else _one(x, weight, term)
        for weight, term in zip(weights, terms, strict=True)
    ]


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


def _one(x: Tensor, weight: FrozenWeight, term: LoraTerm) -> Tensor:
    if not torch.is_grad_enabled():
        y = weight.matmul(x)
        return _add_term(y, x, term)
    mask = None
    if term.dropout > 0:
        keep = 1.0 - term.dropout
        mask = torch.empty_like(x).bernoulli_(keep).div_(keep)
    out = _LoraProduct.apply(x, term.A, term.B, term.scale, weight, mask)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def _add_term(y: Tensor, x: Tensor, term: LoraTerm) -> Tensor:
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    shrunk = flat_x @ term.A.to(x.dtype).T
    flat_y.addmm_(shrunk, term.B.to(x.dtype).T, alpha=term.scale)
    return y


class _LoraProduct(torch.autograd.Function):
    """Frozen product + LoRA with a lean saved set: x (or its dropped form) and S = x·Aᵀ.

    dS = s·dY·B is computed once and used twice; the LoRA part is accumulated into the frozen
    product's buffer. (LoRAFusion, arXiv:2510.00206, splits the graph at S in the same way.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        weight: FrozenWeight,
        mask: Tensor | None,
    ) -> Tensor:
        dropped = x if mask is None else x * mask
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        flat = dropped.reshape(-1, x.shape[-1])
        shrunk = flat @ a_low.T  # (T, r)
        y = weight.matmul(x)
        y.view(-1, y.shape[-1]).addmm_(shrunk, b_low.T, alpha=scale)
        ctx.save_for_backward(flat, shrunk, a, b, *([] if mask is None else [mask]))
        ctx.scale, ctx.weight, ctx.has_mask = scale, weight, mask is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat, shrunk, a, b, *rest = ctx.saved_tensors
        grad = grads[0]
        flat_grad = grad.reshape(-1, grad.shape[-1])
        dtype = flat.dtype
        grad_shrunk = (flat_grad @ b.to(dtype)).mul_(ctx.scale)  # (T, r)
        grad_b = (flat_grad.T @ shrunk).to(b.dtype).mul_(ctx.scale)
        grad_a = (grad_shrunk.T @ flat).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.weight.matmul_t(grad)
            if ctx.has_mask:
                grad_x = grad_x.addcmul_((grad_shrunk @ a.to(dtype)).view_as(grad_x), rest[0])
            else:
                grad_x.view(-1, grad_x.shape[-1]).addmm_(grad_shrunk, a.to(dtype))
        return grad_x, grad_a, grad_b, None, None, None


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
