"""Writes an adapter alone as GGUF, for llama.cpp to lay over any quant of its base.

B is stored multiplied by the scale and `adapter.lora.alpha` is 0, which llama.cpp reads as "only
the user's scale": so rsLoRA and patterns, which its own alpha / rank cannot say, are right.
Rotary rows of B are ordered as the base's are; A and B of GPT-2's Conv1D are (r, in) and (out, r)
and stay so. Knows no base in memory: headers suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsugiki.adapters.algebra import LowRank
from tsugiki.adapters.joined import Joined
from tsugiki.errors import AdapterError
from tsugiki.exporting.gguf import write_all
from tsugiki.files import atomic_file, require_space
from tsugiki.formats.ggml_types import TYPES
from tsugiki.formats.gguf_encode import Metadata, encode_header, lay_out, padding
from tsugiki.formats.gguf_file import TensorInfo, open_gguf
from tsugiki.formats.gguf_tensors import family_of, place_of
from tsugiki.models.shards import as_bytes
from tsugiki.models.spec import load_config

VERSION = 2  # general.quantization_version


@dataclass(frozen=True)
class LoraPlan:
    """Names and numbers of the pairs, and the metadata."""

    metadata: Metadata
    tensors: dict[str, Tensor]

    def infos(self) -> list[TensorInfo]:
        """The file's tensors."""
        kind = TYPES["F32"]
        return lay_out([(name, tuple(t.shape), kind) for name, t in self.tensors.items()])

    @property
    def need(self) -> int:
        """Bytes of the file."""
        end = self.infos()[-1].end
        return len(encode_header(self.metadata, self.infos())) + end + padding(end)


def plan_lora(joined: Joined, name: str) -> LoraPlan:
    """Place every pair; `joined` was made with untie=True, so that a tied head is told here.

    Raises:
        ModelError: an architecture that is not written as GGUF.
        AdapterError: what llama.cpp cannot lay over a base; each is named, with the way.
    """
    assert joined.changes is not None
    base, changes = joined.base, joined.changes
    family = family_of(base.model_type)
    settings = load_config(base.folder).get_text_config().to_dict()
    wrong: list[str] = []
    if joined.untie:
        wrong.append(
            "the embedding or the head, which this base ties together: llama.cpp would stop"
        )
    tensors: dict[str, Tensor] = {}
    for change in changes.by_name.values():
        if not isinstance(change, LowRank):
            wrong.append(f"{change.path}: trained whole (modules_to_save), not as A and B")
            continue
        place = place_of(f"{change.path}.weight", family, settings)
        if place is None:
            wrong.append(f"{change.path}: a GGUF of {family.arch} has no place for it")
        elif change.magnitude is not None:
            wrong.append(f"{change.path}: DoRA's magnitude is no sum of A and B")
        else:
            a, b = change.a.float(), change.b.float() * change.scale
            # The rows of an embedding are looked up: its A is stored turned.
            tensors[f"{place.name}.lora_a"] = (a.T if change.embedding else a).contiguous()
            tensors[f"{place.name}.lora_b"] = place.outputs(b).contiguous()
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" * (len(wrong) > 4))
        raise AdapterError(
            f"{changes.folder} cannot travel as a GGUF adapter",
            got=shown,
            fix=f"merge it: tsugiki export {changes.folder} --gguf f16"
            + (" --untie" if joined.untie else ""),
        )
    huge = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if huge:
        raise AdapterError(
            f"{changes.folder} holds numbers that its scale carries beyond float32",
            got=", ".join(huge[:3]),
        )
    identity = joined.identity
    metadata: Metadata = {
        "general.architecture": family.arch,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        "general.name": name,
        "general.base_model.count": 1,
        "general.base_model.0.name": identity.name if identity else str(base.folder),
        "general.file_type": 0,
        "general.quantization_version": VERSION,
    }
    return LoraPlan(metadata, tensors)


def write_lora(plan: LoraPlan, output: Path) -> int:
    """Write the file whole or not at all; returns its bytes, the tensors read back.

    Raises:
        RunError: it exists. DiskError: too little space, or none left.
    """
    require_space(output, plan.need, "the adapter")
    infos = plan.infos()
    with atomic_file(output) as temporary:
        with open(temporary, "wb", buffering=0) as stream:
            write_all(stream.fileno(), memoryview(encode_header(plan.metadata, infos)))
            for tensor in plan.tensors.values():
                write_all(stream.fileno(), as_bytes(tensor))
                write_all(stream.fileno(), memoryview(bytes(padding(tensor.nbytes))))
        found = open_gguf(temporary).tensors
        assert {k: i.shape for k, i in found.items()} == {i.name: i.shape for i in infos}
    return output.stat().st_size
