"""Step 5: the logits of both on real prompts and random ids, in fp32, relative to their spread.

One model is in memory at a time: the reference's logits are kept, then the candidate is loaded;
where one alone does not fit, its weights are streamed. Also says whether the adapter moves the base
at all. Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.files import human_bytes
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.kept import put_kept
from tsugiki.models.load import Base, load_base
from tsugiki.models.spec import ModelSpec, NameMap
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import LIMITS, OF_TYPE, Bounds, Check
from tsugiki.proof.streamed import as_stored, stream, streamed_base
from tsugiki.proof.texts import prompts, token_ids

STEP = "5 logits"
KEPT = 1 << 24  # logits kept of each model: 64 MB in fp32
LOADING = 1.3  # memory while a model is loaded, relative to its fp32 weights
TEXT = 256  # tokens of a text's sequences, four of them
RANDOM = (48, 64, 33)  # lengths of the sequences of random ids


@dataclass(frozen=True)
class Probe:
    """Sequences laid end to end, and the positions whose logits are compared.

    ids (1, T); at (n,); following (n,): the next token of a text at that position, -1 where there
    is none; text (n,): which of the texts.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    at: Tensor
    following: Tensor
    text: Tensor

    def reading(self, text: int) -> Probe:
        """The same with one of its texts to read."""
        return replace(self, following=torch.where(self.text == text, self.following, -1))


@dataclass(frozen=True)
class Distance:
    """How far two sets of logits are apart.

    error: max |difference| / standard deviation of the reference; mean: root of the mean square,
    so. kl: mean of KL(reference ‖
    candidate) over positions, in nats. top1: share of positions with the same likeliest token.
    """

    error: float
    mean: float
    kl: float
    worst_kl: float
    top1: float
    spread: float


def compare_logits(
    reference: Artefact,
    candidate: Artefact,
    *,
    bounds: Bounds = OF_TYPE,
    memory: int | None = None,
    text: str | None = None,
) -> list[Check]:
    """Run both, one after the other, and compare.

    Args:
        bounds: limits instead of those of the candidate's stored type.
        memory: bytes that a model may take; one that needs more in fp32 runs module by module.
        text: its first tokens are run too, and the two perplexities compared.
    """
    probe = make_probe(reference, () if text is None else (text,))
    ours, plain, first = logits_of(reference, probe, memory)
    theirs, _, second = logits_of(candidate, probe, memory)
    if ours.shape != theirs.shape:
        return [unequal_shapes(ours, theirs)]
    error, kl, ratio = bounds.over(*LIMITS[_coarser(reference.dtype(), candidate.dtype())])
    checks = closeness(distance(ours, theirs), len(probe.at), error, kl)
    if text is not None:
        checks.append(perplexities(ours, theirs, probe, ratio))
    if plain is not None:
        checks.append(effect_of(ours, plain))
    if first or second:
        held = human_bytes(max(first, second))
        name = "weights in memory, module by module"
        checks.append(
            Check(STEP, name, f"{held} at most", "–", True, (), float(max(first, second)))
        )
    return checks


def unequal_shapes(ours: Tensor, theirs: Tensor) -> Check:
    """Two vocabularies: nothing more can be compared."""
    text = f"{theirs.shape[-1]} logits, the reference has {ours.shape[-1]}"
    return Check(STEP, "number of logits", text, "equal", False)


def closeness(
    d: Distance, positions: int, error: float, kl: float, *, mean: bool = False
) -> list[Check]:
    """A distance beside its limits; `error` is of the largest difference, or of their mean."""
    where = f"{positions} positions, spread {d.spread:.3g}"
    flat = ("the reference's logits do not spread: nothing can be told",) * (d.spread == 0)
    value, name = (d.mean, "mean difference") if mean else (d.error, "largest difference")
    fine = value <= error and d.spread > 0
    name = f"{name} / spread ({where})"
    told = "–" if math.isinf(kl) else f"{kl:.0e}"
    return [
        Check(STEP, name, f"{value:.2e}", f"{error:.0e}", fine, flat, value),
        Check(STEP, "mean KL", f"{d.kl:.2e}", told, d.kl <= kl, (), d.kl),
        Check(STEP, "largest KL", f"{d.worst_kl:.1e}", "–", True, (), d.worst_kl),
        Check(STEP, "same first choice", f"{d.top1:.1%}", "–", True, (), d.top1),
    ]


def effect_of(ours: Tensor, plain: Tensor) -> Check:
    """How much an adapter moves the logits (n, V) of its base."""
    effect = float((ours - plain).square().mean().sqrt() / plain.std().clamp_min(1e-30))
    dead = ("the adapter changes nothing: it is as it was before training",) * (effect == 0)
    return Check(STEP, "what the adapter moves / spread", f"{effect:.2g}", "–", True, dead, effect)


