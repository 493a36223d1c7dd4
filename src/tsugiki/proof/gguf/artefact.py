"""A GGUF file as `verify` was given it, with an adapter in GGUF form laid over it or without.

`FILE.gguf` or `FILE.gguf+LORA.gguf`, ours or a stranger's. Opens headers; numbers are read when a
step asks for them. Knows no limits and compares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsugiki.errors import AdapterError, ModelError
from tsugiki.formats.ggml_types import GgmlType
from tsugiki.formats.gguf_file import GgufFile, open_gguf
from tsugiki.formats.mixes import KINDS

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
HALVES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class Pair:
    """What an adapter adds to one matrix of a GGUF: b·a, the scale in b.

    a (r, in), b (out, r), fp32; an embedding's matrix is (vocabulary, width), so in = vocabulary
    and its rows are the columns of b·a.
    """

    a: Tensor
    b: Tensor
    embedding: bool = False
    exact: bool = True  # stored in fp32

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of what is added, in fp32."""
        if self.embedding:
            return self.a[:, begin:end].T @ self.b.T
        return self.b[begin:end] @ self.a

    def sizes(self, begin: int, end: int) -> Tensor:
        """Of the terms of each sum, which bound its rounding."""
        return Pair(self.a.abs(), self.b.abs(), self.embedding).rows(begin, end)


@dataclass
class GgufArtefact:
    """A file, and what lies over it."""

    name: str
    file: GgufFile
    lora: GgufFile | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """For people."""
        return f"GGUF of type {self.said_type}" + (" with an adapter over it" * bool(self.lora))

    @property
    def arch(self) -> str:
        """Its architecture, as llama.cpp names it."""
        return str(self.file.metadata.get("general.architecture"))

    @property
    def said_type(self) -> str:
        """What the file calls its own type: q4_k_m, or a number that is not known."""
        number = self.file.metadata.get("general.file_type")
        known = {kind.file_type: name for name, kind in KINDS.items()}
        return known.get(number, f"number {number}") if isinstance(number, int) else "not told"

    @property
    def matrices(self) -> dict[str, GgmlType]:
        """Types of its matrices."""
        return {
            name: info.type
            for name, info in self.file.tensors.items()
            if info.rows > 1 and not name.startswith(("rope_", "position_embd"))
        }

    @property
    def coarsest(self) -> GgmlType:
        """The type of the fewest bits among its matrices."""
        kinds = self.matrices.values()
        return min(kinds, key=bits) if kinds else next(iter(self.file.tensors.values())).type

    def text(self, index: Any) -> str:
        """The text of a token; empty where there is none."""
        texts = self.file.metadata.get("tokenizer.ggml.tokens", [])
        return str(texts[index]) if isinstance(index, int) and 0 <= index < len(texts) else ""

    def pairs(self) -> dict[str, Pair]:
        """Tensor's name → what the adapter adds to it.

        Raises:
            AdapterError: no adapter of this architecture, halves that lack each other or do not
                fit; all of them named.
        """
        if self.lora is None:
            return {}
        known, wrong = self.lora.metadata, []
        if known.get("general.type") != "adapter" or known.get("adapter.type") != "lora":
            wrong.append(f"it is of type {known.get('general.type')!r}, not an adapter")
        if known.get("general.architecture") != self.arch:
            wrong.append(f"it is for {known.get('general.architecture')!r}, not {self.arch!r}")
        names = dict.fromkeys(name.removesuffix(".lora_a").removesuffix(".lora_b")
                              for name in self.lora.tensors)  # fmt: skip
        found = {}
        for name in names:
            halves = [self.lora.tensors.get(name + half) for half in HALVES]
            base = self.file.tensors.get(name)
            if None in halves or base is None:
                what = "the file has no such tensor" if base is None else "A or B is missing"
                wrong.append(f"{name}: {what}")
                continue
            pair = self._pair(name)
            fits = (pair.b.shape[0], pair.a.shape[1]) == (
                base.shape[::-1] if pair.embedding else base.shape
            )
            if not fits or pair.a.shape[0] != pair.b.shape[1]:
                wrong.append(
                    f"{name}: {tuple(pair.b.shape)} · {tuple(pair.a.shape)} for {base.shape}"
                )
                continue
            found[name] = pair
        if wrong or not found:
            raise AdapterError(
                f"{self.lora.path} does not fit {self.file.path}",
                got="; ".join(wrong[:6]) or "no tensors",
            )
        return found

    def _pair(self, name: str) -> Pair:
        """llama.cpp's rule: the user's scale × alpha / r, and without alpha the user's alone."""
        assert self.lora is not None
        a, b = (torch.from_numpy(self.lora.values(name + half).copy()) for half in HALVES)
        embedding = name == EMBEDDING
        a = a.T if embedding else a
        alpha = float(self.lora.metadata.get("adapter.lora.alpha", 0.0))
        exact = all(self.lora.tensors[name + half].type.name == "F32" for half in HALVES)
        return Pair(a, b * (alpha / a.shape[0]) if alpha else b, embedding, exact)


def bits(kind: GgmlType) -> float:
    """Bits of one number."""
    return 8 * kind.nbytes / kind.block


def gguf_paths(given: str) -> tuple[Path, Path | None] | None:
    """The file and the adapter over it that a user named; None for anything but GGUF files."""
    whole = Path(given).expanduser()
    if whole.exists():
        return None if whole.is_dir() else (whole, None)
    first, plus, second = given.partition(".gguf+")
    if plus:
        return Path(f"{first}.gguf").expanduser(), Path(second).expanduser()
    return (whole, None) if given.endswith(".gguf") else None


def open_gguf_artefact(given: str, model: Path, lora: Path | None) -> GgufArtefact:
    """Open one or both files.

    Raises:
        ModelError: not there, not whole, or without an architecture or tensors.
    """
    file = open_gguf(model)
    if not isinstance(file.metadata.get("general.architecture"), str) or not file.tensors:
        raise ModelError(f"{model} is not a model: it names no architecture, or holds no tensor")
    if file.metadata.get("general.type") == "adapter":
        raise ModelError(
            f"{model} is an adapter: alone it computes nothing",
            fix=f"tsugiki verify … BASE.gguf+{model}",
        )
    return GgufArtefact(given, file, None if lora is None else open_gguf(lora))
