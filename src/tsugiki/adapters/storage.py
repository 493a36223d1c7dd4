"""An adapter as a folder: PEFT's layout, and `tsugiki.json` with what training knew.

Written whole or not at all. What is read is hostile: only safetensors, header checked, every
tensor accounted for, values finite, the base compared by its tensors. Reading PEFT's config is
`adapters/peft_config.py`'s. Knows no training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import isclose
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tsugiki import __version__
from tsugiki.adapters.algebra import same_numbers
from tsugiki.adapters.attach import lora_modules, place, refuse_attached
from tsugiki.adapters.peft_config import PeftConfig
from tsugiki.adapters.record import (
    FORMAT_VERSION,
    PREFIX,
    WEIGHTS,
    check_base,
    check_scales,
    open_adapter,
)
from tsugiki.adapters.record import (
    BaseIdentity as BaseIdentity,
)
from tsugiki.adapters.targets import head_path
from tsugiki.errors import AdapterError
from tsugiki.files import atomic_folder
from tsugiki.models.conversion import experts_for_peft
from tsugiki.models.projections import projection
from tsugiki.models.shards import read_shard
from tsugiki.models.spec import NameMap


@dataclass(frozen=True)
class AdapterInfo:
    """What loading an adapter found out."""

    folder: Path
    r: int
    targets: tuple[str, ...]
    base_name: str | None
    verified: bool
    notes: list[str] = field(default_factory=list)
    chat: dict[str, Any] | None = None
    digest: str = ""


@dataclass(frozen=True)
class ReadAdapter:
    """A and B of every target (fp32), their scales, and the info."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    dropout: float
    info: AdapterInfo


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base: BaseIdentity | None = None,
    names: NameMap | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: dict[str, Any] | None = None,
    training_info: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write the adapter that sits on `model`.

    Args:
        base: who the base is; without it later loads cannot verify it.
        names: how the base's files name its tensors (`Base.names()`), so that merging finds them
            without transformers; None: as transformers would write this model.
        chat: the chat format's state, so that chat renders what training saw.
        extra: more for `tsugiki.json` (data fingerprint, scores, lineage, config).
        replace: an existing folder gives way once the new one is whole.

    Raises:
        AdapterError: there is no adapter on the model.
        DiskError, RunError: it could not be written; what was there is intact.
    """
    folder = Path(folder)
    modules = dict(lora_modules(model))
    if not modules:
        raise AdapterError("there is no adapter on this model to save")
    first = next(iter(modules.values()))
    r = first.lora_A.shape[0]
    tensors = adapter_tensors(model)
    content = save(tensors, metadata={"format": "pt"})
    kinds = [projection(m.base) for m in modules.values()]
    alpha = first.scale * r
    ranks = {path: m.lora_A.shape[0] for path, m in modules.items()}
    alphas = {path: m.scale * ranks[path] for path, m in modules.items()}
    # Named as parameters, PEFT leaves them where they are; it takes no dropout on these.
    taken = experts_for_peft(getattr(getattr(model, "config", None), "model_type", None))
    key = {p: f"{p}.weight" if p.rpartition(".")[2] in taken else p for p in modules}
    parameters = sorted(key[p] for p in modules if key[p] != p)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name if base else None,
        "revision": base.commit if base else None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain_number(alpha),
        # A foreign adapter may differ by layer; PEFT reads these keys as regular expressions.
        "rank_pattern": {re.escape(key[p]): n for p, n in ranks.items() if n != r},
        "alpha_pattern": {
            re.escape(key[p]): _plain_number(a) for p, a in alphas.items() if not isclose(a, alpha)
        },
        "lora_dropout": 0.0 if parameters else first.dropout,
        "target_modules": sorted(p for p in modules if key[p] == p),
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": all(kind is not None and kind.kind == "conv1d" for kind in kinds),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }
    disk = _disk_names(model, names)
    record = {
        "format_version": FORMAT_VERSION,
        "base": asdict(base) if base else None,
        "targets": {
            path: {"r": m.lora_A.shape[0], "scale": m.scale, "disk": disk[path]}
            for path, m in modules.items()
        },
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "chat": chat,
        "versions": versions(),
        **(extra or {}),
    }
    with atomic_folder(folder, replace=replace) as temporary:
        (temporary / WEIGHTS).write_bytes(content)
        _dump(temporary / "adapter_config.json", config)
        _dump(temporary / "tsugiki.json", record)
        if training_info is not None:
            _dump(temporary / "training_info.json", dict(training_info))
        if chat is not None:
            _dump(temporary / "generation_config.json", {"eos_token_id": chat["stop_ids"]})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return folder


def _disk_names(model: nn.Module, names: NameMap | None) -> dict[str, str]:
    """Path of each adapted projection → the stored name of its weight."""
    found = {}
    here = NameMap(model)  # of the adapted tree, where the weight lies one child deeper
    for path, _ in lora_modules(model):
        if names is not None:
            found[path] = names.to_disk(f"{path}.weight")
        else:
            written = here.to_disk(f"{path}.base.weight")
            found[path] = written if written != f"{path}.base.weight" else f"{path}.weight"
    return found


def versions() -> dict[str, str]:
    """What wrote an artefact."""
    return {
        "tsugiki": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names → A (r, in) and B (out, r), fp32 on the CPU."""
    tensors = {}
    for path, module in lora_modules(model):
        for name in ("lora_A", "lora_B"):
            value = getattr(module, name).detach().to("cpu", torch.float32).contiguous()
            tensors[f"{PREFIX}{path}.{name}.weight"] = value
    return tensors


