"""Sees symptoms in the figures of a run and gives the guides' advice, each once. Knows no model.

The guides speak of a rate of 5e-5 and rank 16: where a loss does not fall, twice of both; where it
is overfitting, a rate of 3e-5 and rank 8. A run at another rate is told the same parts of its own.
"""

from __future__ import annotations

import math
from collections import deque

from tsugiki.config import RunConfig

WINDOW = 128  # steps that a spike is judged against (OLMo's rule: six standard deviations)
SIGMAS = 6.0
SETTLED = 32  # steps before spikes are judged


class Watch:
    """Fed with losses; gives advice texts.

    Symptoms: a spike of the training loss; training loss that does not fall; held-out loss that
    rises while the training loss falls.
    """

    def __init__(self, total_steps: int, config: RunConfig) -> None:
        self.total = total_steps
        self.config = config
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
                    f"the loss does not fall: try {self._rate(2.0)}{self._more_rank()}",
                )
        return advice

    def evaluated(self, loss: float) -> list[str]:
        """After each held-out loss."""
        self.held_out.append(loss)
        best = min(self.held_out)
        if len(self.held_out) >= 4 and all(later > best * 1.02 for later in self.held_out[-2:]):
            return self._once(
                "overfit",
                f"the held-out loss rises (overfitting): try {self._less()}; "
                "the best state is kept",
            )
        return []

    def _rate(self, factor: float) -> str:
        return f"--learning-rate {factor * (self.config.train.learning_rate or 5e-5):.2g}"

    def _more_rank(self) -> str:
        if self.config.train.method == "full":
            return ""
        lora = self.config.lora
        return f", --lora-r {2 * lora.r} --lora-alpha {2 * lora.resolved_alpha:g}"

    def _less(self) -> str:
        """What learns by heart less quickly, of what this run may still lower."""
        lora, train = self.config.lora, self.config.train
        ways = [self._rate(0.6)]
        if train.method == "lora" and lora.dropout < 0.1:
            ways.insert(0, "--lora-dropout 0.1")
        if train.method == "lora" and lora.r > 1:
            ways.append(f"--lora-r {lora.r // 2} --lora-alpha {lora.resolved_alpha / 2:g}")
        if train.epochs is None or train.epochs > 1:
            ways.append("fewer --epochs")
        return f"{', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else ways[0]

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
