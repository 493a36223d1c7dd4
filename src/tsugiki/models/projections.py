"""One door to a model's projections, whatever class holds them: kind, shape and frozen weight.

nn.Linear, GPT-2's Conv1D, and both quantised. Knows no adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from tsugiki.kernels.linear import DenseWeight, FrozenWeight
from tsugiki.models.quantized import QuantizedLinear


@dataclass(frozen=True)
class Projection:
    """What multiplies: kind is 'linear' or 'conv1d' (stored (in, out))."""

    kind: str
    in_features: int
    out_features: int


def projection(module: nn.Module) -> Projection | None:
    """Kind and shape of a projection; None for any other module."""
    if isinstance(module, QuantizedLinear):
        return Projection(module.kind, module.in_features, module.out_features)
    if isinstance(module, nn.Linear):
        return Projection("linear", module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return Projection("conv1d", rows, columns)
    return None


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a projection behind the protocol."""
    if isinstance(module, QuantizedLinear):
        return module.frozen
    assert isinstance(module, nn.Linear | Conv1D)
    return DenseWeight(module.weight, module.bias, transposed=isinstance(module, Conv1D))
