"""Reads `tsugiki.json`, the record beside an adapter, and holds PEFT's config to it.

The file may be damaged or edited; whatever does not fit is refused. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from pathlib import Path
from typing import Any

from tsugiki.adapters.peft_config import PeftConfig
from tsugiki.errors import AdapterError, TsugikiError
from tsugiki.files import read_json

FORMAT_VERSION = 1


def read_record(folder: Path) -> dict[str, Any] | None:
    """What tsugiki wrote beside an adapter; None for one from elsewhere.

    Raises:
        AdapterError: damaged, or of a newer format.
    """
    path = folder / "tsugiki.json"
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except TsugikiError as error:
        raise AdapterError(error.problem) from None
    base = record.get("base") if isinstance(record, dict) else None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("targets"), dict)
        or not isinstance(record.get("format_version"), int)
        or not (
            base is None or (isinstance(base, dict) and {"name", "exact", "rounded"} <= set(base))
        )
    ):
        raise AdapterError(f"{path} is damaged", fix="copy the adapter again")
    if record["format_version"] > FORMAT_VERSION:
        raise AdapterError(
            f"{path} was written by a newer tsugiki",
            got=f"format {record['format_version']}",
            allowed=f"up to {FORMAT_VERSION}",
            fix="pip install -U tsugiki",
        )
    return record


def check_scales(
    targets: Mapping[str, Any], config: PeftConfig, paths: list[str], folder: Path
) -> None:
    """Raises AdapterError: adapter_config.json was edited to another scale after training."""
    changed = []
    for path in paths:
        saved = targets[path].get("scale") if isinstance(targets[path], dict) else None
        if not isinstance(saved, int | float) or not isclose(
            saved, config.scale_of(path), rel_tol=1e-6
        ):
            changed.append(f"{path}: {config.scale_of(path):g}, trained with {saved}")
    if changed:
        raise AdapterError(
            f"{folder / 'adapter_config.json'} gives another scale than tsugiki.json recorded",
            got="; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" * (len(changed) > 3)),
            fix="put lora_alpha and use_rslora back, or copy the adapter again",
        )
