"""Puts NaN or inf into one pass of training: its loss, one number of a gradient or an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.data.example import Example
from tsugiki.models.load import Base

WHERE = ("loss", "gradient", "activation")


class Poison:
    """Stands for `objective.summed_loss`; the pass number `at`, from 1, gets `value` in it."""

    def __init__(self, real: Callable[..., Any], where: str, value: float, at: int) -> None:
        self.real, self.where, self.value, self.at = real, where, value, at
        self.calls = 0

    def __call__(
        self, base: Base, examples: Sequence[Example], factor: float = 1.0
    ) -> tuple[Tensor, int]:
        self.calls += 1
        if self.calls != self.at:
            return self.real(base, examples, factor)  # type: ignore[no-any-return]
        if self.where == "activation":
            handle = base.model.get_submodule("model.layers.1").register_forward_hook(self._output)
            try:
                return self.real(base, examples, factor)  # type: ignore[no-any-return]
            finally:
                handle.remove()
        loss, labels = self.real(base, examples, factor)
        if self.where == "loss":
            return loss * self.value, labels

        def spoil(gradient: Tensor) -> Tensor:
            once.remove()
            return self._one(gradient)

        once = poisoned_parameter(base.model)[1].register_hook(spoil)
        return loss, labels

    def _output(self, _: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._one(output[0]), *output[1:])
        return self._one(output)

    def _one(self, tensor: Tensor) -> Tensor:
        """With its first number spoilt: of an activation the first token's, which all others see."""
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = self.value
        return spoilt


def poisoned_parameter(model: nn.Module) -> tuple[str, nn.Parameter]:
    """The one whose gradient is spoilt: the last B."""
    return [(n, p) for n, p in model.named_parameters() if n.endswith("lora_B")][-1]


def everything(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copies of all that an update changes: weights, and moments and counts of the optimiser."""
    found = {name: p.detach().clone() for name, p in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{key} of {name}"] = torch.as_tensor(value).clone()
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same to the bit, or is there in one alone."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    )
