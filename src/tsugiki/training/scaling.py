"""Dynamic loss scaling: in float16 small gradients vanish unless the loss is raised first.

(Micikevicius et al. 2018, arXiv:1710.03740.) float16 ends at 65,504 above and 6e-8 below. The scale
is halved when a step overflows, which is then skipped, and doubled after many that did not. Knows
no model and no optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

FIRST, SMALLEST, LARGEST = 2.0**16, 1.0, 2.0**24
PATIENCE = 2000  # clean steps before the scale is raised, as torch's own scaler has it


@dataclass
class LossScale:
    """value: what the loss is multiplied by; clean: steps since it changed; skipped: steps lost."""

    value: float = FIRST
    clean: int = 0
    skipped: int = 0

    def overflow(self) -> bool:
        """After a step with inf or NaN, which is skipped; False: a smaller scale cannot help."""
        if self.value <= SMALLEST:
            return False
        self.value /= 2
        self.clean = 0
        self.skipped += 1
        return True

    def success(self) -> None:
        """After a step whose gradients were finite."""
        self.clean += 1
        if self.clean >= PATIENCE and self.value < LARGEST:
            self.value *= 2
            self.clean = 0


def needs_scaling(model: nn.Module) -> bool:
    """Whether a model computes in float16."""
    return any(p.dtype == torch.float16 for p in model.parameters())
