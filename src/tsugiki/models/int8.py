"""Lets a model's frozen projections multiply in int8 while gradients are recorded.

Only what goes through the one door to a projection can: adapted projections, those inside proven
replacements, and a proven head. How much of the way forward is int8 too is a level; which level is
good enough for a model is training's to prove. Knows no adapters beyond a child's `base`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from tsugiki.errors import ModelError
from tsugiki.kernels.int8 import DEEPEST, Int8Weight, Scratch
from tsugiki.kernels.linear import LoraTerm
from tsugiki.models.head import output_of
from tsugiki.models.projections import multiply_with, projection, stored_weight
from tsugiki.models.tune import Tuned
from tsugiki.models.tuned import Replacement

# From fastest to safest. What the way forward adds to the gradient's noise comes first from what is
# written to the residual stream (v, o, down: two thirds of it), then from gate and up alike; the
# head adds next to nothing. All ways back are int8 at every level.
LEVELS = (
    "int8 both ways",
    "int8 both ways for gate, up and the head, on the way back for all others",
    "int8 both ways for gate and the head, on the way back for all others",
    "int8 both ways for the head, on the way back for all others",
    "int8 on the way back",
)
WIDENING = {1: {"gate_proj", "up_proj", "gate_up_proj", "c_fc"}, 2: {"gate_proj"}}


def doors(model: nn.Module, tuned: Tuned) -> dict[str, nn.Module]:
    """Path → projection, of all whose products can be chosen."""
    found = dict(_reached(model))
    if tuned.head is not None:
        head = output_of(model)
        found |= {path: m for path, m in model.named_modules() if m is head}
    return found


def _reached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if isinstance(getattr(module, "term", None), LoraTerm):
            yield path, module.base
        elif isinstance(module, Replacement):
            for name, child in module.named_children():
                if projection(child) is not None:
                    yield f"{path}.{name}", child


class Int8Products:
    """The int8 form of every projection behind a door of one model, and which of it is in use.

    Raises:
        ModelError: a weight holds NaN or inf; the model is as before.
    """

    def __init__(self, model: nn.Module, tuned: Tuned) -> None:
        self.modules = doors(model, tuned)
        self._head = None if tuned.head is None else output_of(model)
        self.weights: dict[str, Int8Weight] = {}
        scratch = Scratch()
        for path, module in self.modules.items():
            shape = projection(module)
            assert shape is not None
            if shape.in_features > DEEPEST:
                continue
            try:
                weight = Int8Weight.of(stored_weight(module), scratch)
            except ValueError as error:
                raise ModelError(f"{path} holds {error}: it has no int8 form") from None
            self.weights[path] = dataclasses.replace(weight, dither=module is self._head)
        self.level = 0
        self.use(0)

    def use(self, level: int) -> None:
        """From now on a step multiplies so; see `LEVELS`."""
        self.level = level
        for path, weight in self.weights.items():
            module = self.modules[path]
            chosen = path.rpartition(".")[2] in WIDENING.get(level, set())
            head = module is self._head and level < len(LEVELS) - 1
            forward = level == 0 or chosen or head
            multiply_with(module, dataclasses.replace(weight, forward=forward))

    @property
    def nbytes(self) -> int:
        """Bytes in memory beyond the stored weights."""
        return sum(weight.nbytes - weight.source.nbytes for weight in self.weights.values())


def use_own_products(model: nn.Module) -> None:
    """Every projection multiplies as it is stored again."""
    for module in model.modules():
        multiply_with(module, None)
