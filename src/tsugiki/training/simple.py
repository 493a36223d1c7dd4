"""`tsugiki.train`: an adapter on any causal model with rows that are already examples.

The same loss and optimiser as a full run, without folders and checkpoints. Knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tsugiki.adapters.attach import lora_modules, training_mode
from tsugiki.data.loader import Loader
from tsugiki.errors import AdapterError, DataError, NonFiniteError, UsageError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import flat_forward, use_flat_attention
from tsugiki.training.loop import clip, gradient_norm
from tsugiki.training.objective import flatten
from tsugiki.training.schedule import learning_rate as rate_at


def train(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    weight_decay: float = 0.0,
    warmup_ratio: float = 0.0,
    scheduler: str = "constant",
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train the adapter that `tsugiki.attach` put on a model.

    Args:
        model: a transformers causal model that keeps packed documents apart.
        rows: (ids, labels) of equal length, label -100 where nothing is trained.
        steps: optimiser steps.

    Returns:
        The loss of each step, nats per labelled token.

    Raises:
        AdapterError: nothing is attached.
        DataError: no rows, or rows that train nothing.
        UsageError: steps below 1.
        NonFiniteError: NaN or inf, before the update.
    """
    from tsugiki.data.chat import Example

    if next(lora_modules(model), None) is None:
        raise AdapterError("no adapter is attached", fix="tsugiki.attach(model, LoraConfig())")
    if steps < 1:
        raise UsageError("steps must be at least 1", got=steps)
    examples = tuple(
        Example(tuple(ids), tuple(labels), f"row {i}") for i, (ids, labels) in enumerate(rows, 1)
    )
    if not any(label != -100 for e in examples for label in e.labels[1:]):
        raise DataError("no row has a label that can be trained")
    use_flat_attention(model)
    torch.manual_seed(seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=0.0, weight_decay=weight_decay)
    loader = Loader(
        examples, micro_batch=batch_size, accumulation=gradient_accumulation_steps, seed=seed
    )
    device = next(model.parameters()).device
    training_mode(model, True)
    losses = []
    for step in range(1, steps + 1):
        passes = next(loader).passes
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, learning_rate, warmup_ratio, scheduler)
        optimizer.zero_grad(set_to_none=False)
        flat = [flatten(one, device) for one in passes]
        count = max(1, sum(len(targets) for _, _, _, targets in flat))
        total = 0.0
        for ids, batch, places, targets in flat:
            loss = _loss(model, ids, batch, places, targets) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = gradient_norm(trained)
        if not (torch.isfinite(torch.tensor([total, norm])).all()):
            raise NonFiniteError(f"loss or gradient of step {step} is NaN or inf")
        clip(trained, norm, max_grad_norm)
        optimizer.step()
        losses.append(total)
    training_mode(model, False)
    return losses


def _loss(
    model: nn.Module,
    ids: torch.Tensor,
    batch: ForwardBatch,
    places: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    logits = flat_forward(model, ids, batch, logits_at=places)[0]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
