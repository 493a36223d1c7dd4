"""Whether cheaper products give the gradient that fp32 gives: measured on real rows, by tensor.

Before the first step and again where training has moved on; the cheapest way that keeps the bounds
is taken. Weights, modes and random states are afterwards as they were. Knows no optimiser, no
files, and of a model only its int8 products.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsugiki.adapters.attach import training_mode
from tsugiki.data.example import Example
from tsugiki.data.loader import Loader
from tsugiki.errors import RunError
from tsugiki.memory import proof_tokens
from tsugiki.models.int8 import LEVELS, Int8Products
from tsugiki.models.projections import multiplying_with, stored_weight
from tsugiki.models.wide import in_fp32
from tsugiki.training.events import Proven
from tsugiki.training.step import LossOf, count_targets

BATCHES = 4  # micro-batches whose gradient is compared
SPREAD = 0.02  # of B where it is drawn: with B = 0 the gradient of every A is zero
MEDIAN, LOWEST = 0.998, 0.98  # cosines with fp32
RATIOS = (0.97, 1.03)  # of the norms, ours over fp32's
PAYS = 0.97  # of the time without int8: above, it is not worth its noise

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """How one tensor's gradient agrees with fp32's; NaN where one is zero or not finite."""

    cosine: float
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """Agreement by tensor, median cosine, and which bounds are missed (none: it is accepted)."""

    tensors: dict[str, Agreement]
    median: float
    missed: tuple[str, ...]

    @property
    def note(self) -> str:
        """One line."""
        name, least = min(self.tensors.items(), key=lambda item: _order(item[1].cosine))
        ratios = [agreement.ratio for agreement in self.tensors.values()]
        return (
            f"cosine with fp32: median {self.median:.5f} (bound {MEDIAN}), lowest "
            f"{least.cosine:.5f} at {name} (bound {LOWEST}); ratio of norms {min(ratios):.3f} to "
            f"{max(ratios):.3f} (bounds {RATIOS[0]} and {RATIOS[1]})"
        )


@dataclass(frozen=True)
class Settled:
    """The level that was taken, with its verdict and those of the levels that were refused.

    cost: time of these gradients with it, over the time without int8; a machine's mood included.
    """

    level: int
    verdict: Verdict
    refused: tuple[tuple[int, Verdict], ...]
    cost: float

    @property
    def note(self) -> str:
        """The verdict, and whether it pays."""
        pays = "" if self.cost < PAYS else ", so --compute bf16 is as good here"
        return f"{self.verdict.note}; {self.cost:.2f} of the time without int8{pays}"


def settle(
    model: nn.Module,
    products: Int8Products,
    loss_of: LossOf,
    passes: Sequence[Sequence[Example]],
    *,
    draw: bool,
) -> Settled:
    """Take the first level, from the present one on, whose gradient over all passes is good.

    Args:
        products: in use on `model`.
        loss_of: as the loop uses it.
        passes: micro-batches with labels (`few_passes`).
        draw: B is drawn at N(0, 0.02²) for the comparison and thrown away; else as it is.

    Raises:
        RunError: no level keeps the bounds; the present one is still in use.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    present = products.level
    refused: list[tuple[int, Verdict]] = []
    doors = list(products.modules.values())
    settled = False
    try:
        with _undisturbed(model, trained, draw=draw):
            with in_fp32(model, doors):
                exact = _gradients(trained, loss_of, passes)
            for level in range(present, len(LEVELS)):
                products.use(level)
                verdict = judge(_gradients(trained, loss_of, passes), exact)
                settled = not verdict.missed
                if settled:
                    cost = _cost(trained, loss_of, passes, doors)
                    return Settled(level, verdict, tuple(refused), cost)
                refused.append((level, verdict))
            with multiplying_with([(module, stored_weight(module)) for module in doors]):
                plain = judge(_gradients(trained, loss_of, passes), exact)
    finally:
        if not settled:
            products.use(present)
    raise RunError(
        f"{LEVELS[-1]} does not give this base's gradient on these rows: {verdict.note}",
        got=f"{len(verdict.missed)} bounds missed: {'; '.join(verdict.missed[:4])}",
        allowed=f"every bound; without int8, {len(plain.missed)} are missed: {plain.note}",
        fix="--compute bf16",
    )


