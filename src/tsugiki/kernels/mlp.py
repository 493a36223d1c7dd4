"""The feed-forward block with adapters, whole: what is saved is x, the products before the
activation, and the adapters' S; the wide activation itself is computed again in the backward pass.

Gated (Llama and its kin, gate and up apart or in one matrix) and plain (GPT-2). Elementwise work
goes over row blocks that stay in a core's cache. Knows no model and no names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsugiki.kernels.backend import bodies
from tsugiki.kernels.linear import (
    FrozenWeight,
    LoraTerm,
    Shrunk,
    grad_input,
    grad_shrunk,
    grads_of_pairs,
    project,
)

ROWS = 128  # of one elementwise block; a few blocks of 5,000 columns fit a core's cache

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

Part = tuple[FrozenWeight, LoraTerm | None]


@dataclass(frozen=True)
class Feed:
    """The projections of one feed-forward block.

    up: one projection (plain), two (gate, up), or one of twice the width with `fused`.
    down: back to the hidden width.
    activation: 'silu', 'gelu' or 'gelu_tanh'.
    """

    up: tuple[Part, ...]
    down: Part
    activation: str
    fused: bool = False

    @property
    def gated(self) -> bool:
        """Whether one half multiplies the activation of the other."""
        return self.fused or len(self.up) == 2

    @property
    def terms(self) -> list[LoraTerm]:
        """All adapters' terms, in order."""
        return [term for _, term in (*self.up, self.down) if term is not None]


def feed_forward(x: Tensor, feed: Feed) -> Tensor:
    """x (…, k) → (…, k)."""
    pairs = [tensor for term in feed.terms for tensor in (term.A, term.B)]
    rates = {term.dropout for term in feed.terms}
    assert len(rates) <= 1, "one rate a block"
    rate = rates.pop() if rates and torch.is_grad_enabled() else 0.0
    out = _Feed.apply(x, feed, rate, *pairs)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def reference_feed(x: Tensor, feed: Feed) -> Tensor:
    """The plain meaning of `feed_forward`, without dropout, for tests."""

    def project(x: Tensor, part: Part) -> Tensor:
        weight, term = part
        y = weight.matmul(x)
        if term is None:
            return y
        return y + term.scale * F.linear(F.linear(x, term.A.to(x.dtype)), term.B.to(x.dtype))

    wide = [project(x, part) for part in feed.up]
    if feed.fused:
        wide = list(wide[0].chunk(2, dim=-1))
    if feed.activation == "silu":
        h = F.silu(wide[0])
    else:
        h = F.gelu(wide[0], approximate=_APPROXIMATE[feed.activation])
    return project(h * wide[1] if feed.gated else h, feed.down)


def _activate(e: Tensor, activation: str, out: Tensor) -> Tensor:
    if activation == "silu":
        torch.ops.aten.silu.out(e, out=out)
    else:
        torch.ops.aten.gelu.out(e, approximate=_APPROXIMATE[activation], out=out)
    return out


def _activate_backward(grad: Tensor, e: Tensor, activation: str, out: Tensor) -> None:
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, e, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            grad, e, approximate=_APPROXIMATE[activation], grad_input=out
        )


def _blocks(x: Tensor) -> Iterator[slice]:
    """Rows of x that are worked on together; a GPU takes all, it has no cache to stay in."""
    rows = len(x)
    step = ROWS if x.device.type == "cpu" else max(1, rows)
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _gate(e: Tensor, g: Tensor | None, activation: str) -> Tensor:
    """act(e)·g (T, m)."""
    fused = bodies(e, "activations")
    if fused is not None and fused.activates(activation):
        gated: Tensor = fused.gate(e, g, activation)
        return gated
    h = torch.empty(e.shape, dtype=e.dtype, device=e.device)
    for rows in _blocks(e):
        _activate(e[rows], activation, h[rows])
        if g is not None:
            h[rows].mul_(g[rows])
    return h


