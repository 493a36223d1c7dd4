"""Thin products in tiles against fp64, and their masks against the plain bodies'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tsugiki.kernels import dropout, lowrank
from tsugiki.kernels.cpu import tiles
from tsugiki.kernels.lowrank import add_product, grad_of_a, pair_gradients, shrink

pytestmark = pytest.mark.skipif(
    not tiles.ready(), reason="this CPU has no AMX and no AVX512-BF16, or no compiler"
)
SHAPES = [(64, 32, 1), (65, 96, 16), (300, 896, 16), (1030, 160, 48), (90, 4864, 33), (257, 64, 64)]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def low(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_each_is_as_near_to_exact_as_torchs(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, rank: int, rate: float
) -> None:
    torch.manual_seed(rows)
    monkeypatch.setattr(dropout, "_rows_of_a_part", lambda _: 77)  # several places in the table
    x, a, seed = low(rows, width), low(rank, width), 11
    wide = low(rows, 2 * rank + 3)
    s = wide[:, 2 : 2 + rank]  # a part of a group's
    b = low(width, rank)
    mask = torch.ones_like(x) if rate == 0 else dropout.dropped(torch.ones_like(x), rate, seed) > 0
    kept = mask.double() / (1 - rate)
    assert lowrank._tiles(x, a, rate, seed) is not None, "the tiles are what is tested"

    def everything() -> list[Tensor]:
        onto, out = x.clone(), wide.clone()[:, :rank]
        return [
            shrink(x, a, rate, seed),
            add_product(onto, s, a.T, 0.7, rate, seed),
            add_product(x.clone(), s, b, 1.3),
            pair_gradients(x, s, b, 0.7, out).clone(),
            out.clone(),
            grad_of_a(s, x, rate, seed),
        ]

    one, two, three = x.double(), s.double(), a.double()
    exact = [
        (one * kept) @ three.T,
        one + 0.7 * kept * (two @ three),
        one + 1.3 * two @ b.double().T,
        0.7 * one.T @ two,
        0.7 * one @ b.double(),
        two.T @ (one * kept),
    ]
    found = everything()
    with monkeypatch.context() as patch:
        patch.setattr(lowrank, "_tiles", lambda *_: None)
        plain = everything()
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        assert ours.shape == right.shape
        assert off(ours, right) <= 1.02 * off(theirs, right) + 1e-6
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = everything()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, q) for p, q in zip(found, again, strict=True)), "threads"


def test_what_is_masked_is_not_multiplied_and_rows_below_are_not_read() -> None:
    """A masked entry that is not a number does nothing; one that is kept shows."""
    x = torch.ones(70, 64).bfloat16()
    mask = dropout.dropped(x, 0.5, 3) > 0
    x[~mask] = float("nan")
    a = torch.ones(4, 64).bfloat16()
    assert torch.equal(shrink(x, a, 0.5, 3).float(), (2 * mask.sum(1, keepdim=True)).expand(70, 4))
    x[3, int(mask[3].nonzero()[0])] = float("nan")
    assert shrink(x, a, 0.5, 3).isnan().any(1).nonzero().view(-1).tolist() == [3]
    held = torch.full((100, 64), float("nan")).bfloat16()
    held[:70] = 1
    assert shrink(held[:70], a).isfinite().all()
    assert grad_of_a(torch.ones(70, 4).bfloat16(), held[:70]).isfinite().all()
    padded = torch.full((4, 96), float("nan")).bfloat16()
    padded[:, :3] = 1
    onto = add_product(torch.zeros(70, 64).bfloat16(), torch.ones(70, 3).bfloat16(),
                       padded.repeat(16, 1)[:, :3])  # fmt: skip
    assert torch.equal(onto, torch.full_like(onto, 3))


@pytest.mark.parametrize(
    "make",
    [lambda: low(70, 48), lambda: low(40, 64), lambda: torch.randn(70, 64), lambda: low(64, 70).T],
    ids=["width 48", "few rows", "fp32", "transposed"],
)
def test_others_go_elsewhere(make: Callable[[], Tensor]) -> None:
    x = make()
    a = torch.randn(4, x.shape[1]).to(x.dtype)
    assert lowrank._tiles(x, a) is None
    assert off(shrink(x, a), x.double() @ a.double().T) < 0.01
