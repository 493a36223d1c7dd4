"""A base model's shapes and names, read from its config without touching a weight.

The name map (disk name ↔ module path ↔ tied partner) lives here and nowhere else. Knows nothing
of adapters or of how weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tsugiki.errors import ModelError
from tsugiki.models.conversion import Conversion, read_conversion
from tsugiki.models.projections import projection
from tsugiki.models.shards import read_config

# What configs call the longest sequence; the first that one has counts.
CONTEXT = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx",
    "seq_length", "context_length",
)  # fmt: skip
DECODER = "--model with a causal language model (a decoder, such as Llama, Qwen or GPT-2)"


@dataclass(frozen=True)
class LinearModule:
    """A projection of the base: its module path, storage (linear or conv1d), and shape."""

    path: str
    kind: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a base; counts are of parameters, a tied pair counted once."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context: int
    parameters: int
    config: PretrainedConfig
    meta: nn.Module = field(repr=False, compare=False)

    @classmethod
    def from_folder(cls, folder: Path, *, trust_remote_code: bool = False) -> ModelSpec:
        """Read `config.json`.

        Raises:
            ModelError: no config, not JSON, an architecture that is not known, code of its own.
        """
        return cls.from_config(load_config(folder, trust_remote_code=trust_remote_code))

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelSpec:
        """Shapes from a transformers config.

        Raises:
            ModelError: an encoder-decoder, or no causal language model.
        """
        text = config.get_text_config()
        model = _build_on_meta(config)
        heads = int(_first(text, "num_attention_heads", "n_head") or 1)
        hidden = int(_first(text, "hidden_size", "n_embd") or 0)
        layers = int(_first(text, "num_hidden_layers", "n_layer") or 0)
        return cls(
            hidden_size=hidden,
            layers=layers,
            heads=heads,
            kv_heads=int(_first(text, "num_key_value_heads") or heads),
            head_dim=int(_first(text, "head_dim") or hidden // heads),
            intermediate_size=int(_first(text, "intermediate_size", "n_inner") or 4 * hidden),
            vocab_size=int(text.vocab_size),
            context=context_of(text) or 2048,
            parameters=sum(p.numel() for p in unique_parameters(model)),
            config=config,
            meta=model,
        )

    def meta_model(self) -> nn.Module:
        """The module tree without memory (meta device), to look up names and shapes."""
        return self.meta

    def linear_modules(self) -> tuple[LinearModule, ...]:
        """Every projection of the tree, the head included."""
        return tuple(linear_modules(self.meta_model()))


def linear_modules(model: nn.Module) -> list[LinearModule]:
    """nn.Linear and Conv1D modules with (in, out) as they multiply."""
    found = []
    for path, module in model.named_modules():
        shape = projection(module)
        if shape is not None:
            found.append(LinearModule(path, shape.kind, shape.in_features, shape.out_features))
    return found


def unique_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters, a tied pair once."""
    return list({id(p): p for p in model.parameters()}.values())


def refuse_code(settings: Any, who: str) -> None:
    """Raises ModelError: a config or tokenizer config (as read) names Python code to run."""
    if isinstance(settings, dict) and settings.get("auto_map"):
        raise ModelError(
            f"{who} wants to run its own Python code",
            got=str(settings["auto_map"])[:200],
            fix="read that code; if you trust it, add --trust-remote-code",
        )


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """A transformers config from a folder.

    Raises:
        ModelError: missing, broken, unknown architecture, or code of its own without consent.
    """
    raw = read_config(folder)
    if not trust_remote_code:
        refuse_code(raw, str(folder))
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many types for a bad config
        raise ModelError(
            f"{folder / 'config.json'} describes a model that cannot be built",
            got=f"model_type {raw.get('model_type')!r}: {_first_line(error)}",
            fix="update transformers if the model is newer than it, or check the file",
        ) from None
    assert isinstance(config, PretrainedConfig)
    return config


def stored_dtype(config: PretrainedConfig) -> str | None:
    """The checkpoint's type as its config names it."""
    dtype = getattr(config.get_text_config(), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _build_on_meta(config: PretrainedConfig) -> nn.Module:
    if config.is_encoder_decoder:
        raise ModelError(
            "this model is an encoder-decoder, not a causal language model",
            got=f"is_encoder_decoder in the config ({config.model_type})",
            fix=DECODER,
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many types for an odd config
        raise ModelError(
            f"no causal language model can be built from this config ({config.model_type})",
            got=_first_line(error).partition("Model type should be")[0].strip(),
            fix="it reads more than text: --model with the text model of this family"
            if config.get_text_config() is not config
            else f"{DECODER}; or update transformers if this one is newer than it",
        ) from None
    assert isinstance(model, nn.Module)
    return model


class NameMap:
    """Disk name ↔ module path ↔ tied partner, for one base.

    Built from the module tree and, where the base's files are known, the names stored in them.
    GPT-2's missing `transformer.` and similar base-model prefixes are understood, and of the names
    in its files those that transformers changes (`models/conversion.py`).

    Args:
        model: the base without adapters, on any device.
        stored: every name in its files; none: the names are those of the modules. A fingerprint
            asks so: it stays as it is when transformers learns another name.
    """

    def __init__(self, model: nn.Module, stored: Iterable[str] = ()) -> None:
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        first: dict[int, str] = {}
        self.tied: dict[str, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                self.tied[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
        self.disk: dict[str, str] = {}
        stored = sorted(stored)
        self.conversion = read_conversion(model, stored) if stored else Conversion()
        for name in stored:
            path = None if name in self.conversion.parts else self.to_module(name)
            if path is not None:
                self.disk.setdefault(path, name)

    def to_module(self, disk: str) -> str | None:
        """The parameter path that a stored name means; None for buffers and left-overs."""
        for candidate in (
            disk,
            f"{self.prefix}.{disk}",
            disk.removeprefix(f"{self.prefix}."),
            disk.removeprefix("language_model."),
            disk.replace("language_model.model.", "model.language_model.", 1),
            disk.replace("language_model.model.", "model.", 1),
            disk.replace("model.language_model.", "model.", 1),
        ):
            if candidate in self.parameters:
                return candidate
        renamed = self.conversion.renamed.get(disk)
        return renamed if renamed in self.parameters else None

    def to_disk(self, path: str) -> str:
        """The name under which a parameter is stored: its own, else that of a tied partner.

        Raises:
            ModelError: the files do not hold it.
        """
        owner = self.tied.get(path, path)
        if not self.disk:
            return owner
        for candidate in (path, owner, *(p for p, first in self.tied.items() if first == owner)):
            if candidate in self.disk:
                return self.disk[candidate]
        raise ModelError(f"the base's files do not hold {path}", got=f"{len(self.disk)} tensors")

    def partner(self, path: str) -> str | None:
        """The parameter that this one is tied to, if it is."""
        return self.tied.get(path)


def context_of(config: Any) -> int | None:
    """Tokens that a text config says its model can see; None where it does not say."""
    found = _first(config, *CONTEXT)
    return int(found) if isinstance(found, int | float) else None


def _first(config: Any, *names: str) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value[0] if isinstance(value, list) else value
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])[:300]
