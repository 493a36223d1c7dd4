"""Reads PEFT's `adapter_config.json`: ranks, scales, coverage, and what it asks that we cannot do.

Rank and alpha patterns, rsLoRA, excluded modules, chosen layers, weights named as parameters and
Conv1D's transposition are honoured; everything else that would change the arithmetic is refused by
name, and so is a setting that is not known here. Knows no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.errors import AdapterError, TsugikiError
from tsugiki.files import read_json

CONFIG = "adapter_config.json"
# Settings that change the arithmetic in ways not supported here, and the values that do not.
# The named starts are stored as they ended; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change
# the base as well.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
    "ensure_weight_tying": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
HONOURED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
# Of how it was made; the stored tensors and their use are the same whatever these say.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
EMPTY: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class PeftConfig:
    """The parts of a PEFT LoRA config that shape the arithmetic."""

    r: int
    alpha: float
    dropout: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...] | None
    base_name: str | None
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, path: str) -> int:
        """Rank at a module path, patterns counted."""
        return int(_by_pattern(self.rank_pattern, self._key(path), self.r))

    def scale_of(self, path: str) -> float:
        """What B·A is multiplied by at a module path."""
        r = self.rank_of(path)
        alpha = float(_by_pattern(self.alpha_pattern, self._key(path), self.alpha))
        return alpha / (math.sqrt(r) if self.rslora else r)

    def as_parameter(self, path: str) -> bool:
        """Whether a module's weight is adapted as a parameter: B·A as the weight is stored."""
        return _named("target_parameters", self.parameters, f"{path}.weight")

    def _key(self, path: str) -> str:
        """What PEFT holds its patterns against."""
        return f"{path}.weight" if self.as_parameter(path) else path

    def expected(self, paths: Iterable[str], all_linear: Collection[str] = ()) -> set[str]:
        """Those of a base's module paths that the config says carry an adapter (PEFT's rules).

        Args:
            all_linear: what the word "all-linear" means on this base.

        Raises:
            AdapterError: a pattern that is not valid.
        """
        wanted = self.target_modules
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            wanted = tuple(all_linear)
        every = list(paths)
        chosen = {path for path in every if _named("target_modules", wanted or (), path)}
        if self.layers:
            chosen = {path for path in chosen if self._layer_of(path) in self.layers}
        chosen = {p for p in chosen if not _named("exclude_modules", self.exclude_modules, p)}
        return chosen | {path for path in every if self.as_parameter(path)}

    def _layer_of(self, path: str) -> int | None:
        """The first number in a path that stands after one of the patterns, or after any name."""
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            found = _match(re.match, "layers_pattern", pattern, path)
            if found:
                return int(found.group(1))
        return None


def read_raw(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is.

    Raises:
        AdapterError: missing or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} is not an adapter folder: it has no {CONFIG}",
            fix=f"give the folder that holds {CONFIG} (in a run folder: adapter/)",
        )
    try:
        raw = read_json(path)
    except TsugikiError as error:
        raise AdapterError(error.problem, fix="copy the adapter again") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} is not a JSON object", fix="copy the adapter again")
    return raw


