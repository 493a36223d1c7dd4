"""Quantises a base while it is read: the 16-bit model never stands in memory whole.

Tensor by tensor from the mapped files: a projection's weight becomes codes, everything else is
copied in the compute type, and what was read is let go of; so are the pieces of stacked experts,
once they are joined (`models/conversion.py`). Knows no adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from tsugiki.errors import ModelError
from tsugiki.kernels.quantized import Workspace
from tsugiki.models.hollow import fill, hollow_model
from tsugiki.models.quantized import quantizable, quantized
from tsugiki.models.shards import StoredModel, open_model
from tsugiki.models.spec import NameMap
from tsugiki.models.unused import notes_on_unused, unused_tensors


def load_quantized(
    folder: Path,
    config: PretrainedConfig,
    method: str,
    *,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, list[str]]:
    """The model of a folder with its projections in few bits, and what to tell of its files.

    Args:
        method: nf4 or int8.
        dtype: of everything else, and of the numbers that the codes stand for.

    Raises:
        ModelError: a tensor missing or of another shape, one that holds NaN or inf, an
            architecture whose files do not hold its parameters one by one.
    """
    stored = open_model(folder)
    model = hollow_model(config, dtype, trust_remote_code=trust_remote_code)
    projections = quantizable(model)
    if not projections:
        raise ModelError(f"{folder} has no projection that can be quantised")
    names = NameMap(model, stored.tensors)
    wanted = where_stored(model, names, stored)
    buffers = dict(model.named_buffers())
    joins = names.conversion.parts
    workspace = Workspace()

    def place(path: str, read: Tensor, name: str) -> None:
        owner, _, last = path.rpartition(".")
        module = projections.get(owner)
        if module is None or last != "weight":
            fill(model, path, read.to(device, dtype, copy=True))
            return
        try:
            small = quantized(method, module, read.to(device), workspace, dtype)
        except ModelError as error:
            raise ModelError(f"{name}: {error.problem}") from None
        small._parameters["bias"] = module._parameters.get("bias")  # hollow, or come before
        model.set_submodule(owner, small)

    with torch.no_grad():
        come: Counter[str] = Counter()
        for name in stored.tensors:  # in the order of the files
            joined = joins.get(name)
            if joined is not None:
                come[joined.paths[0]] += 1
                if come[joined.paths[0]] == len(joined.parts):
                    for path, made in joined.join(model, stored.tensor).items():
                        place(path, made, name)
                    for part in joined.parts:
                        stored.release(part)
                continue
            read = stored.tensor(name)
            buffer = buffers.get(names.conversion.renamed.get(name, name))
            if buffer is not None and buffer.shape == read.shape:
                buffer.copy_(read)
            if name in wanted:  # not a buffer that was computed, or a second copy
                place(wanted[name], read, name)
            del read
            stored.release(name)
    return model.to(device), notes_on_base(model, method, names, stored.tensors)


def notes_on_base(
    model: nn.Module, method: str, names: NameMap, stored: Iterable[str]
) -> list[str]:
    """What to tell of a base in few bits: tensors that are not used, experts that stay whole.

    Args:
        names: of the base as it was, with the names in its files.
        stored: those names.
    """
    notes = notes_on_unused(unused_tensors(model, stored, names))
    experts = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n
    )
    if experts:
        notes.append(
            f"{method} is for the projections alone: {experts:,} parameters of stacked experts "
            "stay in the compute type"
        )
    return notes


def where_stored(model: nn.Module, names: NameMap, stored: StoredModel) -> dict[str, str]:
    """Stored name → parameter, for every parameter of the model, a tied pair once; those that are
    joined of several tensors left out.

    Raises:
        ModelError: all that are missing or of another shape, at once.
    """
    found: dict[str, str] = {}
    missing, other = [], []
    made = {path for joined in names.conversion.parts.values() for path in joined.paths}
    for path, parameter in model.named_parameters():
        if path in made:
            continue
        try:
            name = names.to_disk(path)
        except ModelError:
            missing.append(path)
            continue
        found[name] = path
        if stored.tensors[name].shape != tuple(parameter.shape):
            other.append(f"{path} {stored.tensors[name].shape} instead of {tuple(parameter.shape)}")
    if missing or other:
        parts = (("missing", missing), ("other shape", other))
        raise ModelError(
            f"{stored.folder} cannot be quantised while it is read",
            got="; ".join(
                f"{what}: {', '.join(some[:6])}{' …' if len(some) > 6 else ''}"
                for what, some in parts
                if some
            ),
            fix="leave --quantize out if this model is whole: its files hold it in another form",
        )
    return found
