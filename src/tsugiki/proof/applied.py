"""An adapter beside its weights as modules, for what training cannot attach.

DoRA as its paper writes it, embeddings, and modules that were trained whole. The formulas are
written apart from `adapters/algebra.py`, so that one does not vouch for itself. Knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsugiki.adapters.algebra import Change, LowRank


class AppliedLinear(nn.Module):
    """m / ‖W + s·B·A‖ · (W + s·B·A)·x + b, the ratio left out without a magnitude m.

    a (r, in), b (out, r), magnitude (out,); the norm runs over each output's row.
    """

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None
    ) -> None:
        super().__init__()
        assert isinstance(base, nn.Linear | Conv1D)
        self.base, self.a, self.b, self.scale, self.magnitude = base, a, b, scale, magnitude

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some architectures read its type."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        matrix = self.weight.T if isinstance(self.base, Conv1D) else self.weight  # (out, in)
        y = F.linear(x, matrix) + self.scale * F.linear(F.linear(x, self.a), self.b)
        if self.magnitude is not None:
            eye = torch.eye(self.a.shape[1])
            moved = matrix + self.scale * F.linear(F.linear(eye, self.a), self.b).T
            y = y * (self.magnitude / moved.norm(dim=1))
        bias = self.base.bias
        return y if bias is None else y + bias


class AppliedEmbedding(nn.Module):
    """The rows of W + s·(B·A)ᵀ, times the scale that some families give their embedding.

    a (r, vocabulary), b (width, r).
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.a, self.b, self.scale = base, a, b, scale

    @property
    def weight(self) -> Tensor:
        """The frozen weight; some architectures read its type."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) → (…, width)."""
        more: Tensor = F.linear(F.embedding(ids, self.a.T), self.b) * self.scale
        embedded: Tensor = self.base(ids)
        return embedded + more * getattr(self.base, "embed_scale", 1.0)


def apply_changes(model: nn.Module, changes: Iterable[Change]) -> None:
    """Replace each changed module; a module that shares its weight with another does so alone."""
    for change in changes:
        if not isinstance(change, LowRank):
            path, _, name = change.path.rpartition(".")
            module = model.get_submodule(path)
            setattr(module, name, nn.Parameter(change.value.float().clone(), requires_grad=False))
            continue
        base = model.get_submodule(change.path)
        a, b = change.a.float(), change.b.float()
        new: nn.Module
        if isinstance(base, nn.Embedding):
            new = AppliedEmbedding(base, a, b, change.scale)
        else:
            magnitude = None if change.magnitude is None else change.magnitude.float()
            new = AppliedLinear(base, a, b, change.scale, magnitude)
        model.set_submodule(change.path, new)