def read_peft_config(folder: Path, *, can: Collection[str] = ()) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Args:
        can: keys of `HARMLESS` that the caller knows how to honour (merging does some).

    Raises:
        AdapterError: missing, damaged, not LoRA, or asks for something that is not supported.
    """
    path, raw = folder / CONFIG, read_raw(folder)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: only LoRA adapters are read", got=raw.get("peft_type"))
    if "lora_alpha" not in raw:
        raise AdapterError(
            f"{path} lacks the key lora_alpha",
            got="the key alpha" if "alpha" in raw else None,
            fix='rename "alpha" to "lora_alpha" in that file' if "alpha" in raw else None,
        )
    refused = [
        f"{key} = {raw[key]!r}"
        for key, fine in HARMLESS.items()
        if key in raw and key not in can and not _is_one_of(raw[key], fine)
        if key != "target_parameters" or not _are_weights(raw[key])
    ]
    if refused:
        raise AdapterError(f"{path} asks for what is not supported", got="; ".join(refused))
    unknown = [
        f"{key} = {str(value)[:60]!r}"
        for key, value in raw.items()
        if key not in HONOURED | WITHOUT_EFFECT | set(HARMLESS) and not _is_one_of(value, EMPTY)
    ]
    if unknown:
        raise AdapterError(
            f"{path} holds settings that are not known here",
            got="; ".join(unknown),
            fix="remove from that file what does not change the arithmetic",
        )
    targets = raw.get("target_modules")
    layers, excluded = raw.get("layers_to_transform"), raw.get("exclude_modules")
    pattern = raw.get("layers_pattern")
    if targets is None and not raw.get("target_parameters"):
        raise AdapterError(
            f"{path} does not name target_modules",
            fix='add the list of adapted projections, for instance ["q_proj", "v_proj"]',
        )
    if isinstance(targets, str) and (layers is not None or pattern is not None):
        raise AdapterError(
            f"{path}: layers_to_transform and layers_pattern need target_modules to be a list",
            got=f"target_modules = {targets[:80]!r}",
        )
    if pattern and layers is None:
        raise AdapterError(f"{path}: layers_pattern without layers_to_transform")
    if not _is_one_of(raw.get("use_rslora"), (True, False, None)):
        raise AdapterError(f"{path}: use_rslora is neither true nor false", got=raw["use_rslora"])
    try:
        config = PeftConfig(
            r=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora", False)),
            rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            target_modules=None if targets is None else _words(targets),
            exclude_modules=_words(excluded or ()),
            layers=_indexes(layers),
            layers_pattern=(pattern,) if isinstance(pattern, str) and pattern else _list(pattern),
            parameters=_list(raw.get("target_parameters")),
            base_name=raw.get("base_model_name_or_path"),
            raw=raw,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from None
    ranks = [config.r, *config.rank_pattern.values()]
    alphas = [config.alpha, *config.alpha_pattern.values()]
    if min(ranks) < 1 or not all(math.isfinite(a) for a in alphas):
        raise AdapterError(
            f"{path}: the rank must be at least 1 and alpha a number",
            got=f"r {config.r}, lora_alpha {config.alpha}",
        )
    if not 0 <= config.dropout < 1:
        raise AdapterError(
            f"{path}: lora_dropout is not a probability", got=config.dropout, allowed="0 to below 1"
        )
    return config


def _is_one_of(value: Any, fine: tuple[Any, ...]) -> bool:
    """Equality that tells False from 0 and True from 1."""
    return any(type(value) is type(one) and value == one for one in fine)


def _are_weights(value: Any) -> bool:
    """Parameters that are weights of modules; stacked experts have names of their own."""
    return isinstance(value, list) and all(
        isinstance(one, str) and one.endswith(".weight") for one in value
    )


def _words(value: Any) -> str | tuple[str, ...]:
    """A pattern as it is, or a list of names."""
    return value if isinstance(value, str) else _list(value)


def _list(value: Any) -> tuple[str, ...]:
    if not all(isinstance(one, str) for one in value or ()) or isinstance(value, dict):
        raise TypeError(f"{value!r} is not a list of names")
    return tuple(value or ())


def _indexes(value: Any) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in found):
        raise TypeError(f"layers_to_transform {value!r} is not a list of numbers")
    return tuple(found)


def _named(key: str, words: str | tuple[str, ...], path: str) -> bool:
    """A string is a pattern for the whole path, a list holds ends of paths, whole components."""
    if isinstance(words, str):
        return bool(words) and _match(re.fullmatch, key, words, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in words)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, whole components."""
    for pattern, value in patterns.items():
        if _match(re.match, "rank_pattern or alpha_pattern", rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _match(
    how: Callable[[str, str], re.Match[str] | None], key: str, pattern: str, path: str
) -> re.Match[str] | None:
    try:
        return how(pattern, path)
    except (re.error, RecursionError, OverflowError):
        raise AdapterError(f"{key}: {pattern[:200]!r} is not a valid pattern") from None
