"""Layers that keep only their input and are computed again in the backward pass.

(Chen et al. 2016, arXiv:1604.06174.) Torch's non-reentrant checkpointing: the same numbers in the
same order, so gradients are exact, and a dropout's seed is drawn again from the same state. Costs
one more forward pass of every layer. Knows no adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tsugiki.errors import ModelError
from tsugiki.models.tuned import Replacement


class CheckpointedLayer(Replacement):
    """A layer in whose place it stands, computed twice where gradients are recorded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer takes and gives."""
        if not torch.is_grad_enabled():
            return self.fall_back(*args, **kwargs)
        return checkpoint(self.fall_back, *args, use_reentrant=False, **kwargs)


def layer_paths(model: nn.Module) -> list[str]:
    """Where the layers are: the longest list of modules of the body."""
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return []
    path, found = max(lists, key=lambda pair: len(pair[1]))
    return [f"{path}.{index}" for index in range(len(found))]


def checkpoint_layers(model: nn.Module) -> int:
    """Checkpoint every layer; how many. `untune` puts them back.

    Raises:
        ModelError: no list of layers is found.
    """
    paths = layer_paths(model)
    if not paths:
        raise ModelError(
            "this architecture has no list of layers to checkpoint",
            fix="--gradient-checkpointing never",
        )
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, CheckpointedLayer):
            model.set_submodule(path, CheckpointedLayer(layer))
    return len(paths)