def load_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    base: BaseIdentity | None = None,
    trainable: bool = False,
    accept_base: bool = False,
) -> AdapterInfo:
    """Put a stored adapter on a model; the model is untouched when anything is wrong.

    Args:
        base: who the model is; None leaves the base unverified, with a note.
        trainable: its tensors get gradients.
        accept_base: load also on another base of the same shapes, with a loud note.

    Raises:
        AdapterError: see `read_adapter`; or an adapter is on the model already.
    """
    refuse_attached(model)
    read = read_adapter(Path(folder), dict(model.named_modules()), base, accept_base=accept_base)
    place(model, read.pairs, read.scales, read.dropout, trainable=trainable)
    return read.info


def read_adapter(
    folder: Path,
    modules: Mapping[str, nn.Module],
    base: BaseIdentity | None,
    *,
    accept_base: bool = False,
) -> ReadAdapter:
    """Read and check everything before anything is changed.

    Raises:
        AdapterError: not an adapter folder; pickled; a missing layer, an extra tensor, a wrong
            shape or rank, NaN or inf; changed weights; another base. Tensors are named.
    """
    opened = open_adapter(folder)
    config, record, weights = opened.config, opened.record, opened.weights
    read_shard(weights, AdapterError)
    notes: list[str] = []
    if record is not None:
        notes += check_base(record.get("base"), base, folder, accept_base=accept_base)
    else:
        named = config.base_name or "no base named"
        notes.append(
            f"base not verified: {folder} comes from elsewhere and says {named!r}; "
            "only shapes were checked"
        )
    try:
        tensors = load_file(weights)
    except Exception as error:  # the reader's own error type for a file that lies
        raise AdapterError(f"{weights} cannot be read: {error}") from None
    pairs, scales = _pair_up(tensors, config, modules, folder, record)
    verified = record is not None and base is not None and bool(record.get("base"))
    info = AdapterInfo(
        folder=folder,
        r=config.r,
        targets=tuple(pairs),
        base_name=config.base_name,
        verified=verified and not any("accepted" in note for note in notes),
        notes=notes,
        chat=record.get("chat") if record else None,
        digest=opened.digest,
    )
    return ReadAdapter(pairs, scales, config.dropout, info)


