"""The loss: cross entropy of labelled tokens, summed, divided by the labels of the whole step.

Only positions whose next token is a label reach the head. Knows the flat forward, not the loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsugiki.adapters.attach import training_mode
from tsugiki.data.example import IGNORED, Example
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.memory import EVAL_TOKENS
from tsugiki.models.flat import flat_loss, logits_loss
from tsugiki.models.load import Base


def flatten(
    examples: Sequence[Example], device: torch.device
) -> tuple[Tensor, ForwardBatch, Tensor, Tensor]:
    """Examples end to end.

    Returns:
        ids (1, T); the batch; positions (n,) that predict a labelled token; their targets (n,).
    """
    ids = torch.tensor([token for e in examples for token in e.ids])
    labels = torch.tensor([label for e in examples for label in e.labels])
    batch = ForwardBatch(tuple(len(e.ids) for e in examples))
    target = labels.clone()
    target[list(batch.offsets)] = IGNORED  # a document's first token is predicted by nothing
    places = (target != IGNORED).nonzero().squeeze(1)
    return (
        ids[None].to(device),
        batch,
        (places - 1).to(device),
        labels[places].to(device),
    )


def summed_loss(base: Base, examples: Sequence[Example], factor: float = 1.0) -> tuple[Tensor, int]:
    """factor · sum of cross entropy (nats, fp32) over labelled tokens, and how many there are.

    In chunks that keep no logits where the base's head was proven.
    """
    ids, batch, places, targets = flatten(examples, base.device)
    if not base.flat:
        logits = base.forward(ids, batch, places)[0]
        return factor * logits_loss(logits, targets), len(targets)
    head = None if base.tuned is None else base.tuned.head_of(base.model)
    loss = flat_loss(base.model, ids, batch, places, targets, head=head, factor=factor)
    return loss, len(targets)


def held_out_loss(base: Base, examples: Sequence[Example]) -> float:
    """Mean nats per labelled token, without dropout; leaves the model in evaluation mode."""
    training_mode(base.model, False)
    total, count = 0.0, 0
    with torch.no_grad():
        for group in by_tokens(examples, EVAL_TOKENS):
            loss, labels = summed_loss(base, group)
            total += float(loss)
            count += labels
    return total / max(1, count)


def by_tokens(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """Examples sorted by length, in groups of at most `limit` tokens (one at least)."""
    groups: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=lambda e: len(e.ids)):
        if not groups or room < len(example.ids):
            groups.append([])
            room = limit
        groups[-1].append(example)
        room -= len(example.ids)
    return groups
