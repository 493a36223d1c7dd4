"""Kernels of the training step: plain references, ragged shapes, gradients, rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsugiki.kernels import attention, loss
from tsugiki.kernels.attention import causal_mask, masked_attention
from tsugiki.kernels.blocks import block_attention
from tsugiki.kernels.dropout import dropped
from tsugiki.kernels.linear import DenseWeight, LoraTerm, grouped_linear
from tsugiki.kernels.loss import Head, chunked_cross_entropy, reference_cross_entropy
from tsugiki.kernels.mlp import Feed, feed_forward, reference_feed
from tsugiki.kernels.norms import reference_rms_norm, reference_rotary, rms_norm, rotary

pytestmark = pytest.mark.usefixtures("kernels")

FORMS = [
    (form, activation)
    for form in ("gated", "fused", "plain")
    for activation in ("silu", "gelu", "gelu_tanh")
]


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul_(scale).to(dtype)


def make_feed(
    form: str, activation: str, k: int, m: int, dtype: torch.dtype, *, lora: bool = True, r: int = 3
) -> Feed:
    def part(out: int, width: int, bias: bool = False) -> tuple[DenseWeight, LoraTerm | None]:
        weight = DenseWeight(
            draw(out, width, dtype=dtype, scale=width**-0.5),
            draw(out, dtype=dtype) if bias else None,
        )
        term = LoraTerm(
            draw(r, width, dtype=dtype, scale=width**-0.5).requires_grad_(),
            draw(out, r, dtype=dtype).requires_grad_(),
            0.7,
        )
        return weight, term if lora else None

    up = {
        "gated": (part(m, k), part(m, k)),
        "fused": (part(2 * m, k),),
        "plain": (part(m, k, True),),
    }
    return Feed(up[form], part(k, m, form == "plain"), activation, fused=form == "fused")


@pytest.mark.parametrize(("form", "activation"), FORMS)
@pytest.mark.parametrize("rows", [1, 5, 131])
def test_feed_forward_is_its_reference(form: str, activation: str, rows: int) -> None:
    torch.manual_seed(rows)
    feed = make_feed(form, activation, 8, 12, torch.float64)
    x = draw(1, rows, 8, dtype=torch.float64).requires_grad_()
    leaves = [x, *(t for term in feed.terms for t in (term.A, term.B))]
    grad = draw(1, rows, 8, dtype=torch.float64)
    ours = torch.autograd.grad(feed_forward(x, feed), leaves, grad)
    plain = torch.autograd.grad(reference_feed(x, feed), leaves, grad)
    assert torch.allclose(feed_forward(x, feed), reference_feed(x, feed), atol=1e-12)
    for one, two in zip(ours, plain, strict=True):
        assert torch.allclose(one, two, atol=1e-11)


@pytest.mark.parametrize(("form", "activation"), FORMS)
def test_feed_forward_gradcheck(form: str, activation: str) -> None:
    torch.manual_seed(0)
    feed = make_feed(form, activation, 4, 6, torch.float64, r=2)
    x = draw(3, 4, dtype=torch.float64).requires_grad_()
    leaves = [t for term in feed.terms for t in (term.A, term.B)]
    assert torch.autograd.gradcheck(lambda x, *_: feed_forward(x, feed), (x, *leaves))


def test_feed_forward_without_adapters_and_without_gradients() -> None:
    feed = make_feed("gated", "silu", 8, 12, torch.float64, lora=False)
    x = draw(2, 7, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: feed_forward(x, feed), (x,))
    with torch.no_grad():
        assert torch.allclose(feed_forward(x, feed), reference_feed(x, feed), atol=1e-12)


@given(
    length=st.integers(1, 300),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 7, 130]),
    keep=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_block_attention_is_plain_attention(
    length: int, kv_heads: int, window: int | None, keep: bool
) -> None:
    torch.manual_seed(length)
    q, k, v = (
        torch.randn(2, h, length, d, dtype=torch.float64, requires_grad=True)
        for h, d in ((4, 8), (kv_heads, 8), (kv_heads, 6))
    )
    grad = torch.randn(2, length, 4, 6, dtype=torch.float64)
    out = block_attention(q, k, v, scale=0.4, window=window, keep=keep)
    mask = causal_mask(length, window, q.device)
    plain = masked_attention(q, k, v, mask, scale=0.4).transpose(1, 2)
    assert torch.allclose(out, plain, atol=1e-12)
    for one, two in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(plain, (q, k, v), grad),
        strict=True,
    ):
        assert torch.allclose(one, two, atol=1e-11)


@pytest.mark.parametrize("keep", [True, False])
def test_block_attention_gradcheck(keep: bool) -> None:
    q, k, v = (torch.randn(1, h, 5, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *t: block_attention(*t, scale=0.5, keep=keep), (q, k, v))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 2, 3, 5), (1, 700, 130)])
def test_rms_norm(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1], dtype=torch.float64)
    ours = rms_norm(x, weight, 1e-6, offset=offset)
    plain = reference_rms_norm(x, weight, 1e-6, offset=offset)
    assert torch.allclose(ours, plain, atol=1e-12)
    grad = torch.randn_like(x)
    assert torch.allclose(
        torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(plain, x, grad)[0], atol=1e-12
    )
    if x.numel() < 50:
        assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-6, offset=offset), (x,))


@pytest.mark.parametrize("turned", [8, 4])
def test_rotary(turned: int) -> None:
    x = torch.randn(1, 5, 3 * 8, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(1, 5, turned, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(rotary(x, cos, sin, 3), reference_rotary(x, cos, sin, 3), atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin, 3), (x,))


HEADS = [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)]


@pytest.mark.parametrize(("scale", "softcap"), HEADS)
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_cross_entropy_is_its_reference(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float | None, rows: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 11 * 13)  # several ragged chunks
    monkeypatch.setattr(loss, "CACHED", 11 * 3)
    torch.manual_seed(rows)
    head = Head(
        DenseWeight(draw(11, 6, dtype=torch.float64), draw(11, dtype=torch.float64)), scale, softcap
    )
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,))
    ours = chunked_cross_entropy(hidden, head, targets)
    plain = reference_cross_entropy(hidden, head, targets)
    assert torch.allclose(ours, plain, atol=1e-11)
    for factor in (1.0, 0.37):
        one, two = (
            torch.autograd.grad(factor * value, hidden, retain_graph=True)[0]
            for value in (ours, plain)
        )
        assert torch.allclose(one, two, atol=1e-11)
    if 0 < rows < 10:
        assert torch.autograd.gradcheck(
            lambda h: chunked_cross_entropy(h, head, targets), (hidden,)
        )


def error(values: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error over several tensors."""
    return max(
        float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True)
    )


