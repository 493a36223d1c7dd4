"""Weights in few bits: bitsandbytes' numbers, ragged shapes, products, gradients, memory used again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.kernels import nf4, nf4_cuda, quantized
from tsugiki.kernels.int8_rows import Int8Codes, quantize_int8, reference_int8
from tsugiki.kernels.linear import DenseWeight, LoraTerm, grouped_linear
from tsugiki.kernels.mlp import Feed, feed_forward
from tsugiki.kernels.nf4 import Nf4Codes, dynamic_map, quantize_nf4, reference_nf4
from tsugiki.kernels.quantized import ALL, QuantizedWeight, Workspace

pytestmark = pytest.mark.usefixtures("kernels")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
# bitsandbytes' AVX-512 body is wrong for rows of a multiple of 16 that is none of 64, such as 80
SHAPES = [(300, 128), (7, 64), (129, 896), (64, 172), (5, 13), (7, 33), (1, 1), (576, 200)]
METHODS: list[tuple[Callable[[torch.Tensor], Any], Callable[[Any, torch.dtype], torch.Tensor]]] = [
    (quantize_nf4, reference_nf4),
    (quantize_int8, reference_int8),
]


def drawn(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.05).to(dtype)


def theirs(weight: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState, Nf4Codes]:
    """bitsandbytes' codes and state, and the same in our fields."""
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = torch.zeros(-(-weight.numel() // 64) * 32, dtype=torch.uint8)
    ours[: packed.numel()] = packed.view(-1)
    codes = Nf4Codes(
        ours,
        state.absmax,
        state.state2.absmax.view(torch.int32),
        state.offset.view(1).view(torch.int32),
        (weight.shape[0], weight.shape[1]),
    )
    return packed, state, codes


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_gives_the_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed, state, codes = theirs(drawn(shape, dtype))
    for wanted in TYPES:
        state.dtype = wanted
        with torch.compiler.set_stance("force_eager"):  # it compiles for odd widths: half a minute
            expected = bnb.dequantize_4bit(packed, state)
        assert torch.equal(codes.unpack(ALL, ALL, wanted, Workspace()), expected)
        assert torch.equal(reference_nf4(codes, wanted), expected)
        assert torch.equal(nf4_cuda.unpack(codes, wanted), expected), "the way a GPU takes"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_quantised_as_bitsandbytes_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = drawn(shape, dtype, seed=1)
    _, state, expected = theirs(weight)
    assert torch.equal(state.state2.code, dynamic_map(torch.device("cpu")))
    codes = quantize_nf4(weight)
    whole = weight.numel() // 64  # the last block's padding is ours
    assert torch.equal(codes.packed[: whole * 32], expected.packed[: whole * 32])
    assert torch.equal(codes.offset, expected.offset)
    assert torch.equal(codes.scales, expected.scales)
    same = codes.scales.view(torch.float32).repeat_interleave(256)[: len(codes.absmax)] == 0
    assert bool((same | (codes.absmax == expected.absmax)).all()), "where a scale is 0, any place"
    assert torch.equal(quantize_nf4(weight.T.contiguous().T).packed, codes.packed), "strided"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), st.sampled_from(TYPES), st.integers(0, 1))
def test_any_shape_is_its_reference(
    rows: int, columns: int, dtype: torch.dtype, which: int
) -> None:
    quantize, reference = METHODS[which]
    weight = drawn((rows, columns), seed=rows * columns)
    codes = quantize(weight)
    assert torch.equal(codes.unpack(ALL, ALL, dtype, Workspace()), reference(codes, dtype))
    assert codes.shape == (rows, columns)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 128), torch.full((2, 64), 0.7), torch.eye(64) * 1e-30, -torch.ones(1, 65),
     torch.full((4, 64), 6e4)],
    ids=["zeros", "equal", "tiny", "ragged", "large"],
)  # fmt: skip
@pytest.mark.parametrize("which", [0, 1], ids=["nf4", "int8"])
def test_odd_weights_come_back(weight: torch.Tensor, which: int) -> None:
    quantize, _ = METHODS[which]
    back = quantize(weight).unpack(ALL, ALL, torch.float32, Workspace())
    assert torch.allclose(back, weight, rtol=0.01, atol=1e-30)


