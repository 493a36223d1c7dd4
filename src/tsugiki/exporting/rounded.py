"""The numbers that a GGUF file of some type will hold, without the file.

Each tensor goes the file's way: laid out as its family's table says, quantised to the type that its
mix gives it by llama.cpp's own code, and read back; then into the checkpoint's layout, so that a
loaded model can run with it. Holds one tensor twice in fp32. Knows no losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsugiki.exporting.gguf import ExportPlan, Source, encoded
from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_encode import DIRECT, Metadata
from tsugiki.formats.gguf_file import TensorInfo, decode_numbers
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.formats.mixes import KINDS, choose_types
from tsugiki.models.families import HEAD

OURS = tuple(KINDS[name].main.name for name in DIRECT)  # encoded without llama.cpp
STEP = 1 << 22  # elements quantised at once


@dataclass(frozen=True)
class _Exact:
    """The header of the file that llama.cpp would quantise."""

    path: Path
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]


def rounded_tensors(
    plan: ExportPlan, dtype: str, llama: LlamaCpp | None
) -> dict[str, Callable[[], Tensor]]:
    """Stored name → what gives the tensor, fp32 in its stored shape, as a `dtype` file holds it.

    A head that is written apart from its embedding has a name of its own.

    Args:
        llama: its process; needed for types that are not in `DIRECT`.

    Raises:
        ModelError: an architecture whose mixes are not known; when a tensor is asked for, a weight
            that its type cannot hold.
    """
    types = _types(plan, dtype)
    return {
        _stored_name(plan, source): partial(_rounded, plan, source, types[source.place.name], llama)
        for source in plan.sources
        if source.stored is not None
    }


def _types(plan: ExportPlan, dtype: str) -> dict[str, GgmlType]:
    """Name in the file → type."""
    if dtype in DIRECT:
        return {info.name: info.type for info in plan.infos(dtype)}
    exact = {info.name: info for info in plan.infos(plan.exact_type())}
    return choose_types(_Exact(plan.joined.base.folder, plan.metadata, exact), KINDS[dtype])


def _stored_name(plan: ExportPlan, source: Source) -> str:
    assert source.stored is not None
    apart = plan.joined.untie and source.place.name == "output.weight"
    return HEAD if apart else source.stored.name


def _rounded(plan: ExportPlan, source: Source, kind: GgmlType, llama: LlamaCpp | None) -> Tensor:
    columns = source.shape[-1]
    rows = torch.Size(source.shape).numel() // columns
    ours = kind.name in OURS
    stored = kind if ours else TYPES["F32"]
    raw = np.empty((rows, stored.row_bytes(columns)), np.uint8)
    flat, at = raw.reshape(-1), 0
    for piece in encoded(plan, source, stored):
        flat[at : at + len(piece)] = piece
        at += len(piece)
    assert at == len(flat)
    numbers = np.empty((rows, columns), np.float32)
    step = max(1, STEP // columns)
    for begin in range(0, rows, step):
        some = raw[begin : begin + step]
        if not ours:
            assert llama is not None, "what ggml alone can write needs it"
            some = llama.quantise(some.view(np.float32), kind.name)
        found = decode_numbers(some, kind, columns)
        assert found is not None, "a type that is written can be read"
        numbers[begin : begin + step] = found
    tensor = torch.from_numpy(numbers).reshape(source.shape)
    place = source.place
    return place.restore(tensor - place.shift if place.shift else tensor)