def no_worse(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], leaves: list[Tensor]
) -> None:
    """Output and gradients in bf16: at most 1.2 times as far from fp64 as the reference's."""

    def all_of(run: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = run(*inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
        grad = grad if out.dim() else torch.ones(())
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    exact = all_of(plain, torch.float64)
    for one, two, e in zip(
        all_of(ours, torch.bfloat16), all_of(plain, torch.bfloat16), exact, strict=True
    ):
        # one number's error is luck, so a loss gets a bound of its own
        bound = 1.2 * error([two], [e]) if e.dim() else 1e-4
        assert error([one], [e]) <= bound


def test_bf16_is_no_further_from_exact_than_the_references() -> None:
    torch.manual_seed(0)
    low: dict[str, Any] = {"dtype": torch.bfloat16}
    x = draw(1, 200, 64, **low)
    for form, activation in FORMS:
        feed = make_feed(form, activation, 64, 160, torch.bfloat16, r=8)

        def run(function: Callable[[Tensor, Feed], Tensor], feed: Feed) -> Callable[..., Tensor]:
            def go(x: Tensor, *pairs: Tensor) -> Tensor:
                given = iter(pairs)

                def part(weight: Any, term: LoraTerm | None) -> Any:
                    assert term is not None
                    bias = None if weight.bias is None else weight.bias.to(x.dtype)
                    return (
                        DenseWeight(weight.weight.to(x.dtype), bias),
                        LoraTerm(next(given), next(given), term.scale),
                    )

                up = tuple(part(*p) for p in feed.up)
                return function(x, Feed(up, part(*feed.down), feed.activation, feed.fused))

            return go

        pairs = [t for term in feed.terms for t in (term.A, term.B)]
        no_worse(run(feed_forward, feed), run(reference_feed, feed), [x, *pairs])
    weight = draw(64, **low)
    no_worse(
        lambda x: rms_norm(x, weight.to(x.dtype), 1e-6),
        lambda x: reference_rms_norm(x, weight.to(x.dtype), 1e-6),
        [x],
    )
    angles = torch.rand(1, 200, 8, dtype=torch.float64) * 6
    cos, sin = (f(torch.cat((angles, angles), -1)).bfloat16() for f in (torch.cos, torch.sin))
    no_worse(
        lambda x: rotary(x, cos.to(x.dtype), sin.to(x.dtype), 4),
        lambda x: reference_rotary(x, cos.to(x.dtype), sin.to(x.dtype), 4),
        [x],
    )
    q, k, v = draw(2, 4, 150, 32, **low), draw(2, 2, 150, 32, **low), draw(2, 2, 150, 32, **low)
    mask = causal_mask(150, None, q.device)
    for keep in (True, False):
        no_worse(
            lambda q, k, v, keep=keep: block_attention(q, k, v, scale=32**-0.5, keep=keep),
            lambda q, k, v: masked_attention(q, k, v, mask, scale=32**-0.5).transpose(1, 2),
            [q, k, v],
        )
    targets = torch.randint(0, 301, (200,))
    table = draw(301, 64, dtype=torch.bfloat16, scale=0.3)
    for scale, softcap in HEADS:
        no_worse(
            lambda h, s=scale, c=softcap: chunked_cross_entropy(
                h, Head(DenseWeight(table.to(h.dtype)), s, c), targets, 1 / 77
            ),
            lambda h, s=scale, c=softcap: reference_cross_entropy(
                h, Head(DenseWeight(table.to(h.dtype)), s, c), targets, 1 / 77
            ),
            [x[0]],
        )


def test_a_sure_prediction_keeps_its_gradient_in_bf16() -> None:
    """p(target) = 0.999: p − 1 taken after rounding p to bf16 would be zero."""
    weight = DenseWeight(torch.eye(4).bfloat16())
    hidden = torch.tensor([[8.0, 0, 0, 0]]).bfloat16().requires_grad_()
    chunked_cross_entropy(hidden, Head(weight), torch.tensor([0])).backward()
    exact = torch.softmax(torch.tensor([8.0, 0, 0, 0]), 0)[0] - 1
    assert float(hidden.grad[0, 0]) == pytest.approx(float(exact), rel=0.01)


@given(rows=st.integers(1, 3000), width=st.sampled_from([1, 8, 300, 5000]))
@settings(max_examples=20, deadline=None)
def test_a_mask_is_found_again_by_its_seed(rows: int, width: int) -> None:
    x = torch.ones(min(rows, 400_000 // width + 1), width)
    first, again, other = (dropped(x, 0.25, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert set(first.unique().tolist()) <= {
        0.0,
        1 / 0.75 if x.dtype != torch.float32 else first.max().item(),
    }
    if x.numel() > 20_000:
        share = float((first == 0).float().mean())
        assert share == pytest.approx(0.25, abs=0.02)
        both = float(((first == 0) & (other == 0)).float().mean())
        assert both == pytest.approx(0.0625, abs=0.02), "masks of two seeds are independent"


def test_dropout_in_the_backward_pass_is_the_forwards() -> None:
    """With one fixed mask the adapter is linear: its gradients are those of the masked input."""
    torch.manual_seed(0)
    weight = DenseWeight(torch.randn(5, 6, dtype=torch.float64))
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(4)
        return grouped_linear(x, [weight], [[LoraTerm(a, b, 1.5, dropout=0.3)]])[0]

    assert torch.autograd.gradcheck(run, (x, a, b))


def test_a_dropped_feed_forward_repeats_and_has_its_own_gradients() -> None:
    feed = make_feed("gated", "silu", 4, 6, torch.float64, r=2)
    wet = Feed(
        tuple((w, LoraTerm(t.A, t.B, t.scale, 0.4)) for w, t in feed.up),
        (feed.down[0], LoraTerm(feed.down[1].A, feed.down[1].B, 0.7, 0.4)),
        "silu",
    )
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(4)
        return feed_forward(x, wet)

    leaves = [t for term in wet.terms for t in (term.A, term.B)]
    assert torch.autograd.gradcheck(run, (x, *leaves))
    assert not torch.allclose(run(x), feed_forward(x, feed))


def test_long_documents_take_the_blocks_and_short_ones_agree() -> None:
    torch.manual_seed(0)
    for length in (attention.BLOCKS_FROM - 1, attention.BLOCKS_FROM):
        q = torch.randn(1, 2, length, 8, dtype=torch.float64)
        out = attention.causal_attention(q, q, q, scale=0.3)
        mask = causal_mask(length, None, q.device)
        assert torch.allclose(out, masked_attention(q, q, q, mask, scale=0.3), atol=1e-12)
