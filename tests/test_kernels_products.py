"""Products in tiles against torch's own in fp64: ragged shapes, both layouts, any threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsugiki.kernels import backend, loss, products
from tsugiki.kernels.cpu import tiles
from tsugiki.kernels.dropout import dropped
from tsugiki.kernels.linear import DenseWeight

needs_tiles = pytest.mark.skipif(
    not tiles.ready(), reason="this CPU has no AMX and no AVX512-BF16, or no compiler"
)
needs_registers = pytest.mark.skipif(
    tiles.kind() != "tile registers", reason="this CPU has no tile registers, or no compiler"
)
SHAPES = [(64, 64, 32), (65, 33, 64), (97, 40, 896), (1100, 1040, 96), (70, 600, 4864), (64, 1, 64)]


def exact(x: Tensor, matrix: Tensor) -> Tensor:
    return x.double() @ matrix.double().T


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@needs_tiles
@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
@pytest.mark.parametrize("across", [False, True])
def test_a_product_is_as_near_to_fp64_as_torchs(
    rows: int, out: int, width: int, across: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    stored = torch.randn(out, width, generator=generator).bfloat16()
    matrix = stored.T.contiguous().T if across else stored
    bias = torch.randn(out, generator=generator).bfloat16()
    wanted = exact(x, stored) + bias.double()
    assert products._tiles(x, matrix) is tiles, "the tiles are what is tested"
    got = products.multiply(x, matrix, bias)
    plain = torch.nn.functional.linear(x, matrix, bias)
    assert distance(got, wanted) <= 1.01 * distance(plain, wanted)
    onto = torch.randn(rows, out, generator=generator).bfloat16()
    wanted = onto.double() + exact(x, stored)
    plain = torch.addmm(onto, x, matrix.T)
    assert products.multiply_into(onto, x, matrix, add=True) is onto
    assert distance(onto, wanted) <= 1.01 * distance(plain, wanted)


@needs_tiles
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rows", "out", "width", "rank"), [(64, 64, 32, 1), (97, 96, 896, 16), (1100, 1056, 96, 40)]
)
@pytest.mark.parametrize("across", [False, True])
def test_a_term_of_low_rank_is_within_the_product(
    rows: int, out: int, width: int, rank: int, across: bool, rate: float
) -> None:
    generator = torch.Generator().manual_seed(rank)
    x, stored, s, b = (
        torch.randn(n, k, generator=generator).bfloat16()
        for n, k in ((rows, width), (out, width), (rows, rank), (out, rank))
    )
    if across:
        stored, b = (m.T.contiguous().T for m in (stored, b))
    bias = torch.randn(out, generator=generator).bfloat16()
    term = products.LowRank(s, b, 0.7, rate, 5)
    ones = torch.ones(rows, out).bfloat16()
    mask = ones.double() if rate == 0 else (dropped(ones, rate, 5) > 0).double() / (1 - rate)
    wanted = exact(x, stored) + 0.7 * mask * exact(s, b)
    assert products.within(term, ones) is not None, "within is what is tested"
    got = products.multiply(x, stored, bias, term)
    rounded = distance((wanted + bias.double()).bfloat16(), wanted + bias.double())
    assert distance(got, wanted + bias.double()) <= 1.05 * rounded
    onto = torch.randn(rows, out, generator=generator).bfloat16()
    before = onto.double()
    products.multiply_into(onto, x, stored, add=True, term=term)
    assert distance(onto, before + wanted) <= 1.05 * rounded
    plain = ones.clone()
    backend.hold_plain(["tiles"])
    try:
        products.multiply_into(plain, x, stored, term=term)
    finally:
        backend.hold_plain([])
    assert distance(plain, wanted) <= 4 * rounded, "the same mask without tiles"


@needs_registers
@pytest.mark.parametrize(("rows", "out", "width"), SHAPES[1:])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_of_codes_are_exact_sums(
    rows: int, out: int, width: int, across: bool, dtype: torch.dtype
) -> None:
    width = -(-width // 64) * 64
    generator = torch.Generator().manual_seed(out)
    codes = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
    stored = torch.randint(-127, 128, (out, width), generator=generator, dtype=torch.int8)
    matrix = stored.T.contiguous().T if across else stored
    ones = torch.ones(rows, 1)
    y = torch.zeros(rows, out, dtype=torch.float32)
    assert products.tiles_for_codes(codes, y) is tiles, "the tiles are what is tested"
    tiles.multiply_codes(codes, matrix, ones, None, None, y, add=False)
    assert torch.equal(y.double(), exact(codes, stored).float().double())
    rows_scale, scale = torch.rand(rows, 1, generator=generator), torch.rand(out)
    bias, y = torch.randn(out), torch.randn(rows, out).to(dtype)
    wanted = exact(codes, stored) * rows_scale.double() * scale.double() + bias.double()
    wanted += y.double()
    tiles.multiply_codes(codes, matrix, rows_scale, scale, bias, y, add=True)
    assert distance(y, wanted) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


@needs_tiles
def test_the_number_of_threads_changes_no_bit() -> None:
    x, matrix = torch.randn(300, 512).bfloat16(), torch.randn(700, 512).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(products.multiply(x, matrix))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_tiles
def test_rows_with_strides_and_a_part_of_the_result() -> None:
    whole, matrix = torch.randn(80, 256).bfloat16(), torch.randn(48, 128).bfloat16()
    x, y = whole[:, 64:192], torch.zeros(80, 96).bfloat16()
    products.multiply_into(y[:, :48], x, matrix, add=True)
    assert distance(y[:, :48], exact(x, matrix)) < 3e-3
    assert not y[:, 48:].any(), "nothing beside it is written"


def test_what_the_tiles_do_not_take_is_torchs() -> None:
    none, y = torch.empty(0, 64, dtype=torch.int8), torch.empty(0, 8)
    assert products.tiles_for_codes(none, y) is None, "no rows"
    x, matrix = torch.randn(80, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert products._tiles(x[:8], matrix) is None, "few rows"
    assert products._tiles(x[:, :40], matrix[:, :40]) is None, "an odd width"
    assert products._tiles(x.float(), matrix.float()) is None, "another type"
    recorded = x.clone().requires_grad_()
    products.multiply(recorded, matrix).sum().backward()
    assert recorded.grad is not None, "autograd sees torch's"
    backend.hold_plain(["tiles"])
    try:
        assert products._tiles(x, matrix) is None, "held plain"
    finally:
        backend.hold_plain(())


@needs_tiles
def test_no_memory_for_the_tiles_is_told() -> None:
    """In a process of its own, which may not grow."""
    code = """
