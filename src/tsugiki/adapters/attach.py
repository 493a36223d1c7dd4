"""Puts adapters on a model and takes them off; returns what it changed.

Works on any nn.Module. Surgery is a list of (path, new module), then one update: a refusal leaves
the model untouched. Knows no files and no training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsugiki.adapters.init import kaiming_uniform_a, zero_b
from tsugiki.adapters.lora import LoraLinear
from tsugiki.adapters.targets import Target, resolve_targets
from tsugiki.config import LoraConfig
from tsugiki.errors import AdapterError
from tsugiki.models.int8 import use_own_products
from tsugiki.models.tune import untune


@dataclass(frozen=True)
class Attached:
    """What `attach` changed: targets, and parameter counts."""

    targets: tuple[Target, ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable part of all parameters, adapter included."""
        return self.trainable / self.total


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, module) of every adapted projection, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def attach(
    model: nn.Module, config: LoraConfig, *, generator: torch.Generator | None = None
) -> Attached:
    """Freeze the model and put a fresh adapter on its targets.

    Args:
        config: rank, alpha, dropout, targets.
        generator: draws A; torch's own when None.

    Raises:
        AdapterError: an adapter is on it already; a target that is wrong.
    """
    refuse_attached(model)
    targets = resolve_targets(model, config.targets)
    pairs = {
        t.path: (
            kaiming_uniform_a(config.r, t.in_features, generator),
            zero_b(config.r, t.out_features),
        )
        for t in targets
    }
    place(model, pairs, dict.fromkeys(pairs, config.scale), config.dropout)
    trainable = sum(t.count(config.r) for t in targets)
    unique = {id(p): p.numel() for p in model.parameters()}
    return Attached(targets, trainable, sum(unique.values()))


def refuse_attached(model: nn.Module) -> None:
    """Raises AdapterError when the model carries an adapter."""
    if next(lora_modules(model), None) is not None:
        raise AdapterError(
            "this model carries an adapter already", fix="tsugiki.detach(model) first"
        )


def place(
    model: nn.Module,
    pairs: dict[str, tuple[Tensor, Tensor]],
    scales: dict[str, float],
    dropout: float = 0.0,
    *,
    trainable: bool = True,
) -> None:
    """Replace each projection by one that carries its A and B; everything else is frozen."""
    new = {
        path: LoraLinear(model.get_submodule(path), a, b, scales[path], dropout)
        for path, (a, b) in pairs.items()
    }
    uses = _uses(model)
    thawed = tuple(p for p in model.parameters() if p.requires_grad)
    model.requires_grad_(False)
    for module in new.values():
        module.thawed = thawed
        module.train(module.base.training)
        module.lora_A.requires_grad_(trainable)
        module.lora_B.requires_grad_(trainable)
        for parent, name in uses[module.base]:
            setattr(parent, name, module)


def training_mode(model: nn.Module, on: bool) -> None:
    """Dropout on or off: the adapter's alone where there is one, else the model's own.

    A frozen base is a fixed function; its own dropout (GPT-2's) would only blur it.
    """
    adapted = [module for _, module in lora_modules(model)]
    model.train(on and not adapted)
    for module in adapted:
        module.training = on


def detach(model: nn.Module) -> list[str]:
    """Put the plain modules back and thaw what `attach` froze; returns the projections' paths."""
    found, uses = list(lora_modules(model)), _uses(model)
    for _, module in found:
        for parent, name in uses[module]:
            setattr(parent, name, module.base)
        for parameter in module.thawed:
            parameter.requires_grad_(True)
    use_own_products(model)
    untune(model)
    return [path for path, _ in found]


def _uses(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where each module stands: (parent, name) of every use, one that is shared has several."""
    uses: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                uses[child].append((parent, name))
    return uses