def _pair_up(
    tensors: dict[str, Tensor],
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    folder: Path,
    record: Mapping[str, Any] | None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    halves: dict[str, dict[str, Tensor]] = {}
    wrong: list[str] = []
    for name, tensor in tensors.items():
        if name.endswith(".base_layer.weight"):
            wrong += _unlike_base(name, tensor, modules)
            continue
        path, half = _parse_name(name)
        if path is None or half is None:
            wrong.append(f"{name}: not an A or B of a linear projection")
            continue
        module = modules.get(path)
        shape = None if module is None else projection(module)
        if shape is None:
            wrong.append(f"{name}: the base has no projection {path}")
            continue
        if shape.kind == "conv1d" and config.as_parameter(path):
            wrong.append(f"{name}: a Conv1D adapted as a parameter is not supported")
            continue
        if not tensor.is_floating_point():
            wrong.append(f"{name}: {tensor.dtype} is not a floating type")
            continue
        if not bool(torch.isfinite(tensor).all()):
            wrong.append(f"{name}: holds NaN or inf")
            continue
        r = config.rank_of(path)
        right = (r, shape.in_features) if half == "lora_A" else (shape.out_features, r)
        if tuple(tensor.shape) != right:
            wrong.append(f"{name}: shape {tuple(tensor.shape)}, expected {right}")
            continue
        halves.setdefault(path, {})[half] = tensor.float()
    for path, found in halves.items():
        wrong += [
            f"{PREFIX}{path}.{half}.weight: missing"
            for half in ("lora_A", "lora_B")
            if half not in found and not any(w.startswith(f"{PREFIX}{path}.{half}") for w in wrong)
        ]
    if record:
        expected = set(record["targets"])
    else:
        expected = config.expected((path for path in modules if path), _all_linear(modules))
    wrong += [f"{PREFIX}{path}: the layer is missing" for path in sorted(expected - set(halves))]
    extra = sorted(set(halves) - expected)
    wrong += [f"{PREFIX}{path}: a layer that the adapter does not name" for path in extra]
    if wrong or not halves:
        shown = wrong[:12] + ([f"… and {len(wrong) - 12} more"] if len(wrong) > 12 else [])
        raise AdapterError(
            f"{folder} does not fit this base:\n"
            + "\n".join(f"    {line}" for line in shown or ["it holds no tensors"]),
            fix="use the base it was trained on, and an unchanged copy of the adapter",
        )
    ordered = [path for path in modules if path in halves]
    if record:
        check_scales(record["targets"], config, ordered, folder)
    pairs = {path: (halves[path]["lora_A"], halves[path]["lora_B"]) for path in ordered}
    return pairs, {path: config.scale_of(path) for path in ordered}


def _unlike_base(name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> list[str]:
    """PEFT copies an adapted output head along; that must be the base's own."""
    module = modules.get(name.removeprefix(PREFIX).removesuffix(".base_layer.weight"))
    if not isinstance(module, nn.Linear):
        return [f"{name}: only linear projections are adapted, and this is none"]
    same = same_numbers(module.weight, tensor.to(module.weight.device))
    return [] if same else [f"{name}: differs from the base's; it was trained on another"]


def _all_linear(modules: Mapping[str, nn.Module]) -> list[str]:
    """Every projection but the output head."""
    root = modules.get("")
    head = None if root is None else head_path(root)
    return [p for p, m in modules.items() if p != head and projection(m) is not None]


def _parse_name(name: str) -> tuple[str | None, str | None]:
    stem = name.removeprefix(PREFIX).removesuffix(".weight")
    path, _, half = stem.rpartition(".")
    if half not in ("lora_A", "lora_B") or not name.startswith(PREFIX):
        return None, None
    return path, half


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _plain_number(value: float) -> float | int:
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded == int(rounded) else rounded
