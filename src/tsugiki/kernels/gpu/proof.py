"""Small cases that each family of GPU bodies must compute as well as the plain ones, on the spot.

Error against a wider computation at most 1.2 times the plain bodies' own, as for modules
(`models/tune.py`); NF4 bit for bit. Takes the plain bodies from where they are written, so that the
judge is never the judged. Draws from generators of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tsugiki.kernels.gpu.nf4 import Packed

WORSE = 1.2  # times the plain error
UNSEEN = 5e-7  # relative; a GPU's functions are a few units off in fp32
ROWS, WIDTH, OUT, RANK = 70, 200, 136, 12  # ragged on purpose
FEW = 5  # rows where a program takes one

Case = tuple[str, list[Tensor], list[Tensor], list[Tensor]]  # name; ours, plain, exact


def prove(family: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why the bodies of a family must not be used on this device; '' where they may."""
    with torch.no_grad():
        for name, ours, plain, exact in _CASES[family](_Draw(device, dtype)):
            for one, two, e in zip(ours, plain, exact, strict=True):
                size = float(e.double().norm()) or 1.0
                mine, its = (float((t.double() - e.double()).norm()) / size for t in (one, two))
                if not mine <= max(WORSE * its, UNSEEN):
                    return f"{name} is off by {mine:.1e}, plain torch by {its:.1e}"
    return ""


class _Draw:
    """Normal numbers in the type to be proven, and their fp64 copies."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator) * scale
        return drawn.to(self.device, self.dtype)


def _both(plain: Callable[..., list[Tensor]], *given: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The plain result in the narrow type and in fp64."""
    return plain(*given), plain(*(t.double() for t in given))


