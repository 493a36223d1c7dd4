"""Reads PEFT's `adapter_config.json`: ranks, scales, and what it asks that we cannot do.

Rank and alpha patterns, rsLoRA and Conv1D's transposition are honoured; everything else that
would change the arithmetic is refused by name. Knows no tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tsugiki.errors import AdapterError, TsugikiError
from tsugiki.files import read_json

# Settings that change the arithmetic in ways not supported here, and the values that do not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


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
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, path: str) -> int:
        """Rank at a module path, patterns counted."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def scale_of(self, path: str) -> float:
        """What B·A is multiplied by at a module path."""
        r = self.rank_of(path)
        alpha = float(_by_pattern(self.alpha_pattern, path, self.alpha))
        return alpha / (math.sqrt(r) if self.rslora else r)

    def expected(self, modules: Mapping[str, nn.Module]) -> set[str]:
        """Projections of this base that the config says carry an adapter."""
        wanted = self.target_modules
        if wanted is None or wanted == "all-linear":
            return set()
        if isinstance(wanted, str):
            try:
                return {path for path in modules if re.fullmatch(wanted, path)}
            except re.error:
                raise AdapterError(f"target_modules {wanted!r} is not a valid pattern") from None
        return {
            path
            for path in modules
            if any(path == name or path.endswith(f".{name}") for name in wanted)
        }


def read_peft_config(folder: Path, *, can: Collection[str] = ()) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Args:
        can: keys of `HARMLESS` that the caller knows how to honour (merging does some).

    Raises:
        AdapterError: missing, damaged, not LoRA, or asks for something that is not supported.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{folder} is not an adapter folder: it has no adapter_config.json",
            fix="give the folder that holds adapter_config.json (in a run folder: adapter/)",
        )
    try:
        raw = read_json(path)
    except TsugikiError as error:
        raise AdapterError(error.problem) from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} is not a JSON object")
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
        if key in raw and key not in can and raw[key] not in fine
    ]
    if refused:
        raise AdapterError(f"{path} asks for what is not supported", got="; ".join(refused))
    targets = raw.get("target_modules")
    try:
        config = PeftConfig(
            r=int(raw["r"]),
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            rslora=bool(raw.get("use_rslora", False)),
            rank_pattern={str(k): int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            target_modules=tuple(map(str, targets)) if isinstance(targets, list) else targets,
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


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, whole components."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error:
            raise AdapterError(f"rank or alpha pattern {pattern!r} is not valid") from None
    return default
