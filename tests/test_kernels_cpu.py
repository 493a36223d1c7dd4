"""Compiled CPU bodies: rounding, ragged shapes, threads, and every way of not having them.

That they compute what the plain bodies compute is the other kernel files' to test, which run twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tsugiki.kernels import backend, int8
from tsugiki.kernels.cpu.build import library
from tsugiki.kernels.cpu.compiled import gate_back
from tsugiki.kernels.dropout import add_dropped, dropped
from tsugiki.kernels.linear import DenseWeight
from tsugiki.kernels.loss import Head, chunked_cross_entropy
from tsugiki.kernels.mlp import Feed, feed_forward
from tsugiki.kernels.norms import rms_norm, rotary

FOUND, REASON = library()
needs_compiler = pytest.mark.skipif(FOUND is None, reason=REASON)
TYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _afterwards() -> Iterator[None]:
    yield
    backend.hold_plain(())


def norm(x: Tensor) -> Tensor:
    return rms_norm(x, torch.linspace(0.5, 2, x.shape[-1]).to(x.dtype), 1e-6, offset=1.0)


def turned(x: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, x.shape[0] * 6).view(1, -1, 6).to(x.dtype)
    return rotary(x[None, :, :40], angles.cos(), angles.sin(), 4)


def entropy(x: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 203 * x.shape[-1]).view(203, -1).sin().to(x.dtype)
    targets = torch.arange(len(x)) * 5 % 203
    return chunked_cross_entropy(x, Head(DenseWeight(table), 0.7, 9.0), targets, 0.3)


def feed(activation: str) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        k = x.shape[-1]
        up, gate, down = (
            (
                DenseWeight(torch.linspace(-1, 1, n * m).view(n, m).mul(9 + i).sin().to(x.dtype)),
                None,
            )
            for i, (n, m) in enumerate([(37, k), (37, k), (k, 37)])
        )
        return feed_forward(x, Feed((gate, up), down, activation))

    return run


OPERATIONS = {
    "norm": norm, "rotary": turned, "loss": entropy,
    "silu": feed("silu"), "gelu_tanh": feed("gelu_tanh"),
}  # fmt: skip


def value_and_gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = run(leaf)
    upstream = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), torch.autograd.grad(y, leaf, upstream)[0]]


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 130])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_error_is_no_worse_than_plain_torchs(name: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, 45) * 2).to(dtype)
    exact = value_and_gradient(OPERATIONS[name], x.double())
    compiled = value_and_gradient(OPERATIONS[name], x)
    backend.hold_plain(backend.ON_CPU)
    plain = value_and_gradient(OPERATIONS[name], x)
    for one, two, e in zip(compiled, plain, exact, strict=True):
        ours, theirs = ((float((t.double() - e).norm() / e.norm())) for t in (one, two))
        # the error of a few numbers is luck
        luck = torch.finfo(dtype).eps / (1 if e.numel() < 100 else 32)
        assert ours <= 1.2 * theirs + luck


@needs_compiler
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(name: str, bad: float) -> None:
    """Or a run would go on with a loss that looks finite."""
    x = torch.randn(5, 45)
    x[3, 2] = bad
    compiled = value_and_gradient(OPERATIONS[name], x)
    backend.hold_plain(backend.ON_CPU)
    plain = value_and_gradient(OPERATIONS[name], x)
    finite = [bool(t.isfinite().all()) for t in compiled]
    assert finite == [bool(t.isfinite().all()) for t in plain]
    assert not finite[0] or (name == "loss" and bad == float("inf"))  # a soft cap takes an inf


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_inputs_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e30, -300.0, -90.0, 0.0, 90.0, 300.0, 1e30]]).to(dtype)
    eye = DenseWeight(torch.eye(7, dtype=dtype))
    for activation in ("silu", "gelu_tanh"):
        run = Feed(((eye, None),), (eye, None), activation)
        y = feed_forward(x.clone().clamp(-1e4, 1e4), run)
        assert torch.allclose(y.float(), x.float().clamp(0, 1e4), rtol=0.01, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gates_that_are_shut_take_no_longer(dtype: torch.dtype) -> None:
    """What passes them is numbers so small that a processor takes 100 times as long over each."""
    torch.manual_seed(6)
    e, g = (torch.randn(256, 512).to(dtype) for _ in range(2))
    grad, h, grad_e, grad_g = ((e * 1e-6).clone() for _ in range(4))
    taken: dict[float, list[float]] = {1.0: [], 100.0: []}
    for _ in range(7):
        for size, seconds in taken.items():
            x = e * size
            began = time.perf_counter()
            gate_back(grad, x, g, "silu", h, grad_e, grad_g)
            seconds.append(time.perf_counter() - began)
    assert min(taken[100.0]) < 3 * min(taken[1.0]), "small numbers are computed with"


def test_a_run_takes_small_numbers_for_zero_in_every_thread() -> None:
    code = (
        "import torch; from tsugiki.device import decide; decide(hidden_size=64); "
        "small = torch.full((1 << 20,), 1e-30) * torch.full((1 << 20,), 1e-10); "
        "assert torch.get_num_threads() == 2; assert not small.any()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@needs_compiler
def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    x = torch.randn(301, 45).bfloat16()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = [value_and_gradient(run, x) for run in OPERATIONS.values()]
            results.append([*(t for part in parts for t in part), dropped(x, 0.3, 5)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1), (50, 33), (300, 7000)])
def test_masks_are_the_same_in_both_bodies(shape: tuple[int, int]) -> None:
    x = torch.randn(shape).abs_().add_(1)
    onto = torch.randn(shape)
    wet, sum_ = dropped(x, 0.2, 77), add_dropped(onto.clone(), x.clone(), 0.2, 77, 0.5)
    backend.hold_plain(backend.ON_CPU)
    assert torch.allclose(wet, dropped(x, 0.2, 77))
    assert torch.allclose(sum_, add_dropped(onto.clone(), x.clone(), 0.2, 77, 0.5), atol=1e-6)
    if x.numel() > 1000:
        assert float((wet == 0).float().mean()) == pytest.approx(0.2, abs=0.03)


@needs_compiler
def test_int8_codes_are_plain_torchs_within_one_step() -> None:
    x = torch.randn(40, 300).bfloat16()
    x[7, 3] = 80.0
    scratch = int8.Scratch()
    ours = int8.quantise(x, scratch)
    codes, scale = ours.codes.clone(), ours.scale.clone()
    backend.hold_plain(backend.ON_CPU)
    plain = int8.quantise(x, int8.Scratch())
    assert torch.allclose(scale, plain.scale, rtol=1e-6)
    assert int((codes.int() - plain.codes.int()).abs().max()) <= 1
    assert ours.apart is not None
    assert plain.apart is not None
    assert torch.equal(ours.apart.columns, plain.apart.columns)


@needs_compiler
@pytest.mark.parametrize("bad", [-100, 203])
def test_a_target_beyond_the_head_is_an_error_and_touches_no_memory(bad: int) -> None:
    head = Head(DenseWeight(torch.randn(203, 45)))
    with pytest.raises(IndexError, match="beyond the 203 rows"):
        chunked_cross_entropy(torch.randn(2, 45), head, torch.tensor([3, bad]))


@needs_compiler
def test_gradients_of_any_strides() -> None:
    """Of a sum: one number expanded to a matrix."""
    x = torch.randn(6, 45, requires_grad=True)
    weight = int8.Int8Weight.of(DenseWeight(torch.randn(45, 30)), int8.Scratch())
    expanded = torch.ones(1, 1).expand(6, 45)
    assert torch.equal(weight.matmul_t(expanded), weight.matmul_t(expanded.contiguous()))
    plain = torch.autograd.grad(turned(x).sum(), x)[0]
    leaf = x.detach().requires_grad_()
    y = turned(leaf)
    assert torch.equal(plain, torch.autograd.grad(y, leaf, torch.ones_like(y))[0])


def test_a_family_held_to_torch_stays_there() -> None:
    cpu = torch.device("cpu")
    noted = dict.fromkeys(backend.ON_CPU, "torch")
    assert backend.replay(noted, cpu, torch.float32) == (noted, "")
    assert backend.bodies(torch.zeros(2), "loss") is None
    assert backend.operations(cpu, torch.float64) == noted


def test_a_family_that_a_run_did_not_know_was_torchs_then() -> None:
    found, warning = backend.replay({"loss": "torch"}, torch.device("cpu"), torch.float32)
    assert (set(found.values()), warning) == ({"torch"}, "")
    assert backend.compiled_bodies(torch.zeros(2), "tiles") is None


def test_lost_kernels_are_said() -> None:
    found, warning = backend.replay({"loss": "triton"}, torch.device("cpu"), torch.float32)
    assert found["loss"] in ("torch", "compiled")
    assert warning == (
        "loss: this run began with triton kernels, which cannot be had now; it goes on, but not to "
        "the same bytes"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"TSUGIKI_COMPILED": "0"}, "TSUGIKI_COMPILED=0 asks for plain torch kernels"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler could not build them"),
        ({"CXX": "false"}, "false could not build them"),
        ({"CXX": "sh -c 'echo >&2; exit 1'"}, "sh -c 'echo >&2; exit 1' could not build them"),
        ({"CXX": "c++ '"}, "c++ ' could not build them: No closing quotation"),
        (
            {"CXX": "false", "TSUGIKI_CXXFLAGS": "-x"},
            "false with TSUGIKI_CXXFLAGS=-x could not build them",
        ),
        ({"PATH": "/nonexistent"}, "no C++ compiler"),
    ],
)
def test_without_a_compiler_everything_works(
    settings: dict[str, str], reason: str, tmp_path: Path
) -> None:
    script = (
        "import torch\n"
        "from tsugiki.kernels.cpu.build import library\n"
        "from tsugiki.kernels.norms import rms_norm\n"
        "assert library()[0] is None\n"
        "print(library()[1], rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum().item())\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"TSUGIKI_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env | settings, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert done.stdout.startswith(reason)
    assert done.stdout.endswith("4.0\n")
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
@pytest.mark.parametrize("left", [0, 3000])
def test_a_library_cut_short_is_built_again(left: int, tmp_path: Path) -> None:
    """In the cache that was asked for; by a command of several words, as CXX often is."""
    script = "from tsugiki.kernels.cpu.build import library; assert library()[0] is not None"
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    env = os.environ | {
        "TSUGIKI_CACHE": str(tmp_path / "asked"), "XDG_CACHE_HOME": str(tmp_path / "other"),
        "CXX": f"env {compiler}" if left else compiler, "TSUGIKI_CXXFLAGS": "-O0",
    }  # fmt: skip
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], env=env, check=True)
        (built,) = (tmp_path / "asked" / "kernels").glob("*.so")
        assert not (tmp_path / "other").exists()
        size = built.stat().st_size
        os.truncate(built, left)
    assert size > 10_000
