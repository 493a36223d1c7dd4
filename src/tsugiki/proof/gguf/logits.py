"""Step 5 for GGUF: llama.cpp's logits of the file, in its strictest arithmetic, and the reference's.

A file in F32 is held to the arithmetic itself; another type to what its rounding moves: mean KL,
first choices and perplexity on a text that the reference has learnt to read. Knows no tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_settings import limits as length_limits
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check
from tsugiki.proof.gguf.artefact import GgufArtefact, bits
from tsugiki.proof.gguf.form import text_settings
from tsugiki.proof.logits import (
    STEP,
    Distance,
    Probe,
    closeness,
    distance,
    effect_of,
    lay_probe,
    logits_of,
    make_probe,
    perplexities,
    unequal_shapes,
)
from tsugiki.proof.texts import PASSAGES, STRINGS

LEARNT = 1.0  # nats below chance, from which on a text can be said to be read
GELU = ("gemma2", "gemma3", "gpt2")  # ggml takes it from a table in F16


@dataclass(frozen=True)
class Limits:
    """What a type may move: max |difference| / spread, mean KL in nats, |perplexities' ratio − 1|.

    error holds for every model, random ones too; kl and ratio on a text that was learnt.
    """

    error: float
    kl: float
    ratio: float


# By the coarsest type of the matrices.
LIMITS = {
    "F32": Limits(1e-4, 1e-6, 1e-4), "F16": Limits(0.1, 1e-3, 1e-2),
    "BF16": Limits(0.5, 1e-3, 5e-2), "Q8_0": Limits(0.5, 5e-3, 5e-2),
    "Q6_K": Limits(1.0, 2e-2, 5e-2), "Q5_K": Limits(2.0, 4e-2, 0.1),
    "Q4_K": Limits(3.0, 0.1, 0.15), "Q3_K": Limits(4.0, 0.3, 0.4), "Q2_K": Limits(5.0, 1.0, 2.0),
}  # fmt: skip


def limits_of(file: GgufArtefact) -> Limits:
    """Of its coarsest type, or the table's next that has no more bits."""
    kind = file.coarsest
    if kind.name in LIMITS:
        found = LIMITS[kind.name]
    else:
        under = [name for name in LIMITS if bits(TYPES[name]) <= bits(kind) + BIT]
        found = LIMITS[under[0] if under else "Q2_K"]
    if kind.name == "F32" and file.arch in GELU:
        return Limits(5e-3, 1e-5, found.ratio)
    return found


BIT = 0.1  # Q4_0 has no fewer bits than Q4_K, Q5_1 more than Q5_K


def compare_logits(
    reference: Artefact | GgufArtefact,
    file: GgufArtefact,
    llama: LlamaCpp,
    *,
    max_error: float | None = None,
    max_kl: float | None = None,
    memory: int | None = None,
    text: str | None = None,
) -> list[Check]:
    """Run both, one after the other, and compare.

    Args:
        max_error, max_kl: limits instead of those of the file's type.
        memory: as in `proof.logits.compare_logits`.
        text: what is read for the perplexities; passages of this toolkit when None.
    """
    limits = limits_of(file)
    passages = PASSAGES if text is None else (text,)
    probes = [_probe(reference, passage, llama) for passage in passages]
    best: tuple[float, Probe, Tensor, Tensor | None] | None = None
    for probe in probes:
        ours, plain = _logits(reference, probe, llama, memory)
        loss = _loss(ours, probe)
        if best is None or loss < best[0]:
            best = (loss, probe, ours, plain)
    assert best is not None
    loss, probe, ours, plain = best
    theirs, under = _logits(file, probe, llama, memory)
    if ours.shape != theirs.shape:
        return [unequal_shapes(ours, theirs)]
    learnt = loss < math.log(ours.shape[-1]) - LEARNT
    error = limits.error if max_error is None else max_error
    exact = file.coarsest.name in ("F32", "F16", "BF16")
    judged = learnt or exact or max_kl is not None
    kl = (limits.kl if judged else math.inf) if max_kl is None else max_kl
    checks = closeness(distance(ours, theirs), len(probe.at), error, kl)
    read = perplexities(ours, theirs, probe, limits.ratio if judged else math.inf)
    if not judged:
        why = ("the reference reads it no better than chance: KL and perplexity are not judged",)
        read = Check(read.step, read.name, read.figure, "–", read.ok, why, read.value)
    checks.append(read)
    moved, bare = (theirs, under) if under is not None else (ours, plain)
    if bare is not None:
        checks.append(effect_of(moved, bare))
    if file.lora is not None:
        checks.append(_switched(file, probe, llama))
    return checks


def _probe(reference: Artefact | GgufArtefact, text: str, llama: LlamaCpp) -> Probe:
    if isinstance(reference, Artefact):
        return make_probe(reference, text, _equal_up_to(reference))
    known, path = reference.file.metadata, reference.file.path
    context = int(known.get(f"{reference.arch}.context_length", 512))
    rows = llama.tokenise(path, [*STRINGS, text], add_special=True, parse_special=True)
    vocabulary = reference.file.tensors["token_embd.weight"].shape[0]
    return lay_probe([row for row in rows[:-1] if row], rows[-1], vocabulary, context)


def _equal_up_to(reference: Artefact) -> int | None:
    """Tokens up to which llama.cpp is this model: it has no window in some families."""
    settings = text_settings(reference)
    if not length_limits(reference.stored.model_type, settings):
        return None
    return min(int(settings["sliding_window"]), int(settings["max_position_embeddings"]))


def _logits(
    artefact: Artefact | GgufArtefact, probe: Probe, llama: LlamaCpp, memory: int | None
) -> tuple[Tensor, Tensor | None]:
    """(n, V) of an artefact, and of what lies under its adapter."""
    if isinstance(artefact, Artefact):
        return logits_of(artefact, probe, memory)[:2]
    lora = None if artefact.lora is None else artefact.lora.path
    whole = _run(artefact, probe, llama, lora is not None)
    return whole, _run(artefact, probe, llama, False) if lora is not None else None


def _run(artefact: GgufArtefact, probe: Probe, llama: LlamaCpp, with_lora: bool) -> Tensor:
    rows, start = [], 0
    for length in probe.lengths:
        rows.append(probe.ids[0, start : start + length].tolist())
        start += length
    lora = artefact.lora.path if artefact.lora is not None and with_lora else None
    kept, start = [], 0
    for row, found in zip(
        rows, llama.each_logits(artefact.file.path, rows, lora=lora), strict=True
    ):
        inside = (probe.at >= start) & (probe.at < start + len(row))
        kept.append(torch.from_numpy(np.array(found[(probe.at[inside] - start).numpy()])))
        start += len(row)
    return torch.cat(kept)


def _loss(logits: Tensor, probe: Probe) -> float:
    """Nats a token on the text; infinite without one."""
    known = probe.following >= 0
    if not bool(known.any()):
        return math.inf
    return float(F.cross_entropy(logits[known].double(), probe.following[known]))


def _switched(file: GgufArtefact, probe: Probe, llama: LlamaCpp) -> Check:
    """Laid over the model and taken off again, in one context of llama.cpp."""
    assert file.lora is not None
    prompt = probe.ids[0, : probe.lengths[0]].tolist()
    bare, _, off = llama.switched(file.file.path, prompt, file.lora.path)
    left = float(np.abs(off - bare).max())
    name = "left of the adapter when it is taken off"
    return Check(STEP, name, f"{left:.1e}", "0", left == 0, (), left)