def test_the_error_is_half_a_step() -> None:
    weight = drawn((64, 256), seed=3)
    steps = torch.tensor(nf4.LEVELS).diff().max() / 2
    back = quantize_nf4(weight).unpack(ALL, ALL, torch.float32, Workspace())
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert bool(((back - weight).view(-1, 64).abs() <= (steps + 0.02) * largest).all())
    back = quantize_int8(weight).unpack(ALL, ALL, torch.float32, Workspace())
    assert bool(((back - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 * 0.51).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["nf4", "int8"])
def test_what_is_not_finite_is_refused(bad: float, which: int) -> None:
    weight = drawn((9, 70))
    weight[8, 69] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        METHODS[which][0](weight)


def kept(
    which: int, shape: tuple[int, int], dtype: torch.dtype, bias: bool = True
) -> QuantizedWeight:
    codes = METHODS[which][0](drawn(shape, seed=5) * 4)
    given = drawn((1, shape[0]), dtype, seed=6)[0] if bias else None
    return QuantizedWeight(codes, given, Workspace(), dtype)


@pytest.mark.parametrize("shape", [(70, 192), (192, 70), (64, 64), (33, 13)], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["nf4", "int8"])
def test_products_in_tiles_are_those_of_the_dense_matrix(
    which: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = kept(which, shape, torch.float64)
    dense = DenseWeight(weight.dense(), weight.bias)
    x, g = torch.randn(2, 5, shape[1]).double(), torch.randn(2, 5, shape[0]).double()
    for tile, chunk in ((quantized.TILE, nf4.CHUNK), (4096, 256), (1, 1)):
        monkeypatch.setattr(quantized, "TILE", tile)
        monkeypatch.setattr(nf4, "CHUNK", chunk)
        assert torch.allclose(weight.matmul(x), dense.matmul(x), atol=1e-12)
        assert torch.allclose(weight.matmul_t(g), dense.matmul_t(g), atol=1e-12)
        onto = torch.randn(10, shape[1]).double()
        expected = onto + (g @ weight.dense()).view(10, -1)
        assert weight.matmul_t(g.view(10, -1), onto) is onto
        assert torch.allclose(onto, expected, atol=1e-12)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(weight.rows(index), weight.dense()[index])
    assert weight.shape == shape


@pytest.mark.parametrize("which", [0, 1], ids=["nf4", "int8"])
def test_gradients(which: int) -> None:
    weights = [kept(which, (5, 64), torch.float64), kept(which, (7, 64), torch.float64, bias=False)]
    x = torch.randn(1, 2, 64, dtype=torch.float64, requires_grad=True)
    a = torch.randn(1, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 1, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(grouped_linear(x, weights, [[LoraTerm(a, b, 1.5), None]]))

    assert torch.autograd.gradcheck(both, (x, a, b))
    assert torch.autograd.gradcheck(lambda x: grouped_linear(x, weights, [])[0], (x,)), "no adapter"
    up, down = kept(which, (128, 64), torch.float64), kept(which, (64, 64), torch.float64)

    def feed(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        term = LoraTerm(a, torch.ones(128, 1, dtype=torch.float64), 0.1)
        return feed_forward(x, Feed(((up, term),), (down, None), "silu", fused=True))

    assert torch.autograd.gradcheck(feed, (x, a))


def test_the_workspace_is_used_again_and_not_shared() -> None:
    weight = kept(0, (96, 896), torch.bfloat16)
    x = torch.randn(4, 896).bfloat16()
    first = weight.matmul(x)
    held, tile = weight.workspace.nbytes, weight.codes.unpack(ALL, ALL, x.dtype, weight.workspace)
    assert torch.equal(weight.matmul(x), first)
    again = weight.codes.unpack(ALL, ALL, x.dtype, weight.workspace)
    assert again.data_ptr() == tile.data_ptr(), "the same memory"
    assert weight.workspace.nbytes == held, "and no more of it"
    assert weight.dense().data_ptr() != tile.data_ptr(), "what is handed out is its owner's"
    other = copy.deepcopy(weight)
    assert other.workspace.nbytes == 0, "a copy has its own"
    both = dataclasses.replace(weight, codes=quantize_nf4(drawn((16, 896))))
    assert both.workspace is weight.workspace
    assert torch.equal(weight.matmul(x), first), "another weight's tile is overwritten"


def test_four_bits_take_a_quarter_of_sixteen() -> None:
    weight = torch.zeros(4864, 896, dtype=torch.bfloat16)
    assert quantize_nf4(weight).nbytes / weight.nbytes <= 0.26
    codes = quantize_int8(weight)
    assert isinstance(codes, Int8Codes)
    assert codes.nbytes / weight.nbytes <= 0.502
