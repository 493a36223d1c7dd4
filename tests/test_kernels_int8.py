"""int8 products: exact where they can be, close where they cannot, outliers apart, both ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsugiki.kernels import int8
from tsugiki.kernels.int8 import Int8Weight, Scratch, quantise
from tsugiki.kernels.linear import DenseWeight, FrozenWeight, LoraTerm, WideWeight, grouped_linear
from tsugiki.kernels.loss import Head, chunked_cross_entropy
from tsugiki.kernels.quantized import Workspace
from tsugiki.models.quantized import quantized

pytestmark = pytest.mark.usefixtures("kernels")

RAGGED = [(1, 7, 5), (5, 64, 33), (131, 100, 257), (300, 48, 1)]  # (T, in, out)


def dense(
    out: int, width: int, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> DenseWeight:
    weight = (torch.randn(out, width) / math.sqrt(width)).to(dtype)
    return DenseWeight(weight, torch.randn(out).to(dtype) if bias else None)


def in_int8(weight: FrozenWeight) -> Int8Weight:
    return Int8Weight.of(weight, Scratch())


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1 << 30))
def test_whole_numbers_multiply_exactly(rows: int, width: int, out: int, seed: int) -> None:
    """Where every row's largest entry is 127 times a power of two, no code is rounded."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, m: int) -> Tensor:
        codes = torch.randint(-127, 128, (n, m), generator=generator).float()
        codes[torch.arange(n), torch.randint(0, m, (n,), generator=generator)] = 127.0
        return codes * 2.0 ** torch.randint(-6, 7, (n, 1), generator=generator)

    x, w = draw(rows, width), draw(out, width)
    assert torch.equal(in_int8(DenseWeight(w)).matmul(x).double(), x.double() @ w.double().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "width", "out"), RAGGED)
def test_error_against_fp32_both_ways(rows: int, width: int, out: int, dtype: torch.dtype) -> None:
    """Two roundings to 1/254 of a row's largest entry, each under 1 % of a normal row."""
    torch.manual_seed(rows)
    source = dense(out, width, bias=True, dtype=dtype)
    weight, exact = in_int8(source), WideWeight(source)
    x, g = torch.randn(rows, width).to(dtype), torch.randn(rows, out).to(dtype)
    onto = torch.randn(rows, width).to(dtype)
    assert weight.matmul(x).dtype == dtype
    assert error(weight.matmul(x), exact.matmul(x)) < 0.015
    assert error(weight.matmul_t(g), exact.matmul_t(g)) < 0.02
    both = weight.matmul_t(g, onto.clone())
    assert error(both.float() - onto.float(), exact.matmul_t(g)) < 0.03
    assert weight.matmul(x.view(1, rows, width)).shape == (1, rows, out)
    assert weight.shape == (out, width)
    assert torch.equal(weight.dense(), source.dense())
    assert torch.equal(weight.rows(torch.tensor([out - 1])), source.rows(torch.tensor([out - 1])))


def test_conv1d_is_read_through_the_same_door() -> None:
    torch.manual_seed(0)
    source = DenseWeight(torch.randn(48, 80) / 7, torch.randn(80), transposed=True)
    x = torch.randn(9, 48)
    assert error(in_int8(source).matmul(x), source.matmul(x)) < 0.015
    g = torch.randn(9, 80)
    assert error(in_int8(source).matmul_t(g), source.matmul_t(g)) < 0.015


def planted(size: float) -> Tensor:
    x = torch.randn(64, 512)
    x[:, [5, 300]] *= size
    return x


