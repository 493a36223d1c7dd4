"""Compiled attention, bf16 in tiles and fp32 in rows, against documents one by one in fp64."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsugiki.kernels import attention, backend
from tsugiki.kernels.attention import packed_attention, reference_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.cpu import tiles
from tsugiki.kernels.cpu.build import library
from tsugiki.kernels.fused_attention import bodies_attend

in_tiles = pytest.mark.skipif(
    not tiles.ready(), reason="this CPU has no AMX and no AVX512-BF16, or no compiler"
)
in_rows = pytest.mark.skipif(library()[0] is None, reason="no compiler")
BF16 = pytest.param(torch.bfloat16, marks=in_tiles)
FP32 = pytest.param(torch.float32, marks=in_rows)
BOTH = pytest.mark.parametrize("dtype", [BF16, FP32])
CASES = [
    # heads, of keys, width, documents, window, softcap
    (2, 2, 64, (32,), None, None),
    (4, 2, 64, (40, 7, 130), None, None),
    (4, 1, 32, (300, 1, 129), None, None),
    (4, 2, 96, (257, 64), 50, None),
    (2, 1, 128, (400,), 130, 8.0),
    (3, 3, 256, (100, 200), None, 5.0),
    (2, 1, 64, (33, 129, 31), 1, None),
    (2, 2, 32, (260,), 128, None),
    (4, 2, 80, (150, 33), None, None),
    (2, 1, 8, (140,), 60, 8.0),
    (2, 2, 16, (90,), None, 1e4),
]


def draw(heads: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """(1, H, T, d) as a layer gives it: tokens first in memory."""
    return torch.randn(1, tokens, heads, width).to(dtype).transpose(1, 2)


def numbers(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], grad: Tensor
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(leaves[0], leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@BOTH
@pytest.mark.parametrize(("heads", "keys", "width", "lengths", "window", "softcap"), CASES)
def test_it_is_as_near_to_exact_as_plain_products(
    monkeypatch: pytest.MonkeyPatch, heads: int, keys: int, width: int, lengths: tuple[int, ...],
    window: int | None, softcap: float | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(sum(lengths))
    tokens, scale = sum(lengths), 1.5 * width**-0.5
    inputs = [draw(h, tokens, width, dtype) for h in (heads, keys, keys)]
    grad = torch.randn(1, tokens, heads, width).to(dtype)
    assert bodies_attend(*inputs), "the bodies are what is tested"

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(
            q, k, v, ForwardBatch(lengths), scale=scale, window=window, softcap=softcap
        )

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attention(
            q, k, v, lengths, scale=scale, window=window, softcap=softcap
        )  # fmt: skip

    exact = numbers(exactly, [x.double() for x in inputs], grad)
    found = numbers(run, inputs, grad)
    with torch.no_grad():
        assert torch.equal(run(*inputs), found[0]), "training and evaluation agree"
    monkeypatch.setattr(attention, "bodies_attend", lambda *_: False)
    half = dtype == torch.bfloat16
    plain = numbers(run if half else exactly, inputs, grad)
    for name, ours, theirs in zip(
        ("out", "q", "k", "v"), errors(found, exact), errors(plain, exact), strict=True
    ):
        # in fp32 the gradient of a score is the difference of two sums, one of them by way of the
        # output: short documents show it
        bound = 1.05 if half else 1.5 if name in "qk" else 1.2
        # window 1: each token sees itself alone, so scores have no gradient but rounding
        assert ours <= bound * theirs or (window == 1 and name in "qk"), name


@BOTH
def test_threads_and_neighbours_change_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = (70, 200, 5)
    q, k, v = (draw(h, sum(lengths), 64, dtype) for h in (4, 2, 2))
    grad = torch.randn(1, sum(lengths), 4, 64).to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, ForwardBatch(lengths), scale=0.2)

    found = numbers(run, [q, k, v], grad)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = numbers(run, [q, k, v], grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    part = slice(70, 270)
    alone = numbers(
        lambda q, k, v: packed_attention(q, k, v, ForwardBatch((200,)), scale=0.2),
        [x[:, :, part] for x in (q, k, v)], grad[:, part],
    )  # fmt: skip
    assert torch.equal(alone[0], found[0][:, part]), "a document does not see its neighbours"
    for one, two in zip(alone[1:], found[1:], strict=True):
        assert torch.equal(one, two[:, :, part])


@BOTH
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5).map(tuple),
    window=st.one_of(st.none(), st.integers(1, 200)),
    groups=st.sampled_from([(2, 1), (3, 3), (6, 2)]),
)
def test_any_lengths_and_windows(
    dtype: torch.dtype, lengths: tuple[int, ...], window: int | None, groups: tuple[int, int]
) -> None:
    torch.manual_seed(len(lengths))
    tokens = sum(lengths)
    q, k, v = (draw(heads, tokens, 32, dtype) for heads in (groups[0], groups[1], groups[1]))
    out = packed_attention(q, k, v, ForwardBatch(lengths), scale=0.2, window=window)
    exact = reference_attention(
        q.double(), k.double(), v.double(), lengths, scale=0.2, window=window
    )
    assert errors([out], [exact])[0] < (0.004 if dtype == torch.bfloat16 else 1e-6)


@BOTH
def test_what_is_not_a_number_stays_one_and_stays_in_its_document(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = (draw(2, 100, 32, dtype) for _ in range(3))
    k[0, 0, 10] = float("nan")
    out = packed_attention(q, k, v, ForwardBatch((60, 40)), scale=0.2)
    lost = out.isnan().any(-1)[0]
    assert lost[10:60, 0].all()
    assert not lost[:10].any()
    assert not lost[:, 1].any()
    assert not lost[60:].any()


@BOTH
def test_values_of_another_width(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k, v = (draw(heads, 100, width, dtype) for heads, width in ((4, 48), (2, 48), (2, 40)))
    assert bodies_attend(q, k, v)
    grad = torch.randn(1, 100, 4, 40).to(dtype)

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, k, v, (60, 40), scale=0.2)

    exact = numbers(exactly, [x.double() for x in (q, k, v)], grad)
    found = numbers(
        lambda q, k, v: packed_attention(q, k, v, ForwardBatch((60, 40)), scale=0.2),
        [q, k, v],
        grad,
    )
    assert [x.shape for x in found] == [x.shape for x in exact]
    assert max(errors(found, exact)) < 0.01


@BOTH
@pytest.mark.parametrize("window", [None, 40])
def test_sinks_take_probability_and_give_nothing(dtype: torch.dtype, window: int | None) -> None:
    torch.manual_seed(5)
    lengths = (150, 7)
    inputs = [draw(heads, 157, 32, dtype) for heads in (4, 2, 2)]
    sinks = torch.tensor([-3.0, 0.0, 2.0, 40.0])
    grad = torch.randn(1, 157, 4, 32).to(dtype)
    q, k, v = inputs
    assert bodies_attend(q, k, v, sinks)
    assert not bodies_attend(q, k, v, sinks.clone().requires_grad_()), "theirs is not computed"

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, k, v, lengths, scale=0.2, window=window, sinks=sinks)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = ForwardBatch(lengths)
        return packed_attention(q, k, v, batch, scale=0.2, window=window, sinks=sinks)

    found = numbers(run, inputs, grad)
    exact = numbers(exactly, [x.double() for x in inputs], grad)
    bound = 0.01 if dtype == torch.bfloat16 else 1e-6
    assert max(errors(found, exact)) < bound
    small = [x[..., 3, :] if n == 0 else x[:, 3] for n, x in enumerate((found[0], found[1]))]
    assert all(float(x.abs().max()) < 1e-6 for x in small), "a sink of 40 takes all"


@BOTH
def test_attention_that_is_sure_of_itself_takes_no_longer(dtype: torch.dtype) -> None:
    """Its weights of most keys are numbers so small that a processor takes 100 times as long."""
    torch.manual_seed(6)
    grad = torch.randn(1, 400, 4, 8).to(dtype) * 1e-4
    taken: dict[float, list[float]] = {1.0: [], 300.0: []}
    for _ in range(7):
        for size, seconds in taken.items():
            q, k, v = (draw(heads, 400, 8, dtype) for heads in (4, 2, 2))
            inputs = [x.detach().requires_grad_() for x in (q * size, k, v * 1e-2)]
            began = time.perf_counter()
            out = packed_attention(
                inputs[0], inputs[1], inputs[2], ForwardBatch((400,)), scale=0.3
            )  # fmt: skip
            torch.autograd.grad(out, inputs, grad)
            seconds.append(time.perf_counter() - began)
    assert min(taken[300.0]) < 4 * min(taken[1.0]), "small numbers are computed with"


@BOTH
def test_other_widths_and_types_go_elsewhere(dtype: torch.dtype) -> None:
    q = draw(2, 40, 288, dtype)
    assert not bodies_attend(q, q, q), "288 is more than a core's cache holds"
    assert not bodies_attend(q.double(), q.double(), q.double())
    out = packed_attention(q, q, q, ForwardBatch((40,)), scale=0.2)
    assert out.isfinite().all()
    q = draw(2, 40, 64, dtype)
    backend.hold_plain(["tiles", "attention"])
    try:
        assert not bodies_attend(q, q, q), "a run that began without them goes on without"
    finally:
        backend.hold_plain([])


@BOTH
@pytest.mark.parametrize("width", [48, 64, 80])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_scores_beyond_all_measure_stay_numbers(
    width: int, size: float, dtype: torch.dtype
) -> None:
    """One key takes it all: the score minus itself must be zero, whatever the factor rounds."""
    torch.manual_seed(3)
    q, k, v = (draw(2, 150, width, dtype) for _ in range(3))
    q, k = q * size, k * size
    grad = torch.randn(1, 150, 2, width).to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, ForwardBatch((150,)), scale=width**-0.5)

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attention(q, k, v, (150,), scale=width**-0.5)

    found = numbers(run, [q, k, v], grad)
    exact = numbers(exactly, [x.double() for x in (q, k, v)], grad)
    assert all(x.isfinite().all() for x in found)
    for ours, theirs in ((found[0], exact[0]), (found[3], exact[3])):
        assert errors([ours], [theirs])[0] < 0.2, "a near tie may fall otherwise"


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [20, 100])
def test_scales_that_torch_has_not(scale: float, dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(4)
    q, k, v = (draw(2, length, 32, dtype) for _ in range(3))
    out = packed_attention(q, k, v, ForwardBatch((length,)), scale=scale)
    exact = reference_attention(
        q.double(), k.double(), v.double(), (length,), scale=scale
    )  # fmt: skip
    assert errors([out], [exact])[0] < 0.01