def _lowrank(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu import lowrank

    x, a = draw(ROWS, WIDTH), draw(RANK, WIDTH, scale=WIDTH**-0.5)
    s, b = draw(ROWS, RANK), draw(OUT, RANK, scale=0.3)
    y, grad = draw(ROWS, OUT), draw(ROWS, OUT)
    yield "shrink", [lowrank.shrink(x, a, 0.0, 0)], *_both(lambda x, a: [x @ a.T], x, a)
    ours = lowrank.add_product(y.clone(), s, b, 0.7, 0.0, 0)
    yield "expand", [ours], *_both(lambda y, s, b: [y.addmm(s, b.T, alpha=0.7)], y, s, b)
    grad_s = torch.empty_like(s)
    grad_b = lowrank.pair_gradients(grad, s, b, 0.7, grad_s)
    both = _both(lambda g, s, b: [g @ b * 0.7, g.T @ s * 0.7], grad, s, b)
    yield "dS and dB", [grad_s, grad_b], *both
    yield "dA", [lowrank.grad_of_a(s, x, 0.0, 0)], *_both(lambda s, x: [s.T @ x], s, x)
    # the mask of shrink is that of its gradients: S and dX of a kept entry, seen through ones
    seen = lowrank.shrink(torch.ones_like(x), torch.eye(WIDTH, device=x.device).to(x), 0.3, 1 << 40)
    ones = torch.ones(WIDTH, 1, device=x.device).to(x)
    back = lowrank.add_product(
        torch.zeros_like(x), torch.ones(ROWS, 1, device=x.device).to(x), ones, 1.0, 0.3, 1 << 40
    )
    yield "a mask found again", [back], [seen], [seen]
    share = (seen == 0).float().mean()[None]
    wanted = torch.full_like(share, 0.3)
    near = wanted if float((share - wanted).abs()) < 0.03 else share
    yield "a mask's share", [near], [wanted], [wanted]


def _product(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu.product import product

    x, w, bias = draw(ROWS, WIDTH), draw(OUT, WIDTH, scale=WIDTH**-0.5), draw(OUT)
    s, b, onto = draw(ROWS, RANK), draw(OUT, RANK, scale=0.3), draw(ROWS, OUT)
    ours = product(x, w.T, bias=bias, term=(s, b.T), scale=0.7)
    yield (
        "fused product",
        [ours],
        *_both(
            lambda x, w, c, s, b: [torch.addmm(c, x, w.T).addmm(s, b.T, alpha=0.7)],
            x,
            w,
            bias,
            s,
            b,
        ),
    )
    ours = product(x, w.T, out=onto.clone(), add=True, term=(s, b.T), scale=0.7)
    yield (
        "fused product onto another",
        [ours],
        *_both(lambda x, w, o, s, b: [o.addmm(x, w.T).addmm(s, b.T, alpha=0.7)], x, w, onto, s, b),
    )


def _norms(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu import norms
    from tsugiki.kernels.norms import reference_rms_norm, reference_rotary

    x, weight, grad = draw(ROWS, WIDTH), draw(WIDTH), draw(ROWS, WIDTH)

    def norm(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            y = reference_rms_norm(leaf, weight, 1e-6, offset=1.0)
            return [y.detach(), torch.autograd.grad(y, leaf, grad)[0]]

    y, inverse = norms.norm_rows(x, weight, 1e-6, 1.0)
    back = norms.norm_rows_back(grad, x, weight, inverse, 1.0)
    yield "RMSNorm", [y, back], *_both(norm, x, weight, grad)
    q, cos, sin = draw(1, ROWS, 3 * 20), draw(1, ROWS, 16), draw(1, ROWS, 16)
    out = torch.empty(ROWS, 3, 20, dtype=q.dtype, device=q.device)
    norms.turn(q.view(ROWS, 3, 20), cos[0], sin[0], out, 1)
    both = _both(lambda q, c, s: [reference_rotary(q, c, s, 3)[0].transpose(0, 1)], q, cos, sin)
    yield "rotary", [out], *both


def _activations(draw: _Draw) -> Iterator[Case]:
    import torch.nn.functional as F

    from tsugiki.kernels.gpu import activations

    e, g, grad = draw(FEW, WIDTH, scale=2.0), draw(FEW, WIDTH), draw(FEW, WIDTH)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }  # fmt: skip
    for name, function in functions.items():

        def plain(
            e: Tensor, g: Tensor, grad: Tensor, act: Callable[[Tensor], Tensor] = function
        ) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [t.clone().requires_grad_() for t in (e, g)]
                h = act(leaves[0]) * leaves[1]
                return [h.detach(), *torch.autograd.grad(h, leaves, grad)]

        grad_e, grad_g, h = torch.empty_like(e), grad.clone(), torch.empty_like(e)
        forward = activations.gate(e, g, name)
        activations.gate_back(grad_g, e, g, name, h, grad_e, grad_g)
        low, exact = _both(plain, e, g, grad)
        yield name, [forward, h, grad_e, grad_g], [low[0], *low], [exact[0], *exact]


def _loss(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu.loss import softmax_rows

    logits = draw(FEW, 333, scale=2.0)
    targets = (torch.arange(FEW) * 37 % 333).to(draw.device)

    def plain(logits: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32)) * 0.5
            losses = torch.nn.functional.cross_entropy(
                torch.tanh(wide / 3.0) * 3.0, targets, reduction="none"
            )
            return [losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]]

    ours = logits.clone()
    losses, _ = softmax_rows(ours, targets, 0.5, 3.0, 1.0, True)
    yield "cross entropy", [losses, ours], *_both(plain, logits)


def _nf4_case(draw: _Draw) -> tuple[Packed, Tensor]:
    """Random codes and tables, and the matrix that they mean."""
    from tsugiki.kernels.gpu.nf4 import Packed

    generator = torch.Generator().manual_seed(1)
    rows, width = 40, 448  # 280 blocks: two groups of scales
    blocks = rows * width // 64
    codes, absmax = (
        torch.randint(0, 256, (n,), generator=generator).to(torch.uint8)
        for n in (32 * blocks, blocks)
    )
    tables = [torch.rand(n, generator=generator) for n in (-(-blocks // 256), 1, 16, 256)]
    packed = Packed(*(t.to(draw.device) for t in (codes, absmax, *tables)))
    places = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1, 64).long()
    group = torch.arange(blocks, device=draw.device) // 256
    scale = packed.map[packed.absmax.long()] * packed.scales[group] + packed.offset
    exact = (packed.levels[places] * scale[:, None]).view(rows, width).to(draw.dtype)
    return packed, exact


def _nf4(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu.nf4 import unpack

    packed, exact = _nf4_case(draw)
    ours = unpack(packed, torch.empty_like(exact))
    differ = (ours != exact).sum()[None]
    yield "NF4 (numbers that differ)", [differ], [torch.zeros_like(differ)], [differ * 0]


def _nf4_product(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.gpu.nf4 import matmul

    packed, exact = _nf4_case(draw)
    x = draw(5, exact.shape[1])
    product = matmul(x, packed, len(exact))
    yield "NF4 product", [product], [x @ exact.T], [x.double() @ exact.double().T]


def _attention(draw: _Draw) -> Iterator[Case]:
    from tsugiki.kernels.attention import reference_attention
    from tsugiki.kernels.flash import flash_attention

    lengths = (33, 1, 64, 30)
    q, k, v, grad = (draw(1, h, sum(lengths), 64) for h in (4, 2, 2, 4))
    grad = grad.transpose(1, 2)
    for window in (None, 9):

        def run(
            attend: Callable[..., Tensor], given: list[Tensor], window: int | None = window
        ) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [t.clone().requires_grad_() for t in given]
                out = attend(*leaves, lengths, scale=0.125, window=window)
                return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

        wide = [t.double() for t in (q, k, v)]
        yield (
            f"flash attention, window {window}", run(flash_attention, [q, k, v]),
            run(reference_attention, [q, k, v]), run(reference_attention, wide),
        )  # fmt: skip


_CASES: dict[str, Callable[[_Draw], Iterator[Case]]] = {
    "lowrank": _lowrank, "product": _product, "norms": _norms, "activations": _activations,
    "loss": _loss, "nf4": _nf4, "nf4_product": _nf4_product, "attention": _attention,
}  # fmt: skip
