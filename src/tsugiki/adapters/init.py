"""How an adapter starts: A random, B zero.

With B = 0 the adapted model is exactly the base at step 0, and the first gradient reaches B
through A; were both random, training would begin from a damaged model, and were A zero too, no
gradient would flow. The scale alpha/r keeps the size of the change independent of the rank.
Knows no model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kaiming_uniform_a(r: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    """A (r, in): uniform in ±1/sqrt(in), which is Kaiming-uniform with a = sqrt(5)
    (He et al. 2015, as in Hu et al. 2021's loralib). fp32, on the CPU."""
    bound = math.sqrt(6 / ((1 + 5) * in_features))
    values = torch.rand(r, in_features, generator=generator, dtype=torch.float32)
    return values.mul_(2 * bound).sub_(bound)


def zero_b(r: int, out_features: int) -> Tensor:
    """B (out, r), zero, fp32."""
    return torch.zeros(out_features, r)
