"""A model without weights: parameters on the meta device, buffers with their values.

Weights are then put in one by one, as a whole or in few bits, so that a model never stands in
memory twice. Knows no files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PretrainedConfig


def hollow_model(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> nn.Module:
    """The module tree of a config, ties kept."""
    # torch's own door for the purpose (its stub forgets that a hook may hand back a parameter)
    hook = register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]
    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    finally:
        hook.remove()
    assert isinstance(model, nn.Module)
    return model


def fill(model: nn.Module, path: str, value: Tensor) -> None:
    """Give a parameter its numbers, in every place that shares it.

    Raises:
        ValueError: they have another shape.
    """
    hollow = model.get_parameter(path)
    if hollow.shape != value.shape:
        raise ValueError(f"{path} {tuple(value.shape)} instead of {tuple(hollow.shape)}")
    filled = nn.Parameter(value, requires_grad=False)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is hollow:
                module._parameters[name] = filled


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