def logits_of(
    artefact: Artefact, probe: Probe, memory: int | None = None
) -> tuple[Tensor, Tensor | None, int]:
    """Logits (n, V) of an artefact, of its base alone where it is an adapter, and a size.

    The size is of the largest module's fp32 weights where they were streamed, else 0.
    """
    plain = None
    need = sum(4 * t.nbytes // t.dtype.itemsize for t in artefact.stored.tensors.values())
    if memory is None or need * LOADING <= memory:
        base = load_base(artefact.resolved, dtype=torch.float32)
        if artefact.stored.through:
            names = NameMap(base.spec.meta_model(), artefact.stored.tensors)
            put_kept(base.model, names, artefact.stored)
        if artefact.changes is not None:
            plain = run(base, probe)
        artefact.attach(base.model)
        return run(base, probe), plain, 0
    base = streamed_base(artefact.resolved)
    numbers = as_stored(base, artefact.stored)
    hooks, largest = stream(base, numbers)
    if artefact.changes is not None:
        plain = run(base, probe)
        for hook in hooks:
            hook.remove()
        artefact.attach(base.model)
        stream(base, numbers)
    return run(base, probe), plain, largest


def make_probe(artefact: Artefact, texts: Sequence[str] = (), longest: int | None = None) -> Probe:
    """Rendered prompts, random ids and the start of each text.

    At most `KEPT` logits; the last position of each sequence and the texts' come first.

    Args:
        longest: tokens of a sequence; what the model takes when None.
    """
    spec = ModelSpec.from_folder(artefact.stored.folder)
    words = [token_ids(artefact, text) for text in texts]
    return lay_probe(prompts(artefact), words, spec.vocab_size, longest or spec.context)


def lay_probe(
    asked: list[list[int]], texts: Sequence[list[int]], vocabulary: int, context: int
) -> Probe:
    """Prompts, random ids and texts' ids, end to end."""
    generator = torch.Generator().manual_seed(20240229)
    rows = [ids[-context:] for ids in asked]
    for length in RANDOM:
        drawn = torch.randint(0, vocabulary, (min(length, context),), generator=generator)
        rows.append(drawn.tolist())
    following = [-1] * sum(len(row) for row in rows)
    which = [-1] * len(following)
    size = min(TEXT, context)
    for number, words in enumerate(texts):
        for start in range(0, min(len(words), 4 * size), size):
            rows.append(words[start : min(start + size, 4 * size)])
            following += [*rows[-1][1:], -1]
            which += [number] * len(rows[-1])
    lengths = tuple(len(row) for row in rows)
    total = sum(lengths)
    first = torch.zeros(total, dtype=torch.bool)
    first[torch.tensor(lengths).cumsum(0) - 1] = True
    first |= torch.tensor(following) >= 0
    keep = max(len(rows), min(total, KEPT // vocabulary))
    order = torch.randperm(total, generator=generator)
    at = torch.cat([order[first[order]], order[~first[order]]])[:keep].sort().values
    ids = torch.tensor([[i for row in rows for i in row]])
    return Probe(ids, lengths, at, torch.tensor(following)[at], torch.tensor(which)[at])


def perplexities(
    ours: Tensor, theirs: Tensor, probe: Probe, limit: float, *, rounded: bool = False
) -> Check:
    """exp of the mean loss on the text, the candidate's over the reference's.

    rounded: coarse numbers read a short text better now and then, by chance; only worse counts.
    """
    known = probe.following >= 0
    if not bool(known.any()):
        return Check(STEP, "perplexity", "no text", "–", False, ("the text gives no two tokens",))
    losses = [
        float(F.cross_entropy(logits[known].double(), probe.following[known]))
        for logits in (ours, theirs)
    ]
    ratio = math.exp(min(losses[1] - losses[0], 700.0)) if losses[1] == losses[1] else math.inf
    figure = f"{math.exp(min(losses[0], 700.0)):.4g}, ratio {ratio:.6f}"
    name = f"perplexity on {int(known.sum())} tokens of text"
    told = "–" if math.isinf(limit) else f"≤ {1 + limit:g}" if rounded else f"1 ± {limit:g}"
    off = ratio - 1 if rounded else abs(ratio - 1)
    return Check(STEP, name, figure, told, off <= limit, (), ratio)


def run(base: Base, probe: Probe) -> Tensor:
    """(n, V) logits in fp32."""
    with torch.no_grad():
        return base.forward(probe.ids, ForwardBatch(probe.lengths), probe.at)[0].float()


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Of the candidate's logits (n, V) from the reference's; NaN counts as infinitely far."""
    spread = float(ours.std())
    apart = theirs - ours
    error = float(apart.abs().max()) / spread if spread > 0 else 0.0
    mean = float(apart.square().mean().sqrt()) / spread if spread > 0 else 0.0
    a, b = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    if not bool(torch.isfinite(theirs).all()):
        return Distance(math.inf, math.inf, math.inf, math.inf, 0.0, spread)
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return Distance(error, mean, float(kl.mean().clamp_min(0)), float(kl.max()), top1, spread)


def _coarser(a: str, b: str) -> str:
    """The type that rounds more."""
    order = ("float32", "float64", "float16", "bfloat16")
    worse = max(a, b, key=lambda name: order.index(name) if name in order else len(order))
    return worse if worse in LIMITS else "float32"
