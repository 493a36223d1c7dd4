"""Triton's bodies against the plain ones: under its interpreter on a CPU, compiled on a GPU.

The interpreter multiplies and rounds bf16 wrongly, so bf16 is proven on a GPU only.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from families import tiny_model
from torch import Tensor

from tsugiki.adapters.attach import attach
from tsugiki.config import LoraConfig
from tsugiki.data.example import Example
from tsugiki.kernels import attention, backend, flash, loss, lowrank, nf4, products
from tsugiki.kernels.attention import packed_attention, reference_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.linear import DenseWeight, LoraTerm, grouped_linear, reference_linear
from tsugiki.kernels.loss import Head, chunked_cross_entropy, reference_cross_entropy
from tsugiki.kernels.mlp import Feed, feed_forward, reference_feed
from tsugiki.kernels.norms import reference_rms_norm, reference_rotary, rms_norm, rotary
from tsugiki.kernels.quantized import ALL, QuantizedWeight, Workspace
from tsugiki.models.flat import flat_loss, use_flat_attention
from tsugiki.models.tune import tune
from tsugiki.training.objective import flatten

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_GPU = "needs a GPU: the interpreter multiplies and rounds bf16 wrongly"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not made for this platform"
)
TRITON = [family for family in backend.FAMILIES if family != "attention"]


@pytest.fixture
def gpu_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation takes Triton's bodies, the fused product too."""
    for module in (backend, products, lowrank, nf4):
        monkeypatch.setattr(module, "triton_runs", lambda x, family: True)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(HERE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", TRITON)
def test_bodies_prove_themselves(family: str, dtype: torch.dtype) -> None:
    from tsugiki.kernels.gpu.proof import prove

    assert prove(family, HERE, dtype) == ""


@needs_triton
@pytest.mark.skipif(HERE.type == "cpu", reason=NO_GPU)
@pytest.mark.parametrize("family", backend.FAMILIES)
def test_bodies_prove_themselves_in_bf16(family: str) -> None:
    reason = backend.unsuited(HERE, torch.bfloat16, family)
    if reason and family != "product":
        pytest.skip(reason)
    assert backend.judged(HERE, torch.bfloat16, family) == ""


@needs_triton
def test_a_wrong_body_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsugiki.kernels.gpu import lowrank as gpu
    from tsugiki.kernels.gpu import proof

    right = gpu.grad_of_a
    monkeypatch.setattr(gpu, "grad_of_a", lambda *given: right(*given) * 1.001)
    assert "dA is off by 1.0e-03" in proof.prove("lowrank", HERE, torch.float32)


@needs_triton
def test_the_mask_is_the_hash_it_claims_to_be() -> None:
    from tsugiki.kernels.gpu.lowrank import add_product, shrink

    rate, seed = 0.3, (5 << 40) + 77
    rows, width = 40, 150
    limit = round(rate * 2**31)

    def mixed(x: Tensor) -> Tensor:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return x

    down = mixed(torch.arange(rows) ^ seed & 0x7FFFFFFF)
    across = mixed(torch.arange(width) ^ seed >> 31 & 0x7FFFFFFF)
    expected = mixed((down[:, None] + across) & 0xFFFFFFFF) >> 1 >= limit
    ones = torch.ones(rows, width, device=HERE)
    seen = shrink(ones, torch.eye(width, device=HERE), rate, seed)
    assert torch.equal((seen != 0).cpu(), expected)
    back = add_product(torch.zeros_like(ones), ones[:, :1], ones[0, :, None], 1.0, rate, seed)
    assert torch.equal(back, seen)
    assert seen.max() == pytest.approx(1 / 0.7)


def close(ours: list[Tensor], exact: list[Tensor]) -> None:
    for one, e in zip(ours, exact, strict=True):
        assert one.shape == e.shape
        assert float((one.double() - e.double()).norm() / e.double().norm()) < 1e-5


def gradients(run: Callable[[], list[Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of leaves for fixed upstream gradients."""
    outputs = run()
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(y.shape, generator=generator).to(HERE) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@needs_triton
@pytest.mark.parametrize("rows", [1, 19, 70])
def test_grouped_linear(gpu_bodies: None, rows: int) -> None:
    """q, k, v of unequal widths, a bias, a Conv1D, one without a term; ranks that fill no tile."""
    torch.manual_seed(rows)
    x = draw(1, rows, 72).requires_grad_()
    weights = [
        DenseWeight(draw(136, 72, scale=0.1), draw(136)),
        DenseWeight(draw(72, 40, scale=0.1), transposed=True),
        DenseWeight(draw(24, 72, scale=0.1)),
    ]
    terms = [
        LoraTerm(draw(5, 72, scale=0.1).requires_grad_(), draw(136, 5).requires_grad_(), 0.7),
        None,
        LoraTerm(draw(20, 72, scale=0.1).requires_grad_(), draw(24, 20).requires_grad_(), 1.5),
    ]
    leaves = [x, *(t for term in terms if term is not None for t in (term.A, term.B))]
    close(
        gradients(lambda: grouped_linear(x, weights, [terms]), leaves),
        gradients(lambda: reference_linear(x, weights, terms), leaves),
    )


@needs_triton
def test_dropout_inside_the_products(gpu_bodies: None) -> None:
    """With its mask known, the adapter is linear in the masked input: forward and all gradients."""
    from tsugiki.kernels.gpu.lowrank import shrink

    rate = 0.25
    x, weight = draw(33, 72).requires_grad_(), DenseWeight(draw(40, 72, scale=0.1))
    a, b = draw(6, 72, scale=0.1).requires_grad_(), draw(40, 6).requires_grad_()
    torch.manual_seed(4)
    seed = int(torch.randint(0, 1 << 62, ()))
    mask = shrink(torch.ones_like(x).detach(), torch.eye(72, device=HERE), rate, seed)

    def wet() -> list[Tensor]:
        torch.manual_seed(4)
        return grouped_linear(x, [weight], [[LoraTerm(a, b, 0.5, rate)]])

    close(
        gradients(wet, [x, a, b]),
        gradients(lambda: [weight.matmul(x) + 0.5 * (x * mask) @ a.T @ b.T], [x, a, b]),
    )


@needs_triton
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("form", ["gated", "fused", "plain"])
def test_feed_forward(gpu_bodies: None, form: str, activation: str) -> None:
    torch.manual_seed(0)

    def part(out: int, width: int) -> tuple[DenseWeight, LoraTerm]:
        a = draw(3, width, scale=width**-0.5).requires_grad_()
        b = draw(out, 3).requires_grad_()
        return DenseWeight(draw(out, width, scale=width**-0.5), draw(out)), LoraTerm(a, b, 0.7)

    up = {"gated": (part(40, 24), part(40, 24)), "fused": (part(80, 24),), "plain": (part(40, 24),)}
    feed = Feed(up[form], part(24, 40), activation, fused=form == "fused")
    x = draw(1, 5, 24).requires_grad_()
    leaves = [x, *(t for term in feed.terms for t in (term.A, term.B))]
    close(
        gradients(lambda: [feed_forward(x, feed)], leaves),
        gradients(lambda: [reference_feed(x, feed)], leaves),
    )


@needs_triton
@pytest.mark.parametrize(("shape", "offset"), [((1, 37, 130), 0.0), ((1, 2, 3, 8), 1.0)])
def test_rms_norm(gpu_bodies: None, shape: tuple[int, ...], offset: float) -> None:
    x, weight = draw(*shape).requires_grad_(), draw(shape[-1])
    close(
        gradients(lambda: [rms_norm(x, weight, 1e-6, offset=offset)], [x]),
        gradients(lambda: [reference_rms_norm(x, weight, 1e-6, offset=offset)], [x]),
    )


@needs_triton
@pytest.mark.parametrize("turned", [16, 12])
def test_rotary(gpu_bodies: None, turned: int) -> None:
    """The whole head, or a part of it (GPT-NeoX, Phi), in a tile that it does not fill."""
    x = draw(1, 45, 3 * 16).requires_grad_()
    cos, sin = draw(1, 45, turned), draw(1, 45, turned)
    close(
        gradients(lambda: [rotary(x, cos, sin, 3)], [x]),
        gradients(lambda: [reference_rotary(x, cos, sin, 3)], [x]),
    )


@needs_triton
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (0.5, 3.0)])
def test_cross_entropy(
    gpu_bodies: None, monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float | None
) -> None:
    for name in ("CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(loss, name, 301 * 4)  # ragged chunks
    head = Head(DenseWeight(draw(301, 24, scale=0.5), draw(301)), scale, softcap)
    hidden = draw(9, 24).requires_grad_()
    targets = torch.randint(0, 301, (9,)).to(HERE)
    close(
        gradients(lambda: [chunked_cross_entropy(hidden, head, targets, 0.37)], [hidden]),
        gradients(lambda: [reference_cross_entropy(hidden, head, targets, 0.37)], [hidden]),
    )
    with torch.no_grad():
        close(
            [chunked_cross_entropy(hidden, head, targets)],
            [reference_cross_entropy(hidden, head, targets)],
        )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(70, 192), (130, 64), (33, 13), (300, 128)], ids=str)
def test_nf4_codes(gpu_bodies: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Unpacked to the same bits, also where blocks cross rows, into memory that is used again."""
    codes = nf4.quantize_nf4(draw(*shape, scale=0.1))
    workspace = Workspace()
    first = codes.unpack(ALL, ALL, dtype, workspace)
    assert torch.equal(first, nf4.reference_nf4(codes, dtype).to(HERE))
    assert codes.unpack(ALL, ALL, dtype, workspace).data_ptr() == first.data_ptr()


@needs_triton
@pytest.mark.parametrize("width", [192, 40], ids=["whole blocks", "blocks cross rows"])
@pytest.mark.parametrize("rows", [1, 19, 70])
def test_nf4_projection(
    gpu_bodies: None, monkeypatch: pytest.MonkeyPatch, rows: int, width: int
) -> None:
    """Few rows are multiplied by the codes, many by the matrix; both with bias and adapter."""
    from tsugiki.kernels.gpu import nf4 as gpu

    taken = []
    whole = gpu.matmul
    monkeypatch.setattr(gpu, "matmul", lambda *given: taken.append(1) or whole(*given))
    codes = nf4.quantize_nf4(draw(48, width, scale=0.1))
    weight = QuantizedWeight(codes, draw(48), Workspace(), torch.float32)
    x = draw(1, rows, width).requires_grad_()
    a, b = draw(5, width, scale=0.1).requires_grad_(), draw(48, 5).requires_grad_()
    dense = DenseWeight(nf4.reference_nf4(codes, torch.float32).to(HERE), weight.bias)
    close(
        gradients(lambda: grouped_linear(x, [weight], [[LoraTerm(a, b, 0.7)]]), [x, a, b]),
        gradients(lambda: reference_linear(x, [dense], [LoraTerm(a, b, 0.7)]), [x, a, b]),
    )
    assert bool(taken) == (rows <= gpu.SKINNY and width % 64 == 0)


@needs_triton
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_whole_model(request: pytest.FixtureRequest, family: str) -> None:
    """Loss and every adapter gradient of a tuned model: separate and fused projections."""
    model = tiny_model(family).to(HERE)
    attach(model, LoraConfig(r=4, alpha=8, dropout=0.0), generator=torch.Generator().manual_seed(0))
    use_flat_attention(model)
    tuned = tune(model)
    assert len(tuned.replaced) == 4, tuned.note
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    for parameter in trained:
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows = [Example(tuple(range(3, 3 + n)), tuple(range(3, 3 + n)), "row") for n in (9, 5)]
    ids, batch, places, targets = flatten(rows, HERE)

    def run() -> list[Tensor]:
        return [flat_loss(model, ids, batch, places, targets, head=tuned.head_of(model))]

    plain = gradients(run, trained)
    request.getfixturevalue("gpu_bodies")
    close(gradients(run, trained), plain)


def documented(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, keys: Tensor, longest: int,
               most: int, *, scale: float, window_size: tuple[int, int], **grouped: bool) -> Tensor:  # fmt: skip
    """torch's varlen attention by its documentation, for machines that cannot run it."""
    assert torch.equal(ends, keys)
    assert ends.dtype == torch.int32
    lengths = tuple(ends.diff().tolist())
    assert longest == most == max(lengths)
    left, right = window_size
    assert right == 0
    window = None if left == -1 else left + 1
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return reference_attention(q, k, v, lengths, scale=scale, window=window)[0]


@pytest.mark.skipif(HERE.type == "cuda", reason="on a GPU the real one is proven")
@pytest.mark.parametrize("window", [None, 3, 400])
def test_flash_attention_is_asked_rightly(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr(flash, "varlen_attn", documented)
    monkeypatch.setattr(attention, "flash_runs", lambda q, k, v: True)
    lengths = (7, 1, 12)
    q, k, v = (torch.randn(1, h, 20, 8, requires_grad=True) for h in (4, 2, 2))
    options = {"scale": 0.3, "window": window}
    close(
        gradients(lambda: [packed_attention(q, k, v, ForwardBatch(lengths), **options)], [q, k, v]),
        gradients(lambda: [reference_attention(q, k, v, lengths, **options)], [q, k, v]),
    )


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What was found out about a device is forgotten before and after."""
    backend.why_plain.cache_clear()
    yield
    backend.why_plain.cache_clear()


def test_without_triton_a_gpu_runs_plain_bodies_and_says_so_once(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    gpu = torch.device("cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        reasons = {backend.why_plain(gpu, torch.bfloat16, family) for family in TRITON}
    assert reasons == {"triton is not installed (pip install 'tsugiki[cuda]')"}
    assert len(said) == 1, [str(w.message) for w in said]


@needs_triton
@pytest.mark.skipif(HERE.type == "cuda", reason="this machine has the GPU that is asked for")
def test_a_gpu_that_fails_runs_plain_bodies(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.warns(UserWarning, match="plain torch kernels on cuda: norms cannot be tried"):
        reason = backend.why_plain(torch.device("cuda"), torch.bfloat16, "norms")
    assert reason


@pytest.mark.parametrize(("capability", "plain"), [
    ((7, 5), {"attention", "lowrank", "product", "nf4_product"}), ((8, 0), set()), ((9, 0), {"product"}),
])  # fmt: skip
def test_what_a_gpu_is_not_made_for_is_not_tried(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], plain: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(backend, "judged", lambda *given: "")
    gpu = torch.device("cuda")
    taken = {f for f in backend.FAMILIES if not backend.why_plain(gpu, torch.float16, f)}
    assert taken == set(backend.FAMILIES) - plain
    kernels, why = backend.describe(gpu, torch.float16)
    assert kernels.startswith("Triton: ")
    assert all(f"({name})" in why for name in plain)
    noted = backend.operations(gpu, torch.float16)
    assert {family for family, body in noted.items() if body == "torch"} == plain


def test_a_cpu_imports_no_triton() -> None:
    """And all of it imports where there is none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, tsugiki.kernels.mlp, tsugiki.kernels.loss, tsugiki.kernels.attention\n"
        "from tsugiki.kernels.linear import DenseWeight, LoraTerm, grouped_linear\n"
        "term = LoraTerm(torch.ones(2, 3), torch.ones(4, 2), 1.0)\n"
        "print(grouped_linear(torch.ones(1, 3), [DenseWeight(torch.ones(4, 3))], [[term]])[0].sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "36." in done.stdout, done.stderr
