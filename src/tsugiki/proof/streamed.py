"""A model whose weights come from the mapped file when a layer runs, and go when it is done.

For models that memory does not hold: a forward needs the largest module's weights and the
activations, whatever the model's size. Slower than a loaded one by the reading, the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tsugiki.adapters.lora import LoraLinear
from tsugiki.models.flat import use_flat_attention, use_own_attention
from tsugiki.models.hollow import hollow_model
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import Base, load_tokenizer
from tsugiki.models.shards import StoredModel
from tsugiki.models.spec import ModelSpec, NameMap
from tsugiki.proof.applied import AppliedEmbedding, AppliedLinear

Numbers = Callable[[str], Tensor]
WITH_BASE = (LoraLinear, AppliedLinear, AppliedEmbedding)


def streamed_base(resolved: ResolvedModel, dtype: torch.dtype = torch.float32) -> Base:
    """The model of a folder without a weight in memory, to run in `dtype`; `stream` makes it run.

    Raises:
        ModelError: a config or tokenizer that cannot be read.
    """
    spec = ModelSpec.from_folder(resolved.folder)
    model = hollow_model(spec.config, dtype)
    model.eval()
    model.requires_grad_(False)
    isolation = probe_isolation(spec.config)
    (use_flat_attention if isolation.holds else use_own_attention)(model)
    tokenizer = load_tokenizer(resolved)
    return Base(
        model, tokenizer, spec, resolved.folder, resolved.name, resolved.commit, isolation.holds
    )


def as_stored(base: Base, stored: StoredModel) -> Numbers:
    """What the files hold, in fp32.

    Raises (when asked):
        ModelError: a parameter that they do not hold.
    """
    names = NameMap(base.spec.meta_model(), stored.tensors)
    return lambda path: stored.tensor(names.to_disk(path)).float()


def stream(base: Base, numbers: Numbers) -> tuple[list[RemovableHandle], int]:
    """Let each module fetch its weights when it runs; adapters are on the model already.

    Args:
        numbers: parameter path → its numbers, in the type that the model runs in.

    Returns:
        the hooks, and the bytes of the largest module's weights in that type.
    """
    model = base.model
    hooks: list[RemovableHandle] = []
    inside = {module.base for module in model.modules() if isinstance(module, WITH_BASE)}
    largest = 0
    for path, module in model.named_modules():
        if module in inside:
            continue
        owner = module.base if isinstance(module, WITH_BASE) else module
        assert isinstance(owner, nn.Module)
        wanted = {
            name: f"{path}.{name}"
            for name, parameter in owner._parameters.items()
            if parameter is not None and parameter.is_meta
        }
        if wanted:
            sizes = (owner.get_parameter(name).nbytes for name in wanted)
            largest = max(largest, sum(sizes))
            hooks.append(module.register_forward_pre_hook(_fetch(owner, wanted, numbers)))
            hooks.append(module.register_forward_hook(_drop(owner, wanted)))
    return hooks, largest


def _fetch(owner: nn.Module, wanted: dict[str, str], numbers: Numbers) -> Callable[..., None]:
    def before(*_: Any) -> None:
        for name, path in wanted.items():
            owner._parameters[name] = _frozen(numbers(path))

    return before


def _drop(owner: nn.Module, wanted: dict[str, str]) -> Callable[..., None]:
    empty = {name: owner._parameters[name] for name in wanted}

    def after(*_: Any) -> None:
        owner._parameters.update(empty)

    return after


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
