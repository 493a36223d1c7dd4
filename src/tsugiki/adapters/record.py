"""The files of an adapter, before a tensor is read: PEFT's config, the weights' digest, and
`tsugiki.json`, the record that holds them together.

Each may be damaged or edited; whatever does not fit is refused. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

from tsugiki.adapters.peft_config import PeftConfig, read_peft_config
from tsugiki.errors import AdapterError, TsugikiError
from tsugiki.files import read_json, sha256_file

FORMAT_VERSION = 1
PREFIX = "base_model.model."  # of tensors' names in PEFT's files
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class BaseIdentity:
    """Who a base is: name and commit for people, digests of its tensors for us.

    quantize: how its projections were kept: none, nf4 or int8; the digests are of the 16-bit base.
    quantized_folder: where these few-bit weights are stored, if they are.
    """

    name: str
    exact: str
    rounded: str
    commit: str | None = None
    dtype: str | None = None
    quantize: str = "none"
    quantized_folder: str | None = None


def recorded_quantization(record: Any) -> tuple[str, Path | None]:
    """(none, nf4 or int8; the folder of the few-bit base) that an adapter was trained with."""
    base = record.get("base") if isinstance(record, dict) else None
    if not isinstance(base, dict) or base.get("quantize") not in ("nf4", "int8"):
        return "none", None
    folder = base.get("quantized_folder")
    return base["quantize"], Path(folder) if isinstance(folder, str) else None


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
        raise AdapterError(error.problem, fix="copy the adapter again") from None
    base = record.get("base") if isinstance(record, dict) else None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("targets"), dict)
        or not isinstance(record.get("format_version"), int)
        or not (
            base is None
            or (
                isinstance(base, dict)
                and {"exact", "rounded"} <= set(base)
                and isinstance(base.get("name"), str)
            )
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


@dataclass(frozen=True)
class Opened:
    """An adapter's files, found whole. record: none for an adapter from elsewhere."""

    config: PeftConfig
    record: dict[str, Any] | None
    weights: Path
    digest: str


def open_adapter(folder: Path, *, can: Collection[str] = ()) -> Opened:
    """Read all but the tensors.

    Args:
        can: settings of PEFT's that the caller honours (see `read_peft_config`).

    Raises:
        AdapterError: not an adapter folder, pickled, damaged, or changed since it was saved.
    """
    config = read_peft_config(folder, can=can)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise AdapterError(
            f"{folder} has no {WEIGHTS}",
            got="adapter_model.bin (pickled: it could run code)" if pickled else None,
            fix="save the adapter again with safetensors",
        )
    record = read_record(folder)
    digest = sha256_file(weights)
    if record is not None and record.get("weights_sha256") != digest:
        raise AdapterError(
            f"{weights} is not the file that was saved with {folder / 'tsugiki.json'}",
            got=f"SHA-256 {digest[:16]}…",
            allowed=f"{str(record.get('weights_sha256'))[:16]}…",
            fix="copy the adapter again from where it was made",
        )
    return Opened(config, record, weights, digest)


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


def check_base(
    saved: Any, base: BaseIdentity | None, folder: Path, *, accept_base: bool
) -> list[str]:
    """Notes on a base that is right or accepted.

    Raises:
        AdapterError: another base, and `accept_base` is false.
    """
    if not saved or base is None:
        return ["base not verified: one of the two carries no fingerprint"]
    if saved["exact"] == base.exact:
        was = recorded_quantization({"base": saved})[0]
        if was == base.quantize:
            return []
        return [f"trained on this base kept as {_kept(was)}, here it is {_kept(base.quantize)}"]
    same_rounded = saved["rounded"] == base.rounded
    if same_rounded:
        what = f"the same base in another type ({base.dtype} instead of {saved.get('dtype')})"
    else:
        what = "another base: its tensors differ"
    if accept_base:
        return [f"accepted by --accept-base: {what}"]
    raise AdapterError(
        f"{folder} was trained on {saved['name']}, and {base.name} is {what}",
        got=f"fingerprint {base.exact[:16]}…",
        allowed=f"{saved['exact'][:16]}… ({saved['name']}"
        + (f" at {saved['commit'][:12]})" if saved.get("commit") else ")"),
        fix="--model with the base it was trained on"
        + ("; or --accept-base, since only the type differs" if same_rounded else ""),
    )


def _kept(quantize: str) -> str:
    return "its 16- or 32-bit weights" if quantize == "none" else quantize
