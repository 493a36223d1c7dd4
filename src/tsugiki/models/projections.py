"""One door to a model's projections, whatever class holds them: kind, shape and frozen weight.

nn.Linear, GPT-2's Conv1D, and both quantised. How a weight is stored and how it multiplies are two
things: other products (int8, or fp32 for a comparison) may stand in while gradients are recorded,
so that evaluation, samples and files always see the base as it is. Knows no adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsugiki.kernels.linear import DenseWeight, FrozenWeight
from tsugiki.models.quantized import QuantizedLinear

# Plain attribute of a module: neither a child nor a parameter, so that no name and no file changes.
_PRODUCTS = "_tsugiki_products"
_FORWARDS: dict[
    type[nn.Module], bool
] = {}  # subclasses of nn.Linear: whether they give the product


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
    if isinstance(module, nn.Linear) and _multiplies(module):
        return Projection("linear", module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return Projection("conv1d", rows, columns)
    return None


def _multiplies(module: nn.Linear) -> bool:
    """Whether a subclass of nn.Linear gives one tensor of the product's shape, by its own forward;
    routers that inherit from it give a choice. Asked once a class, without hooks.
    """
    kind = type(module)
    if kind.forward is nn.Linear.forward:
        return True
    if kind not in _FORWARDS:
        weight = module.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        one = torch.ones(1, 1, module.in_features, dtype=dtype, device=weight.device)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                given = kind.forward(module, one)
        except Exception:  # it wants another input: nothing was learnt of what it gives
            return True
        shape = (1, 1, module.out_features)
        _FORWARDS[kind] = isinstance(given, Tensor) and given.shape == shape
    return _FORWARDS[kind]


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a projection behind the protocol, with the products that hold just now."""
    other = module.__dict__.get(_PRODUCTS)
    if other is None or not torch.is_grad_enabled():
        return stored_weight(module)
    weight: FrozenWeight = other
    return weight


def stored_weight(module: nn.Module) -> FrozenWeight:
    """The same, multiplying as it is stored."""
    if isinstance(module, QuantizedLinear):
        return module.frozen
    assert isinstance(module, nn.Linear | Conv1D)
    return DenseWeight(module.weight, module.bias, transposed=isinstance(module, Conv1D))


def multiply_with(module: nn.Module, weight: FrozenWeight | None) -> None:
    """From now on this projection multiplies so while gradients are recorded; None: as stored."""
    if weight is None:
        module.__dict__.pop(_PRODUCTS, None)
    else:
        module.__dict__[_PRODUCTS] = weight


@contextlib.contextmanager
def multiplying_with(weights: Sequence[tuple[nn.Module, FrozenWeight]]) -> Iterator[None]:
    """The same for a while."""
    before = [(module, module.__dict__.get(_PRODUCTS)) for module, _ in weights]
    for module, weight in weights:
        multiply_with(module, weight)
    try:
        yield
    finally:
        for module, earlier in before:
            multiply_with(module, earlier)
