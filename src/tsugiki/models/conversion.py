"""How transformers reads files of another form: names that it changes, tensors that it joins.

GPT-NeoX's head is stored as `embed_out`, Mixtral's experts one by one where the module keeps them
stacked. The rules are transformers' own, asked of it and carried out by it; nothing is loaded here
but the pieces that are handed in. PEFT goes by the same table when it reads names of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tsugiki.errors import ModelError

# PEFT 0.21 (`_convert_peft_config_moe`) takes a module so named for an expert, or the router, of an
# older file wherever it stands, and adapts the stacked experts in its place.
EXPERTS = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def experts_for_peft(model_type: str | None) -> frozenset[str]:
    """Last names of modules that PEFT takes for experts in a model of this type.

    Dense layers and shared experts of DeepSeek, GLM-4-MoE and others have them, too.
    """
    from transformers import conversion_mapping

    table = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind: str = table.get(model_type, model_type or "")
    return EXPERTS.get(kind, frozenset())


@dataclass
class Joined:
    """Parameters that are made of several stored tensors, or several of one.

    paths: the parameters. parts: stored name → the pattern of the rule that it goes in by.
    """

    paths: tuple[str, ...]
    rule: Any
    parts: dict[str, str] = field(default_factory=dict)

    def join(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter → its numbers.

        Raises:
            ModelError: the pieces do not go together; the parameter is named.
        """
        rule = copy.deepcopy(self.rule)
        for name, pattern in self.parts.items():
            rule.add_tensor(self.paths[0], name, pattern, read(name))
        try:
            made = rule.convert(self.paths[0], model=model, config=model.config)
        except Exception as error:  # whatever torch raises for pieces that do not fit
            raise self._wrong(str(error).strip().splitlines()[0][:160]) from None
        tensors = {path: t[0] if isinstance(t, list) else t for path, t in made.items()}
        for path in self.paths:
            shape = tuple(model.get_parameter(path).shape)
            if path not in tensors or tuple(tensors[path].shape) != shape:
                found = tuple(tensors[path].shape) if path in tensors else "nothing"
                raise self._wrong(f"{found} instead of {shape}")
        return {path: tensors[path] for path in self.paths}

    def _wrong(self, why: str) -> ModelError:
        first, count = next(iter(self.parts)), len(self.parts)
        return ModelError(
            f"{self.paths[0]} cannot be made of {count} stored tensors ({first} …)",
            got=why,
            fix="download the model again, or check its config.json",
        )


@dataclass
class Conversion:
    """renamed: stored name → the model's own name. parts: stored name → what it is a part of."""

    renamed: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Joined] = field(default_factory=dict)


def read_conversion(model: nn.Module, stored: Iterable[str]) -> Conversion:
    """What transformers would do to stored names of this model; nothing to those it takes as is.

    Args:
        model: the base without adapters, on any device.
    """
    found = Conversion()
    if not isinstance(model, PreTrainedModel):
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = dict.fromkeys(parameters | {name for name, _ in model.named_buffers()}, True)
    groups: dict[str, Joined] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
        path, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if pattern is None:
            if path != name and path in own:
                found.renamed[name] = path
            continue
        rule = by_pattern[pattern]
        first = rule.target_patterns[0]
        paths = tuple(path.replace(first, target) for target in rule.target_patterns)
        if set(paths) <= parameters:
            found.parts[name] = groups.setdefault(path, Joined(paths, rule))
            groups[path].parts[name] = pattern
    return found
