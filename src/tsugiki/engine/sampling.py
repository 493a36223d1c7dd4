"""Chooses the next token from one row of logits.

Each request draws from its own generator, so what else runs in the batch changes no draw. Knows no
model, no batch and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy.

    Args:
        temperature: divides the logits; 0 takes the largest.
        top_k: keep the k largest.
        top_p: keep the smallest set of tokens with at least this probability.
        min_p: keep tokens with at least this share of the largest probability.
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely
            (Keskar et al. 2019, arXiv:1909.05858).
        seed: of this request's own generator; drawn at random when None.
        max_tokens: most tokens to generate.

    Raises:
        UsageError: every value out of range, all in one message.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 256

    def __post_init__(self) -> None:
        checks = (
            ("temperature", 0 <= self.temperature < float("inf"), "a number ≥ 0 (0 is greedy)"),
            ("top_k", self.top_k is None or self.top_k >= 1, "≥ 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("max_tokens", self.max_tokens >= 1, "≥ 1"),
        )
        wrong = [(name, allowed) for name, fine, allowed in checks if not fine]
        if wrong:
            raise UsageError(
                "sampling values that make no sense",
                got=", ".join(f"{name} {getattr(self, name)}" for name, _ in wrong),
                allowed=", ".join(f"{name} {allowed}" for name, allowed in wrong),
            )

    @property
    def plain(self) -> bool:
        """Greedy with nothing that looks at earlier tokens: the argmax of the row."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def generator(self) -> torch.Generator:
        """A generator of this request's own, on the CPU."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


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
