"""Kernels against their plain references: values, gradients, ragged shapes, rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.kernels import attention
from tsugiki.kernels.attention import packed_attention, reference_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.linear import DenseWeight, LoraTerm, grouped_linear, reference_linear
from tsugiki.kernels.loss import Head, chunked_cross_entropy
from tsugiki.kernels.mlp import Feed, feed_forward
from tsugiki.kernels.norms import rms_norm, rotary


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 16]),
    softcap=st.sampled_from([None, 20.0]),
    sinks=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_packed_attention_is_each_document_alone(
    lengths: list[int], kv_heads: int, window: int | None, softcap: float | None, sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    q, k, v = (
        torch.randn(1, heads, total, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads)
    )
    extra = torch.randn(4, generator=generator, dtype=torch.float64) if sinks else None
    options = {"scale": 0.4, "window": window, "softcap": softcap, "sinks": extra}
    batch = ForwardBatch(tuple(lengths))
    out = packed_attention(q, k, v, batch, **options)  # type: ignore[arg-type]
    expected = reference_attention(q, k, v, tuple(lengths), **options)  # type: ignore[arg-type]
    assert torch.allclose(out, expected, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_buckets_hold_every_token_once_with_little_padding(lengths: list[int]) -> None:
    batch = ForwardBatch(tuple(lengths))
    places = torch.cat([b.target for b in batch.buckets])
    assert sorted(places.tolist()) == list(range(sum(lengths)))
    assert sum(b.gather.numel() for b in batch.buckets) <= sum(lengths) / 0.75 + 1


def test_attention_gradients() -> None:
    lengths = (3, 5, 1)
    q, k, v = (torch.randn(1, h, 9, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    batch = ForwardBatch(lengths)
    assert torch.autograd.gradcheck(lambda *t: packed_attention(*t, batch, scale=0.5), (q, k, v))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 60])
def test_blocks_of_queries_are_the_reference(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients to fp64's rounding; in bf16 no further from them than the reference."""
    monkeypatch.setattr(attention, "bodies_attend", lambda *_: False)
    lengths, total = (200, 50, 130), 380
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, h, total, 8, generator=generator) for h in (4, 2, 2)]
    upstream = torch.randn(1, total, 4, 8, generator=generator)

    def run(dtype: torch.dtype, reference: bool) -> list[torch.Tensor]:
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in given]
        q, k, v = leaves
        options = {"scale": 0.4, "window": window, "softcap": softcap}
        if reference:
            out = reference_attention(q, k, v, lengths, **options)  # type: ignore[arg-type]
        else:
            out = packed_attention(q, k, v, ForwardBatch(lengths), **options)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out, leaves, upstream.bfloat16().to(dtype))]

    def errors(found: list[torch.Tensor]) -> list[float]:
        return [
            float((x - e).detach().norm() / e.detach().norm())
            for x, e in zip(found, exact, strict=True)
        ]

    exact = run(torch.float64, reference=True)
    assert max(errors(run(torch.float64, reference=False))) < 1e-12
    ours = errors(run(torch.bfloat16, reference=False))
    plain = errors(run(torch.bfloat16, reference=True))
    assert all(a <= 1.2 * b for a, b in zip(ours, plain, strict=True)), (ours, plain)


def terms(dtype: torch.dtype, dropout: float = 0.0) -> list[LoraTerm | None]:
    return [
        LoraTerm(torch.randn(3, 6, dtype=dtype), torch.randn(5, 3, dtype=dtype), 1.5, dropout),
        None,
    ]


def test_linear_gradients() -> None:
    weight = DenseWeight(
        torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    )
    conv = DenseWeight(torch.randn(6, 4, dtype=torch.float64), transposed=True)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    a = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(grouped_linear(x, [weight, conv], [[LoraTerm(a, b, 1.5), None]]))

    assert torch.autograd.gradcheck(both, (x, a, b))
    assert torch.autograd.gradcheck(lambda a, b: both(x.detach(), a, b), (a, b)), "x without grad"


def test_linear_is_its_reference() -> None:
    weight = DenseWeight(torch.randn(5, 6))
    conv = DenseWeight(torch.randn(6, 4), transposed=True)
    x, both = torch.randn(1, 11, 6), terms(torch.float32)
    with torch.no_grad():
        plain = grouped_linear(x, [weight, conv], [both])
    trained = grouped_linear(x, [weight, conv], [both])
    for one, two, expected in zip(
        plain, trained, reference_linear(x, [weight, conv], both), strict=True
    ):
        assert torch.allclose(one, expected, atol=1e-5)
        assert torch.equal(one, two), "with and without gradients: the same numbers"


def test_bf16_error_is_no_worse_than_the_references() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(1, 300, 128), torch.randn(96, 128) / 11
    term = LoraTerm(torch.randn(8, 128) / 11, torch.randn(96, 8), 2.0)
    exact = reference_linear(x, [DenseWeight(w)], [term])[0]
    low = x.bfloat16()
    weight = DenseWeight(w.bfloat16())
    ours = grouped_linear(low, [weight], [[term]])[0].float()
    plain = reference_linear(low, [weight], [term])[0].float()
    assert (ours - exact).pow(2).mean() <= 1.2**2 * (plain - exact).pow(2).mean()


def test_rows_get_their_own_adapter() -> None:
    weight = DenseWeight(torch.randn(5, 6))
    adapters = [[LoraTerm(torch.randn(r, 6), torch.randn(5, r), 0.5)] for r in (2, 4)]
    x = torch.randn(1, 12, 6)
    batch = ForwardBatch((3, 4, 4, 1), adapters=(1, -1, 0, 0))
    out = grouped_linear(x, [weight], adapters, batch)[0]
    for which, begin, end in ((1, 0, 3), (None, 3, 7), (0, 7, 12)):
        alone = [] if which is None else [adapters[which]]
        expected = grouped_linear(x[:, begin:end], [weight], alone)[0]
        assert torch.allclose(out[:, begin:end], expected, atol=1e-6)


def test_dropout_scales_and_is_seeded() -> None:
    weight = DenseWeight(torch.zeros(5, 6))
    term = LoraTerm(torch.eye(6)[:3], torch.ones(5, 3), 1.0, dropout=0.5)
    x = torch.ones(1, 4000, 6)
    torch.manual_seed(3)
    first = grouped_linear(x, [weight], [[term]])[0]
    torch.manual_seed(3)
    second = grouped_linear(x, [weight], [[term]])[0]
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0, 4.0, 6.0}
    assert float(first.mean()) == pytest.approx(3.0, abs=0.15)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x = torch.randn(60, 6, dtype=torch.float64, requires_grad=True)
    square = DenseWeight(torch.randn(6, 6, dtype=torch.float64))
    term = LoraTerm(
        *(torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in "AB"), 1.0
    )
    heads = x.view(1, 1, 60, 6)
    places = torch.arange(60) % 6
    turn = torch.randn(1, 60, 6, dtype=torch.float64)
    outputs = {
        "projection": grouped_linear(x, [square], [[term]])[0],
        "feed-forward": feed_forward(
            x, Feed(((square, term), (square, None)), (square, None), "silu")
        ),
        "norm": rms_norm(x, torch.ones(6, dtype=torch.float64), 1e-6),
        "rotary": rotary(x[None], turn, turn, 1),
        "attention": packed_attention(heads, heads, heads, ForwardBatch((60,)), scale=1.0),
        "loss": chunked_cross_entropy(x, Head(square), places),
    }
    for name, out in outputs.items():
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        print(name)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            grad.square().sum().backward()
