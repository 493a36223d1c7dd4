"""One projection with an adapter on it: y = W·x + b + scale · B·A·dropout(x).

(Hu et al. 2021, arXiv:2106.09685.) The frozen module stays a child named `base`, so it can be
handed back; the arithmetic is `kernels/linear.py`'s. Knows no model and no files.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsugiki.kernels.linear import LoraTerm, grouped_linear
from tsugiki.models.projections import frozen_weight


class LoraLinear(nn.Module):
    """A projection with one trainable adapter.

    Args:
        base: a projection, also a quantised one; frozen, kept as the child `base`.
        a: (r, in) fp32.
        b: (out, r) fp32.
        scale: alpha/r, or alpha/sqrt(r).
        dropout: on the adapter's input while training.
    """

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        weight = frozen_weight(base)
        assert a.shape[1] == weight.shape[1], f"A {tuple(a.shape)} on {weight.shape}"
        assert b.shape[0] == weight.shape[0], f"B {tuple(b.shape)} on {weight.shape}"
        assert a.shape[0] == b.shape[1], f"A {tuple(a.shape)}, B {tuple(b.shape)}"
        self.base = base
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(b.to(device))
        self.scale = scale
        self.dropout = dropout
        self.thawed: tuple[nn.Parameter, ...] = ()  # what surgery froze in the whole model

    @property
    def weight(self) -> Tensor:
        """The frozen weight as stored; some architectures read its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def term(self) -> LoraTerm:
        """The adapter's part, dropout only while training."""
        return LoraTerm(
            self.lora_A, self.lora_B, self.scale, self.dropout if self.training else 0.0
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        if torch.is_autocast_enabled(x.device.type):
            return self._autocast(x)
        return grouped_linear(x, [frozen_weight(self.base)], [[self.term]])[0]

    def _autocast(self, x: Tensor) -> Tensor:
        """Plain products, in the type that a loop of somebody's own asked torch for."""
        thin = F.dropout(x, self.dropout, self.training)
        change = F.linear(F.linear(thin, self.lora_A), self.lora_B)
        out = self.base(x) + self.scale * change
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """Rank and scale, for printing the model."""
        return f"r={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"