import resource, torch
from tsugiki.kernels.cpu import tiles
torch.set_num_threads(1)
assert tiles.ready()
x, matrix = torch.zeros(1024, 4096).bfloat16(), torch.zeros(512, 4096).bfloat16()
y = torch.empty(1024, 512).bfloat16()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now, resource.getrlimit(resource.RLIMIT_AS)[1]))
held = []
try:
    while True:
        held.append(bytearray(1 << 18))
except MemoryError:
    pass
try:
    tiles.multiply(x, matrix, None, y, add=False)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "no memory for the tiles of a product with (1024, 512) results\n"


@needs_tiles
@pytest.mark.parametrize("rows", [64, 65, 100, 1100])
@pytest.mark.parametrize(("vocab", "width"), [(301, 64), (256, 96), (257, 32), (1000, 896)])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
def test_the_heads_loss_in_one_pass_is_nearer_than_through_logits(
    rows: int, vocab: int, width: int, scale: float, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(rows)
    table = (torch.randn(vocab, width, generator=generator) * 3 * width**-0.5).bfloat16()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    hidden[::3] += table[targets[::3]] * 2  # some are sure
    head = loss.Head(DenseWeight(table), scale, softcap)
    assert loss._tiles(hidden, head) is tiles, "the tiles are what is tested"

    def numbers(
        function: Callable[..., Tensor], head: loss.Head, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        total = function(leaf, head, targets, 0.37)
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    wide = loss.Head(DenseWeight(table.double()), scale, softcap)
    exact = numbers(loss.reference_cross_entropy, wide, hidden.double())
    plain = numbers(loss.reference_cross_entropy, head, hidden)
    got = numbers(loss.chunked_cross_entropy, head, hidden)
    assert float(got[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    assert distance(got[1], exact[1]) <= 1.01 * distance(plain[1], exact[1])
    with torch.no_grad():
        assert float(loss.chunked_cross_entropy(hidden, head, targets, 0.37)) == float(got[0])
    alone = loss.chunked_cross_entropy(hidden[:64], head, targets[:64])
    losses, grad = tiles.head_rows(hidden, table, targets, scale, softcap, 0.37, True)
    assert float(alone) == float(losses[:64].sum()), "a row's loss does not depend on the others"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = tiles.head_rows(hidden, table, targets, scale, softcap, 0.37, True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(losses, again[0]), "threads change nothing"
    assert torch.equal(grad, again[1])


@needs_tiles
def test_the_heads_rows_keep_what_is_not_a_number_and_refuse_targets_beyond() -> None:
    table, hidden = torch.randn(320, 64).bfloat16(), torch.randn(70, 64).bfloat16()
    targets = torch.arange(70)
    hidden[3, 5] = float("nan")
    losses, grad = tiles.head_rows(hidden, table, targets, 1.0, None, 1.0, True)
    assert losses.isnan().nonzero().view(-1).tolist() == [3]
    assert grad.isnan().any(1).nonzero().view(-1).tolist() == [3]
    hidden[3, 5] = 0
    with pytest.raises(IndexError, match="beyond the 320"):
        tiles.head_rows(hidden, table, targets + 251, 1.0, None, 1.0, True)
    hidden[4] = 1000 * table[4]  # others' exponentials are far below the smallest number
    losses, grad = tiles.head_rows(hidden, table, targets, 1.0, None, 1.0, True)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    assert float(losses[4]) == 0


@needs_registers
def test_vector_registers_pass_the_same_tests() -> None:
    """The bodies of CPUs without tile registers, here by a compiler that is told of none."""
    without = " ".join(f"-mno-amx-{part}" for part in ("tile", "int8", "bf16"))
    names = ("products", "attention", "lowrank")
    files = [str(Path(__file__).with_name(f"test_kernels_{name}.py")) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-rs"],
        env={**os.environ, "TSUGIKI_CXXFLAGS": without},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "no tile registers" in done.stdout, "another library"
    assert "no AVX512-BF16" not in done.stdout, "none of the tests is left out"
