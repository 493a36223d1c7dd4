"""The feed-forward block with adapters, whole: what is saved is x, the products before the
activation, and the adapters' S; the wide activation itself is computed again in the backward pass.

Gated (Llama and its kin, gate and up apart or in one matrix) and plain (GPT-2). Elementwise work
goes over row blocks that stay in a core's cache. Knows no model and no names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.linear import (
    FrozenWeight,
    LoraTerm,
    Shrunk,
    grad_shrunk,
    grow,
    pair_gradients,
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


def _blocks(rows: int) -> Iterator[slice]:
    for begin in range(0, rows, ROWS):
        yield slice(begin, min(begin + ROWS, rows))


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
        wide = [weight.matmul(flat) for weight, _ in feed.up]
        above = _grow(flat, feed.up, wide, rate)
        e, g = _halves(wide, feed.fused)
        h = torch.empty(e.shape, dtype=e.dtype, device=e.device)
        for rows in _blocks(len(flat)):
            _activate(e[rows], feed.activation, h[rows])
            if g is not None:
                h[rows].mul_(g[rows])
        y = feed.down[0].matmul(h)
        below = _grow(h, (feed.down,), [y], rate)
        groups = [group for group in (above, below) if group is not None]
        ctx.feed, ctx.shape = feed, x.shape
        ctx.layouts = [group and (group.columns, rate, group.seed) for group in (above, below)]
        ctx.save_for_backward(flat, *wide, *(t for g in groups for t in (g.a, g.s)), *pairs)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        feed: Feed = ctx.feed
        flat, *rest = ctx.saved_tensors
        saved = iter(rest)
        wide = [next(saved) for _ in feed.up]
        above, below = (
            layout and Shrunk(flat, next(saved), next(saved), *layout) for layout in ctx.layouts
        )
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])
        grad_h = feed.down[0].matmul_t(grad_y)
        if below is not None:
            down_grad_s = grad_shrunk(below, [feed.down[1]], [grad_y])
            below.add_grad_x(grad_h, down_grad_s)
        h, grad_wide = _through_activation(grad_h, wide, feed, keep_h=below is not None)
        pair_grads: list[Tensor] = []
        if above is not None:
            up_terms = [term for _, term in feed.up]
            grad_s = grad_shrunk(above, up_terms, grad_wide)
            pair_grads = pair_gradients(above, up_terms, grad_wide, grad_s)
        if below is not None:
            group = dataclasses.replace(below, x=h)
            pair_grads += pair_gradients(group, [feed.down[1]], [grad_y], down_grad_s)
        grad_x = None
        if ctx.needs_input_grad[0]:
            for (weight, _), grad in zip(feed.up, grad_wide, strict=True):
                grad_x = weight.matmul_t(grad, grad_x)
            assert grad_x is not None
            if above is not None:
                above.add_grad_x(grad_x, grad_s)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *pair_grads


def _through_activation(
    grad_h: Tensor, wide: list[Tensor], feed: Feed, keep_h: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """From dh (T, m), which is used up: h again where wanted, and the gradients of `wide`."""
    e, g = _halves(wide, feed.fused)
    h = torch.empty_like(grad_h) if keep_h else None
    if g is None:
        grad_e = torch.empty_like(grad_h)
        for rows in _blocks(len(e)):
            if h is not None:
                _activate(e[rows], feed.activation, h[rows])
            _activate_backward(grad_h[rows], e[rows], feed.activation, grad_e[rows])
        return h, [grad_e]
    # dh is free once its block is done: the gradient of up takes its place
    grad_wide = [torch.empty_like(wide[0]), *([] if feed.fused else [grad_h])]
    grad_e, grad_g = _halves(grad_wide, feed.fused)
    assert grad_g is not None
    act = torch.empty(min(ROWS, len(e)), e.shape[1], dtype=e.dtype, device=e.device)
    product = torch.empty_like(act)
    for rows in _blocks(len(e)):
        count = rows.stop - rows.start
        a = _activate(e[rows], feed.activation, act[:count])
        if h is not None:
            torch.mul(a, g[rows], out=h[rows])
        grad_a = torch.mul(grad_h[rows], g[rows], out=product[:count])
        torch.mul(grad_h[rows], a, out=grad_g[rows])
        _activate_backward(grad_a, e[rows], feed.activation, grad_e[rows])
    return h, grad_wide


def _grow(x: Tensor, parts: Sequence[Part], outputs: list[Tensor], rate: float) -> Shrunk | None:
    terms = [term for _, term in parts]
    return grow(x, terms, outputs, rate) if any(t is not None for t in terms) else None
