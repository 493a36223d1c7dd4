"""Sees symptoms in the figures of a run and gives the guides' advice, each once. Knows no model."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128  # steps that a spike is judged against (OLMo's rule: six standard deviations)
SIGMAS = 6.0
SETTLED = 32  # steps before spikes are judged


class Watch:
    """Fed with losses; gives advice texts.

    Symptoms: a spike of the training loss; training loss that does not fall; held-out loss that
    rises while the training loss falls.
    """

    def __init__(self, total_steps: int) -> None:
        self.total = total_steps
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.first: list[float] = []
        self.held_out: list[float] = []
        self.said: set[str] = set()

    def step(self, step: int, loss: float) -> list[str]:
        """After each optimiser step."""
        advice = []
        if len(self.recent) >= SETTLED and is_spike(loss, self.recent):
            advice += self._once(
                f"spike {step}",
                f"the loss jumped to {loss:.3f} at step {step}; if it stays there, "
                "halve --learning-rate or look at the rows of this step",
            )
        self.recent.append(loss)
        if len(self.first) < 8:
            self.first.append(loss)
        if step >= max(40, self.total // 3) and "flat" not in self.said and len(self.recent) >= 16:
            late = list(self.recent)[-8:]
            if sum(late) / 8 > 0.98 * sum(self.first) / len(self.first):
                advice += self._once(
                    "flat",
                    "the loss does not fall: try --learning-rate 1e-4 or higher, "
                    "--lora-r 32 --lora-alpha 64",
                )
        return advice

    def evaluated(self, loss: float) -> list[str]:
        """After each held-out loss."""
        self.held_out.append(loss)
        best = min(self.held_out)
        if len(self.held_out) >= 4 and all(later > best * 1.02 for later in self.held_out[-2:]):
            return self._once(
                "overfit",
                "the held-out loss rises (overfitting): try --lora-dropout 0.1, "
                "--learning-rate 3e-5, --lora-r 8 or fewer --epochs; the best state is kept",
            )
        return []

    def _once(self, key: str, text: str) -> list[str]:
        if key in self.said:
            return []
        self.said.add(key)
        return [text]


def is_spike(loss: float, recent: deque[float]) -> bool:
    """Whether a loss is more than six standard deviations above the recent mean."""
    mean = sum(recent) / len(recent)
    variance = sum((x - mean) ** 2 for x in recent) / len(recent)
    return loss > mean + SIGMAS * max(math.sqrt(variance), 1e-3 * abs(mean))
