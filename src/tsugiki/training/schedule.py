"""The learning rate of each step. Knows nothing else."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """Rate of step 1…total: a linear rise over `warmup_ratio · total` steps, then `kind`.

    cosine and linear fall to zero after the last step; constant stays at the peak.
    """
    warmup = math.ceil(total * warmup_ratio) if warmup_ratio > 0 else 0
    if step <= warmup:
        return peak * step / warmup
    if kind == "constant":
        return peak
    done = (step - 1 - warmup) / max(1, total - warmup)
    if kind == "linear":
        return peak * (1 - done)
    assert kind == "cosine", kind
    return peak * 0.5 * (1 + math.cos(math.pi * done))