@pytest.mark.parametrize("size", [60.0, 1000.0])
def test_planted_outliers_go_apart(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost without it is all but the outliers' own part."""
    torch.manual_seed(1)
    source = dense(96, 512)
    x = planted(size)
    usual = x.clone()
    usual[:, [5, 300]] = 0

    def rest(y: Tensor) -> float:
        """Error of the part that the other 510 columns make."""
        seen = (
            y.double()
            - in_int8(source)
            ._columns(torch.tensor([5, 300]), torch.float64)
            .T.mm(x[:, [5, 300]].double().T)
            .T
        )
        return error(seen, usual.double() @ source.dense().double().T)

    codes = quantise(x, Scratch())
    assert codes.apart is not None
    assert set(codes.apart.columns.tolist()) == {5, 300}
    assert float(codes.codes[:, [5, 300]][codes.apart.rows].abs().max()) == 0
    # a share of rows has small draws in these columns: they stay in, and cost little
    assert rest(in_int8(source).matmul(x)) < 0.03
    monkeypatch.setattr(int8, "OUTLIER", math.inf)
    assert rest(in_int8(source).matmul(x)) > 0.1


def test_outliers_of_gradients_go_apart() -> None:
    torch.manual_seed(2)
    source = dense(512, 96)
    g = planted(1000.0)
    exact = WideWeight(source)
    g[:, [5, 300]] *= (torch.arange(64) % 2)[:, None]  # only some rows have them
    assert error(in_int8(source).matmul_t(g), exact.matmul_t(g)) < 0.015
    quiet = g[::2]
    assert error(in_int8(source).matmul_t(g)[::2], exact.matmul_t(quiet)) < 0.02


def test_a_softmaxs_small_entries_do_not_vanish() -> None:
    """Of a thousand alike rows the mean keeps what rounding to the nearest makes zero in each."""
    torch.manual_seed(8)
    codes = torch.randint(-127, 128, (200, 48)).float()
    codes[:, 0] = 127  # so that all scales are one
    plain = in_int8(DenseWeight(codes))
    row = torch.full((200,), 0.3 / 127)  # one entry is no outlier among so few
    row[17] = 1.0
    exact = row.double() @ codes.double() - codes[17]

    def lost(weight: Int8Weight) -> float:
        """Of what the small entries give in the mean over the rows."""
        mean = weight.matmul_t(row.expand(1000, 200).contiguous()).double().mean(0)
        return error(mean - codes[17], exact)

    assert lost(plain) > 0.99
    assert lost(dataclasses.replace(plain, dither=True)) < 0.2


def test_chance_never_leaves_the_codes() -> None:
    """127 stays 127, in any row, and the same entries get the same codes again."""
    x = torch.ones(700, 900)
    x[::2] *= -1
    once = quantise(x, Scratch(), dither=True)
    assert torch.equal(once.codes, (127 * x).to(torch.int8))
    noisy = torch.randn(64, 900)
    twice = [quantise(noisy, Scratch(), dither=True).codes.clone() for _ in range(2)]
    assert torch.equal(twice[0], twice[1])
    wide = torch.randn(2, int8.NOISE)
    assert (
        error(
            quantise(wide, Scratch(), dither=True).codes * 1.0,
            wide * 127 / wide.abs().amax(1, keepdim=True),
        )
        < 0.05
    )


def test_a_normal_row_has_no_outliers() -> None:
    torch.manual_seed(3)
    assert quantise(torch.randn(500, 900), Scratch()).apart is None


def test_outliers_everywhere_do_not_run_away() -> None:
    torch.manual_seed(4)
    heavy = torch.distributions.StudentT(1.2).sample((64, 400))
    codes = quantise(heavy, Scratch())
    assert codes.apart is not None
    assert len(codes.apart.columns) <= 400 // int8.SHARE
    source = dense(64, 400)
    exact = heavy.double() @ source.dense().double().T
    assert error(in_int8(source).matmul(heavy), exact) < 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    """The run's own check must see it, and only in its row."""
    weight = in_int8(dense(12, 32))
    x = torch.randn(4, 32)
    x[2, 7] = bad
    y = weight.matmul(x)
    assert not bool(torch.isfinite(y[2]).any())
    assert bool(torch.isfinite(y[[0, 1, 3]]).all())


def test_rows_of_zeros_give_the_bias() -> None:
    source = dense(6, 10, bias=True)
    y = in_int8(source).matmul(torch.zeros(3, 10))
    assert source.bias is not None
    assert torch.equal(y, source.bias.expand(3, 6))
    assert in_int8(source).matmul(torch.zeros(0, 10)).shape == (0, 6)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = torch.randn(4, 8)
    weight[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        in_int8(DenseWeight(weight))


def test_an_input_is_quantised_once_for_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own: Callable[..., object] = int8.quantise
    monkeypatch.setattr(
        int8, "quantise", lambda *given, **more: calls.append(1) or own(*given, **more)
    )
    scratch = Scratch()
    weights = [Int8Weight.of(dense(8, 16), scratch) for _ in range(3)]
    x = torch.randn(5, 16)
    before = [w.matmul(x) for w in weights]
    assert len(calls) == 1
    x.mul_(2)  # the same memory, other numbers
    after = weights[0].matmul(x)
    assert len(calls) == 2
    assert torch.allclose(after, 2 * before[0])
    weights[0].matmul_t(torch.randn(5, 8))  # uses the codes' memory
    assert torch.equal(weights[0].matmul(x), after)


def test_large_products_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    source = dense(70, 50, bias=True)
    x, g = torch.randn(33, 50), torch.randn(33, 70)
    whole = in_int8(source).matmul(x), in_int8(source).matmul_t(g)
    for name, value in {"CELLS": 90, "PRODUCTS": 64, "TALLEST": 8}.items():
        monkeypatch.setattr(int8, name, value)
    assert torch.equal(in_int8(source).matmul(x), whole[0])
    assert torch.equal(in_int8(source).matmul_t(g), whole[1])
    monkeypatch.setattr(int8, "GROUP", 20)  # scales of their own: not the same, and no worse
    exact = WideWeight(source).matmul_t(g)
    assert error(in_int8(source).matmul_t(g), exact) < 1.1 * error(whole[1], exact)
    onto = torch.randn(33, 50)
    assert torch.allclose(
        in_int8(source).matmul_t(g, onto.clone()) - onto, in_int8(source).matmul_t(g), atol=1e-5
    )


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_storage_in_few_bits(method: str) -> None:
    """Codes that are stored are the codes that multiply: int8 storage costs nothing more."""
    torch.manual_seed(6)
    module = torch.nn.Linear(64, 96)
    frozen = quantized(method, module, module.weight.detach(), Workspace(), torch.float32).frozen
    weight = in_int8(frozen)
    x = torch.randn(7, 64)
    assert error(weight.matmul(x), frozen.matmul(x)) < 0.02
    if method == "int8":
        assert weight.packed.data_ptr() == frozen.codes.packed.data_ptr()  # type: ignore[attr-defined]
        assert weight.nbytes - frozen.nbytes == 96 * 4


def test_adapters_and_head_on_int8_products() -> None:
    """The gradients that training sees, through the operations that call these products."""
    torch.manual_seed(7)
    source, table = dense(48, 64), dense(300, 48)
    a, b = torch.randn(4, 64) / 8, torch.randn(48, 4) / 8
    x, targets = torch.randn(90, 64), torch.randint(0, 300, (90,))

    def gradients(weight: FrozenWeight, head: FrozenWeight) -> list[Tensor]:
        leaves = [
            x.clone().requires_grad_(),
            a.clone().requires_grad_(),
            b.clone().requires_grad_(),
        ]
        (hidden,) = grouped_linear(leaves[0], [weight], [[LoraTerm(leaves[1], leaves[2], 2.0)]])
        loss = chunked_cross_entropy(hidden, Head(head), targets)
        return list(torch.autograd.grad(loss, leaves))

    scratch = Scratch()
    ours = gradients(Int8Weight.of(source, scratch), Int8Weight.of(table, scratch))
    for one, two in zip(ours, gradients(source, table), strict=True):
        assert float(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)) > 0.9995
        assert float(one.norm() / two.norm()) == pytest.approx(1, abs=0.01)