def told_by(settled: Settled, step: int) -> list[Proven]:
    """What to show and write: every level that was tried."""
    return [
        Proven(
            step, LEVELS[level], level == settled.level,
            settled.note if level == settled.level else verdict.note, verdict.missed,
            {name: (one.cosine, one.ratio) for name, one in verdict.tensors.items()},
        )
        for level, verdict in (*settled.refused, (settled.level, settled.verdict))
    ]  # fmt: skip


def few_passes(loader: Loader, parameters: int) -> list[list[Example]]:
    """The first micro-batches of a fresh loader with labels, cut to what is soon multiplied in fp32
    by a base of so many parameters."""
    most = proof_tokens(parameters)
    found: list[list[Example]] = []
    for _ in range(BATCHES):  # the rows may come round again
        for rows in next(loader).passes:
            taken: list[Example] = []
            tokens = 0
            for example in rows:
                tokens += len(example.ids)
                if tokens <= most or not taken:
                    taken.append(example)
            if len(found) < BATCHES and count_targets([taken]):
                found.append(taken)
    return found


def judge(ours: Gradients, exact: Gradients) -> Verdict:
    """Every tensor's agreement against the bounds."""
    tensors = {name: agreement(ours[name], two) for name, two in exact.items()}
    missed = []
    for name, one in tensors.items():
        if math.isnan(one.cosine):
            missed.append(f"{name}: the gradient is zero or not finite")
        elif one.cosine < LOWEST:
            missed.append(f"{name}: cosine {one.cosine:.4f}")
        elif not RATIOS[0] <= one.ratio <= RATIOS[1]:
            missed.append(f"{name}: ratio of norms {one.ratio:.4f}")
    median = statistics.median(_order(one.cosine) for one in tensors.values())
    if median < MEDIAN:
        missed.insert(0, f"median cosine {median:.5f}")
    return Verdict(tensors, median, tuple(missed))


def agreement(ours: Tensor, exact: Tensor) -> Agreement:
    """Cosine, and |ours| / |exact|, in fp64."""
    one, two = ours.double().flatten(), exact.double().flatten()
    sizes = float(one.norm()), float(two.norm())
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return Agreement(math.nan, math.nan)
    return Agreement(float(one @ two) / (sizes[0] * sizes[1]), sizes[0] / sizes[1])


def _order(cosine: float) -> float:
    return -1.0 if math.isnan(cosine) else cosine


def _cost(
    trained: dict[str, nn.Parameter], loss_of: LossOf, passes: Sequence[Sequence[Example]],
    doors: Sequence[nn.Module],
) -> float:  # fmt: skip
    """Time of the gradients as products are now, over that of stored weights; pass by pass in turn,
    over two passes, since these cost as much as steps."""
    ratios = []
    for examples in passes[:2]:
        seconds = []
        for stored in ([], [(module, stored_weight(module)) for module in doors]):
            began = time.perf_counter()
            with multiplying_with(stored):
                _gradients(trained, loss_of, [examples])
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.mean(ratios)


def _gradients(
    trained: dict[str, nn.Parameter], loss_of: LossOf, passes: Sequence[Sequence[Example]]
) -> Gradients:
    """Gradient of the mean loss over all labels of all passes, in fp32; `.grad` is not touched."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    labels = max(1, count_targets(passes))
    with torch.enable_grad():
        for examples in passes:
            loss, _ = loss_of(examples, 1 / labels)
            grads = torch.autograd.grad(loss, list(trained.values()))
            for name, grad in zip(trained, grads, strict=True):
                total[name].add_(grad)
    return total


@contextlib.contextmanager
def _undisturbed(
    model: nn.Module, trained: dict[str, nn.Parameter], *, draw: bool
) -> Iterator[None]:
    """No dropout, B drawn where asked; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    drawn = {n: p for n, p in trained.items() if draw and n.endswith("lora_B")}
    kept = {name: parameter.detach().clone() for name, parameter in drawn.items()}
    with torch.random.fork_rng():
        try:
            training_mode(model, False)
            generator = torch.Generator().manual_seed(0)
            for parameter in drawn.values():
                values = torch.randn(parameter.shape, generator=generator) * SPREAD
                parameter.data.copy_(values)
            yield
        finally:
            for name, values in kept.items():
                drawn[name].data.copy_(values)
            for module, mode in modes:
                module.training = mode
