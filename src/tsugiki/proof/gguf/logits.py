"""Step 5 for GGUF: llama.cpp's logits of the file, in its strictest arithmetic, and a reference's.

A file in F32 is held to the arithmetic itself, another type to what its rounding moves; mean KL and
perplexity are judged on a text that the reference has learnt to read. Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_settings import limits as length_limits
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import OF_TYPE, Bounds, Check
from tsugiki.proof.gguf.artefact import GgufArtefact, bits
from tsugiki.proof.gguf.form import text_settings
from tsugiki.proof.logits import (
    STEP,
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

LEARNT = 0.6  # nats a token over those of chance, below which a text is read


@dataclass(frozen=True)
class Limits:
    """What a type may move.

    learnt, random: root mean square of the differences / spread of the reference's logits, on a
    model that has learnt the text and on any other, which amplifies rounding ten times as much.
    kl: mean, in nats, and ratio: |perplexities' ratio − 1|, both on a text that was learnt.
    """

    learnt: float
    random: float
    kl: float
    ratio: float


# By the coarsest type of the matrices. Worst seen on two small trained models, which suffer more
# than large ones, and on eight random families of two layers: F16 0.0006 and 0.0025, BF16 0.003 and
# 0.02, Q8_0 0.022 and 0.055, Q6_K 0.05 and 0.17, Q5_K 0.04 and 0.33, Q4_K 0.14 and 0.54, Q3_K 0.07
# and 0.84, Q2_K 0.46 and 1.16 (two unrelated sets of logits: 1.41, so that below Q4_K random models
# prove nothing). KL: three times what docs/quants.md measures on small trained models.
LIMITS = {
    "F16": Limits(1e-3, 1e-2, 1e-3, 5e-3), "BF16": Limits(1e-2, 6e-2, 1e-3, 1e-2),
    "Q8_0": Limits(0.05, 0.2, 5e-3, 2e-2), "Q6_K": Limits(0.1, 0.4, 2e-2, 5e-2),
    "Q5_K": Limits(0.15, 0.7, 4e-2, 0.1), "Q4_K": Limits(0.3, 1.0, 0.1, 0.3),
    "Q3_K": Limits(0.5, 1.2, 0.3, 0.8), "Q2_K": Limits(0.8, 1.35, 1.0, 2.0),
}  # fmt: skip
BIT = 0.1  # Q4_0 has no fewer bits than Q4_K, Q5_1 more than Q5_K
# In F32 nothing is rounded but sums, and GELU, which ggml takes from a table in F16:
# max |difference| / spread, mean KL, ratio. Measured with SiLU: 2e-6 on models as transformers
# draws them, 1e-5 to 7e-5 on wider ones and their adapters; 1.7e-4 only where random queries and
# keys have scores that choose one token alone, most of it llama.cpp's distance from float64.
EXACT, WITH_TABLE = (1e-4, 1e-6, 1e-4), (5e-3, 1e-4, 1e-3)
GELU = ("gemma2", "gemma3", "gpt2")


def limits_of(kind: GgmlType) -> Limits:
    """Of a type, or of the table's next that has no more bits."""
    under = [name for name in LIMITS if bits(TYPES[name]) <= bits(kind) + BIT]
    return LIMITS[kind.name if kind.name in LIMITS else under[0] if under else "Q2_K"]


@dataclass(frozen=True)
class Reading:
    """What a reference computed, to hold any number of files to.

    logits (n, V), and without its adapter (plain); learnt: it reads the probe's text.
    """

    probe: Probe
    logits: Tensor
    plain: Tensor | None
    learnt: bool


def read_reference(
    reference: Artefact | GgufArtefact,
    llama: LlamaCpp,
    *,
    memory: int | None = None,
    text: str | None = None,
) -> Reading:
    """Run the reference, once.

    Args:
        memory: as in `proof.logits.compare_logits`.
        text: what is read for the perplexities; the passage of ours that it reads best when None.
    """
    passages = PASSAGES if text is None else (text,)
    probe = _probe(reference, passages, llama)
    logits, plain = _logits(reference, probe, llama, memory)
    readings = [probe.reading(number) for number in range(len(passages))]
    probe = min(readings, key=lambda one: _loss(logits, one))
    learnt = _loss(logits, probe) < math.log(logits.shape[-1]) * LEARNT
    return Reading(probe, logits, plain, learnt)


def compare_logits(
    read: Reading,
    file: GgufArtefact,
    llama: LlamaCpp,
    bounds: Bounds = OF_TYPE,
) -> list[Check]:
    """Run the file and compare.

    Args:
        bounds: limits instead of those of the file's type.
    """
    theirs, under = _logits(file, read.probe, llama, None)
    if read.logits.shape != theirs.shape:
        return [unequal_shapes(read.logits, theirs)]
    checks = _judged(read, theirs, file, bounds)
    moved, bare = (theirs, under) if under is not None else (read.logits, read.plain)
    if bare is not None:
        checks.append(effect_of(moved, bare))
    if file.lora is not None:
        checks.append(_switched(file, read.probe, llama))
    return checks


def _judged(read: Reading, theirs: Tensor, file: GgufArtefact, bounds: Bounds) -> list[Check]:
    """The distances beside the limits of the file's type."""
    ours, probe, learnt = read.logits, read.probe, read.learnt
    far, kind = distance(ours, theirs), file.coarsest
    if kind.name == "F32":
        own = WITH_TABLE if file.arch in GELU else EXACT
        error, kl, ratio = bounds.over(*own)
        checks = closeness(far, len(probe.at), error, kl)
        return [*checks, perplexities(ours, theirs, probe, ratio)]
    limits = limits_of(kind)
    error, kl, ratio = bounds.over(
        limits.learnt if learnt else limits.random,
        limits.kl if learnt else math.inf,
        limits.ratio if learnt else math.inf,
    )
    if learnt:  # elsewhere a distribution is flat and its noise large
        known = probe.following >= 0
        far = replace(distance(ours[known], theirs[known]), error=far.error, mean=far.mean)
    checks = closeness(far, len(probe.at), error, kl, mean=True)
    text = perplexities(ours, theirs, probe, ratio, rounded=True)
    why = "the reference has not learnt to read it: KL and perplexity are not judged"
    return [*checks, text if learnt else replace(text, details=(why,))]


def _probe(reference: Artefact | GgufArtefact, texts: Sequence[str], llama: LlamaCpp) -> Probe:
    if isinstance(reference, Artefact):
        return make_probe(reference, texts, _equal_up_to(reference))
    known, path = reference.file.metadata, reference.file.path
    context = int(known.get(f"{reference.arch}.context_length", 512))
    rows = llama.tokenise(path, [*STRINGS, *texts], add_special=True, parse_special=True)
    vocabulary = reference.file.tensors["token_embd.weight"].shape[0]
    asked = [row for row in rows[: len(STRINGS)] if row]
    return lay_probe(asked, rows[len(STRINGS) :], vocabulary, context)


def limited(reference: Artefact) -> list[str]:
    """Where llama.cpp is this model only up to a length, for people."""
    return length_limits(reference.stored.model_type, text_settings(reference))


def _equal_up_to(reference: Artefact) -> int | None:
    """Tokens up to which llama.cpp is this model: it has no window in some families."""
    settings = text_settings(reference)
    if not limited(reference):
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
