"""A quantised base as a folder: read in seconds, a quarter of the size, and still the same base.

`quantized.safetensors` holds the codes and what was kept in the compute type; `tsugiki_base.json`
says how, and who the 16-bit base is: name, fingerprint, the names of its stored tensors. So an
adapter trained on the folder belongs to the 16-bit base. Knows no adapters.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from tsugiki.errors import ModelError
from tsugiki.files import atomic_folder, read_json, require_space, sha256_file, write_json
from tsugiki.kernels.quantized import Workspace
from tsugiki.models.fingerprint import Fingerprint
from tsugiki.models.hollow import fill, hollow_model
from tsugiki.models.hub import QUANTIZED_RECORD
from tsugiki.models.projections import projection
from tsugiki.models.quantized import PARTS, QuantizedLinear, quantizable
from tsugiki.models.shards import (
    CODES,
    ShardWriter,
    Stored,
    as_bytes,
    map_file,
    read_shard,
    view,
)

VERSION = 1
WEIGHTS = "quantized.safetensors"
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The 16-bit base behind quantised weights, and how they are kept.

    stored: names of the tensors in its files. dtype: the compute type, as torch names it.
    """

    name: str
    commit: str | None
    exact: str
    rounded: str
    stored: tuple[str, ...]
    method: str
    dtype: str

    @property
    def fingerprint(self) -> Fingerprint:
        """The 16-bit base's."""
        return Fingerprint(self.exact, self.rounded)


def is_quantized_folder(folder: Path) -> bool:
    """Whether tsugiki wrote quantised weights there."""
    return (folder / QUANTIZED_RECORD).is_file()


def read_origin(folder: Path) -> Origin:
    """Who the base of a quantised folder is.

    Raises:
        ModelError: damaged, or of a newer version.
    """
    path = folder / QUANTIZED_RECORD
    raw = read_json(path)
    damaged = ModelError(f"{path} is damaged", fix="quantise the base again")
    if not isinstance(raw, dict) or not isinstance(raw.get("format_version"), int):
        raise damaged
    if raw["format_version"] > VERSION:
        raise ModelError(
            f"{path} was written by a newer tsugiki",
            got=f"version {raw['format_version']}",
            allowed=f"up to {VERSION}",
            fix="pip install -U tsugiki",
        )
    try:
        origin = Origin(**{**raw["base"], "stored": tuple(raw["base"]["stored"])})
        kind = getattr(torch, origin.dtype)
    except (TypeError, KeyError, AttributeError):
        raise damaged from None
    if origin.method not in PARTS or not isinstance(kind, torch.dtype):
        raise damaged
    return origin


def save_quantized(model: nn.Module, origin: Origin, source: Path, target: Path) -> int:
    """Write a quantised model; nothing is under `target` before all of it is; its bytes.

    Args:
        model: freshly loaded, without adapters or replaced modules.
        source: the 16-bit base's folder, whose config and tokenizer files are taken along.

    Raises:
        DiskError, RunError: it could not be written, or `target` exists.
    """
    tensors = {name: p.detach().to("cpu") for name, p in model.named_parameters()}
    tensors |= {name: b.to("cpu") for name, b in _persistent(model).items()}
    layout, at = [], 0
    for name, tensor in sorted(tensors.items()):
        code = CODES[tensor.dtype]
        layout.append(
            Stored(name, target, code, tuple(tensor.shape), at, at + tensor.nbytes)
        )  # offsets as the header wants them: from the first tensor's byte
        at += tensor.nbytes
    require_space(target, at + (32 << 20), "the quantised base")
    with atomic_folder(target) as temporary:
        with ShardWriter(temporary / WEIGHTS) as writer:
            writer.header(layout, {"format": "pt"})
            for stored in layout:
                writer.write(as_bytes(tensors[stored.name]))
        record = {"format_version": VERSION, "base": asdict(origin), "sha256": writer.digest}
        write_json(temporary / QUANTIZED_RECORD, record)
        for name in BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
    return at


def load_stored(
    folder: Path, config: PretrainedConfig, *, dtype: torch.dtype, device: str
) -> nn.Module:
    """The model of a quantised folder.

    Args:
        dtype: of what is not in few bits; the codes give their numbers in any type.

    Raises:
        ModelError: weights that are not those that were written, or that miss a tensor.
    """
    origin = read_origin(folder)
    path = folder / WEIGHTS
    shard = read_shard(path)
    if sha256_file(path) != read_json(folder / QUANTIZED_RECORD).get("sha256"):
        raise ModelError(
            f"{path} is not the file that was saved with {QUANTIZED_RECORD}",
            fix="copy the folder again, or quantise the base again",
        )
    mapped = map_file(path)
    found = {stored.name: view(mapped, stored) for stored in shard.tensors}
    model = hollow_model(config, dtype)
    workspace = Workspace()
    try:
        for at, module in quantizable(model).items():
            shape = projection(module)
            assert shape is not None
            codes = tuple(found.pop(f"{at}.{part}").clone() for part in PARTS[origin.method])
            bias = found.pop(f"{at}.bias", None)
            model.set_submodule(at, QuantizedLinear(
                origin.method, shape.kind, codes,
                None if bias is None else bias.to(dtype, copy=True),
                (shape.out_features, shape.in_features), dtype, workspace,
            ))  # fmt: skip
        buffers = dict(model.named_buffers())
        for name in [name for name, p in model.named_parameters() if p.is_meta]:
            fill(model, name, found.pop(name).to(dtype, copy=True))
        for name, value in found.items():
            buffers[name].copy_(value)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} does not hold this model", got=str(error)[:200]) from None
    return model.to(device)


def _persistent(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the stored state."""
    state = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in state}
