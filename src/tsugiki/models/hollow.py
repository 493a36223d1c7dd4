"""A model without weights: parameters on the meta device, buffers with their values.

Weights are then put in one by one, as a whole or in few bits, so that a model never stands in
memory twice. Knows no files.
"""

from __future__ import annotations

import torch
from torch import nn
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


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