def _halves(wide: list[Tensor], fused: bool) -> tuple[Tensor, Tensor | None]:
    """What the activation sees, and what multiplies it."""
    if fused:
        middle = wide[0].shape[1] // 2
        return wide[0][:, :middle], wide[0][:, middle:]
    return wide[0], wide[1] if len(wide) == 2 else None


class _Feed(torch.autograd.Function):
    """(T, k) → (T, m) → (T, k); the module's docstring says what is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, feed: Feed, rate: float, *pairs: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, terms = zip(*feed.up, strict=True)
        wide, above = project(flat, weights, terms, rate)
        h = _gate(*_halves(wide, feed.fused), feed.activation)
        (y,), below = project(h, feed.down[:1], feed.down[1:], rate)
        groups = [group for group in (above, below) if group is not None]
        ctx.feed, ctx.shape = feed, x.shape
        ctx.layouts = [group and (group.columns, rate, group.seed) for group in (above, below)]
        ctx.save_for_backward(flat, *wide, *(t for g in groups for t in (g.a, g.s)), *pairs)
        return y.view(*x.shape[:-1], -1).data  # no view: it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        feed: Feed = ctx.feed
        flat, *rest = ctx.saved_tensors
        saved = iter(rest)
        wide = [next(saved) for _ in feed.up]
        above, below = (
            layout and Shrunk(flat, next(saved), next(saved), *layout) for layout in ctx.layouts
        )
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])
        weights, terms = zip(*feed.up, strict=True)
        grad_s, grads_b = grad_shrunk(below, feed.down[1:], [grad_y])
        grad_h = grad_input(feed.down[:1], [grad_y], below, grad_s)
        h, grad_wide = _through_activation(grad_h, wide, feed, keep_h=below is not None)
        if below is not None:
            below = dataclasses.replace(below, x=h)
        down_pairs = grads_of_pairs(below, feed.down[1:], grad_s, grads_b)
        grad_s, grads_b = grad_shrunk(above, terms, grad_wide)
        pair_grads = grads_of_pairs(above, terms, grad_s, grads_b) + down_pairs
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(weights, grad_wide, above, grad_s).view(ctx.shape)
        return grad_x, None, None, *pair_grads


def _through_activation(
    grad_h: Tensor, wide: list[Tensor], feed: Feed, keep_h: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """From dh (T, m), which is used up: h again where wanted, and the gradients of `wide`."""
    e, g = _halves(wide, feed.fused)
    h = torch.empty_like(grad_h) if keep_h else None
    # dh is free once its block is done: the gradient of up takes its place
    grad_wide = [torch.empty_like(wide[0]), *([grad_h] if len(wide) == 2 else [])]
    grad_e, grad_g = _halves(grad_wide, feed.fused)
    fused = bodies(grad_h, "activations")
    if fused is not None and fused.activates(feed.activation):
        fused.gate_back(grad_h, e, g, feed.activation, h, grad_e, grad_g)
        return h, grad_wide
    if g is None:
        for rows in _blocks(e):
            if h is not None:
                _activate(e[rows], feed.activation, h[rows])
            _activate_backward(grad_h[rows], e[rows], feed.activation, grad_e[rows])
        return h, grad_wide
    assert grad_g is not None
    largest = next(_blocks(e), slice(0, 0))
    act = torch.empty(largest.stop, e.shape[1], dtype=e.dtype, device=e.device)
    product = torch.empty_like(act)
    for rows in _blocks(e):
        count = rows.stop - rows.start
        a = _activate(e[rows], feed.activation, act[:count])
        if h is not None:
            torch.mul(a, g[rows], out=h[rows])
        grad_a = torch.mul(grad_h[rows], g[rows], out=product[:count])
        torch.mul(grad_h[rows], a, out=grad_g[rows])
        _activate_backward(grad_a, e[rows], feed.activation, grad_e[rows])
    return h, grad_wide
