"""Many LoRA runs at once that differ in their learning rate only: one forward for all of them.

Each projection holds K adapters; the batch is laid K times end to end, so that copy k meets adapter
k. Losses, clipping and AdamW are kept apart, so each is the run it would be alone. For sweeps:
small models spend most of a step outside the products, and K runs share that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.config import LoraConfig
from tsugiki.data.chat import Example
from tsugiki.data.loader import Loader
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.load import Base
from tsugiki.training.objective import by_tokens, flatten
from tsugiki.training.schedule import learning_rate

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's defaults


class StackedLinear(nn.Module):
    """A projection with K adapters on K equal parts of its input.

    Args:
        base: the frozen projection.
        a: (r, in), where every copy starts.
        out: width of its output.
    """

    def __init__(self, base: nn.Module, a: Tensor, out: int, count: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a.detach().expand(count, -1, -1).clone())
        self.b = nn.Parameter(torch.zeros(count, out, a.shape[0]))
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (1, K·T, in) → (1, K·T, out)."""
        count = self.a.shape[0]
        y = self.base(x)
        parts = x.view(count, -1, x.shape[-1])
        shrunk = parts @ self.a.to(x.dtype).transpose(1, 2)
        grown = shrunk @ self.b.to(x.dtype).transpose(1, 2)
        return y + self.scale * grown.view_as(y)


def stack(base: Base, lora: LoraConfig, count: int, seed: int) -> list[StackedLinear]:
    """Put `count` adapters on the targets, all starting as `attach` with this seed starts one."""
    attach(base.model, lora, generator=torch.Generator().manual_seed(seed))
    single = list(lora_modules(base.model))
    starts = {path: (m.base, m.lora_A, m.lora_B.shape[0], m.scale) for path, m in single}
    detach(base.model)
    made = []
    for path, (plain, a, out, scale) in starts.items():
        module = StackedLinear(plain, a, out, count, scale)
        parent, _, name = path.rpartition(".")
        setattr(base.model.get_submodule(parent), name, module)
        made.append(module)
    return made


def unstack(base: Base) -> None:
    """The plain projections again."""
    for path, module in list(base.model.named_modules()):
        if isinstance(module, StackedLinear):
            parent, _, name = path.rpartition(".")
            setattr(base.model.get_submodule(parent), name, module.base)


def losses(base: Base, examples: Sequence[Example], count: int) -> tuple[Tensor, int]:
    """Summed cross entropy of each copy (K,), and how many labels one copy has."""
    ids, batch, places, targets = flatten(examples, base.device)
    length = ids.shape[1]
    shifts = torch.arange(count).repeat_interleave(len(places)) * length
    logits = base.forward(
        ids.repeat(1, count), ForwardBatch(batch.lengths * count), places.repeat(count) + shifts
    )[0]
    each = nn.functional.cross_entropy(logits.float(), targets.repeat(count), reduction="none")
    return each.view(count, -1).sum(1), len(targets)


@torch.no_grad()
def mean_losses(base: Base, examples: Sequence[Example], count: int, room: int = 8192) -> Tensor:
    """Mean nats per label of each copy (K,)."""
    total, labels = torch.zeros(count), 0
    for group in by_tokens(examples, max(256, room // count)):
        summed, seen = losses(base, group, count)
        total += summed
        labels += seen
    return total / labels


class Adam:
    """AdamW whose rate differs by copy; clips each copy's gradient by its own norm."""

    def __init__(self, trained: list[nn.Parameter], decay: float, limit: float) -> None:
        self.trained, self.decay, self.limit = trained, decay, limit
        self.first = [torch.zeros_like(p) for p in trained]
        self.second = [torch.zeros_like(p) for p in trained]
        self.steps = 0

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """One update with rates (K,)."""
        self.steps += 1
        grads = [p.grad for p in self.trained if p.grad is not None]
        norms = torch.stack([g.pow(2).sum((1, 2)) for g in grads]).sum(0).sqrt()
        factor = (self.limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
        rate = rates[:, None, None]
        slow = 1 - BETAS[0] ** self.steps
        fast = math.sqrt(1 - BETAS[1] ** self.steps)
        for p, g, m, v in zip(self.trained, grads, self.first, self.second, strict=True):
            g = g * factor
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            p.mul_(1 - rate * self.decay)
            p.sub_(rate / slow * m / (v.sqrt() / fast + EPSILON))
            p.grad = None


def sweep(
    base: Base,
    lora: LoraConfig,
    train: tuple[Example, ...],
    valid: tuple[Example, ...],
    test: Sequence[Example],
    *,
    rates: Sequence[float],
    epochs: int,
    rows_per_step: int,
    seed: int,
    warmup_ratio: float,
    decay: float,
    looks: int = 10,
) -> list[dict[str, float]]:
    """One run for each rate; of each the state that is best on `valid`, and its loss on `test`.

    Returns:
        rate, epochs, valid and test for each run, in the order of `rates`.
    """
    count = len(rates)
    modules = stack(base, lora, count, seed)
    trained = [p for m in modules for p in (m.a, m.b)]
    optimizer = Adam(trained, decay, 1.0)
    loader = Loader(train, micro_batch=rows_per_step, accumulation=1, seed=seed)
    steps = math.ceil(len(train) / rows_per_step) * epochs
    best = mean_losses(base, valid, count)
    kept = [p.detach().clone() for p in trained]
    peaks = torch.tensor(rates)
    for step in range(1, steps + 1):
        summed, labels = losses(base, next(loader).passes[0], count)
        (summed.nan_to_num(0.0) / labels).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step(peaks * learning_rate(step, steps, 1.0, warmup_ratio, "cosine"))
        if step == steps or step % math.ceil(steps / looks) == 0:
            now = mean_losses(base, valid, count)
            better = now < best
            best = torch.where(better, now, best)
            with torch.no_grad():
                for p, k in zip(trained, kept, strict=True):
                    k[better] = p[better]
    with torch.no_grad():
        for p, k in zip(trained, kept, strict=True):
            p.copy_(k)
    after = mean_losses(base, test, count)
    unstack(base)
    return [
        {"rate": r, "epochs": epochs, "valid": float(v), "test": float(t)}
        for r, v, t in zip(rates, best, after, strict=True)
    ]
