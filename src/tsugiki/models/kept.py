"""A stored model seen as a run saw it that kept its projections in few bits.

Every projection's numbers are quantised and unpacked again when they are read, in the type in which
they are stored; nothing is written. So whatever reads a `StoredModel` (merging, exporting, the
proof) can take the base that an adapter was trained on. Knows no adapters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsugiki.errors import ModelError
from tsugiki.kernels.quantized import ALL, Workspace
from tsugiki.models.quantized import METHODS, quantizable
from tsugiki.models.shards import StoredModel
from tsugiki.models.spec import ModelSpec, NameMap


def as_kept(stored: StoredModel, method: str) -> StoredModel:
    """The same files, with the numbers that nf4 or int8 codes of the projections stand for.

    Raises:
        ModelError: an architecture whose projections are not in its files one by one.
    """
    model = ModelSpec.from_folder(stored.folder).meta_model()
    names = NameMap(model, stored.tensors)
    through = {
        names.to_disk(f"{path}.weight"): partial(
            _there_and_back, method, isinstance(module, Conv1D)
        )
        for path, module in quantizable(model).items()
    }
    return replace(stored, kept=method, through=through)


def put_kept(model: nn.Module, names: NameMap, stored: StoredModel) -> None:
    """Give a model that was loaded from the stored weights the numbers that `stored` shows.

    They are rounded to the type in which they are stored, as a run in that type sees them.
    """
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = names.to_disk(path)
            if name in stored.through:
                parameter.copy_(stored.tensor(name))


def _there_and_back(method: str, transposed: bool, weight: Tensor) -> Tensor:
    """The numbers of a weight's codes; codes run along (out, in), a Conv1D is stored (in, out)."""
    try:
        codes = METHODS[method](weight.T if transposed else weight)
    except ValueError as error:
        raise ModelError(f"a weight holds {error} and cannot be quantised") from None
    dense = codes.unpack(ALL, ALL, weight.dtype, Workspace())
    return dense.T.contiguous() if transposed else dense
