"""One optimiser step: the loss of all its labelled tokens, one clipped AdamW update.

The loss is summed over passes and ranks and divided by the labelled tokens of the whole step, so
that every token weighs the same however it was batched. The loop and `tsugiki.train` both step
through here. Knows no files and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.data.example import IGNORED, Example
from tsugiki.errors import NonFiniteError, UsageError
from tsugiki.training.ranks import Ranks
from tsugiki.training.scaling import LossScale

# (examples of one pass, factor) → factor · their summed loss in nats, and the number of its labels.
LossOf = Callable[[Sequence[Example], float], tuple[Tensor, int]]


@dataclass(frozen=True)
class Stepped:
    """loss: nats per labelled token. norm: of all gradients before clipping.

    skipped: it overflowed in float16 and changed nothing; loss and norm may be inf or NaN.
    """

    loss: float
    labels: int
    norm: float
    norms: dict[str, float] | None
    skipped: bool = False


def make_optimizer(
    trained: dict[str, nn.Parameter], decay: float, device: torch.device, kind: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with torch's fused update where it has one.

    kind: adamw; or adamw_8bit, paged_adamw_8bit (Dettmers et al. 2022, arXiv:2110.02861), which are
        bitsandbytes' and not yet measured on a GPU.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    groups = decay_groups(trained, decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cpu", "cuda"))
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError:
        raise UsageError(
            f"--optimizer {kind} needs bitsandbytes, which is not installed",
            fix="pip install bitsandbytes, or --optimizer adamw",
        ) from None
    made = (PagedAdamW8bit if kind.startswith("paged") else AdamW8bit)(groups, lr=0.0)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def optimiser_step(
    number: int,
    passes: Sequence[Sequence[Example]],
    loss_of: LossOf,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    *,
    rate: float,
    max_grad_norm: float,
    ranks: Ranks,
    all_norms: bool = False,
    scaling: LossScale | None = None,
) -> Stepped:
    """Forward and backward over this rank's passes, then one update.

    Args:
        number: of the step, for messages.
        passes: of all ranks together.
        all_norms: also the norm of every tensor's gradient.
        scaling: for float16; a step that overflows is then skipped.

    Raises:
        NonFiniteError: NaN or inf in the loss or a gradient, with `scaling` at every scale; no
            weight was touched.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=False)
    own = ranks.share(passes)
    labels = max(1, int(ranks.sum(count_targets(own))))
    scale = 1.0 if scaling is None else scaling.value
    total = 0.0
    for examples in own:
        loss, _ = loss_of(examples, scale / labels)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / scale
    total = ranks.sum(total)
    finite = math.isfinite(total)
    if not finite and scaling is None:
        raise not_finite(number, "the loss", [])
    ranks.sum_gradients(trained)
    if scale != 1.0:
        torch._foreach_mul_([p.grad for p in trained.values() if p.grad is not None], 1 / scale)
    norm = gradient_norm(trained)
    if not (finite and math.isfinite(norm)):
        if scaling is not None and scaling.overflow():
            return Stepped(total, labels, norm, None, skipped=True)
        wrong = [n for n, p in trained.items() if not _finite_grad(p)]
        raise not_finite(number, "the gradient" if finite else "the loss", wrong)
    if scaling is not None:
        scaling.success()
    norms = None
    if all_norms:
        norms = {n: float(p.grad.norm()) for n, p in trained.items() if p.grad is not None}
    clip(trained, norm, max_grad_norm)
    optimizer.step()
    return Stepped(total, labels, norm, norms)


def decay_groups(trained: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, norms' weights and biases do not (all of LoRA decays)."""
    matrices = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() <= 1]
    groups = ({"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def count_targets(passes: Sequence[Sequence[Example]]) -> int:
    """Labels that are predicted: a document's first token never is."""
    return sum(
        sum(label != IGNORED for label in example.labels[1:])
        for examples in passes
        for example in examples
    )


def gradient_norm(trained: dict[str, nn.Parameter]) -> float:
    """Global L2 norm of all gradients, in fp32."""
    grads = [p.grad for p in trained.values() if p.grad is not None]
    norms: list[Tensor] = list(torch._foreach_norm(grads))
    return float(torch.stack([n.float() for n in norms]).norm())


def clip(trained: dict[str, nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients in place so that their global norm is at most `limit` (0: never)."""
    if limit > 0 and norm > limit:
        factor = limit / (norm + 1e-6)
        torch._foreach_mul_([p.grad for p in trained.values() if p.grad is not None], factor)


def not_finite(number: int, what: str, names: list[str]) -> NonFiniteError:
    """The error that names a step, and the tensors where they are known."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return NonFiniteError(
        f"{what} of step {number} is NaN or inf; nothing was updated with it",
        got=", ".join(names[:6]) + more if names else None,
        fix="a lower --learning-rate, or --dtype float32",
    )


def _finite_grad(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(parameter.grad).all())
