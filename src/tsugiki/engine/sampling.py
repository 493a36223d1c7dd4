"""Chooses the next token from one row of logits.

Each request draws from its own generator, so what else runs in the batch changes no draw. Knows no
model, no batch and no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsugiki.engine.settings import Sampling as Sampling


def choose(
    logits: Tensor, history: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """One token id from logits (V,); `history` is the prompt and what was generated."""
    logits = logits.float().cpu()
    if sampling.repetition_penalty != 1:
        logits = penalise(logits, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = probabilities(logits, sampling)
    return int(torch.multinomial(weights, 1, generator=generator))


def penalise(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Positive logits of seen tokens divided, negative ones multiplied; (V,) → (V,)."""
    seen = torch.tensor(sorted(set(history)), dtype=torch.long)
    values = logits[seen]
    changed = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(0, seen, changed)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution (V,) that is drawn from: temperature, then top-k, top-p, min-p.

    The largest logit is always kept.
    """
    assert sampling.temperature > 0
    # the largest becomes 0 before dividing: a tiny temperature would overflow otherwise
    logits = (logits - logits.max()).double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.numel():
        kept = logits.topk(sampling.top_k)
        cut = torch.full_like(logits, float("-inf"))
        logits = cut.index_copy(0, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(0).cumsum(0).roll(1)  # probability of all larger tokens
        before[0] = 0.0
        logits = logits.index_fill(0, order[before >= sampling.top_p], float("-inf"))
    weights = logits.softmax(0)
    if sampling.min_p:
        weights = weights.where(weights >= sampling.min_p * weights.max(), 0.0)
    return weights / weights.sum()
