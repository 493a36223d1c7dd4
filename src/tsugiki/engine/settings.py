"""How a request wants its tokens chosen. Loads no torch, so that a wrong value is told at once.

Knows no logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsugiki.errors import UsageError

if TYPE_CHECKING:
    import torch


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
        import torch

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator
