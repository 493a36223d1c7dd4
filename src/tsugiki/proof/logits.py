"""Step 5: the logits of both on real prompts and random ids, in fp32, relative to their spread.

One model is in memory at a time: the reference's logits are kept, then the candidate is loaded;
where one alone does not fit, its weights are streamed. Also says whether the adapter moves the base
at all. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.files import human_bytes
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.load import Base, load_base
from tsugiki.models.spec import ModelSpec
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import LIMITS, Check
from tsugiki.proof.streamed import stream, streamed_base
from tsugiki.proof.texts import prompts

STEP = "5 logits"
KEPT = 1 << 24  # logits kept of each model: 64 MB in fp32
LOADING = 1.3  # memory while a model is loaded, relative to its fp32 weights
RANDOM = (48, 64, 33)  # lengths of the sequences of random ids


@dataclass(frozen=True)
class Probe:
    """Sequences laid end to end, and the positions whose logits are compared.

    ids (1, T); at (n,).
    """

    ids: Tensor
    lengths: tuple[int, ...]
    at: Tensor


@dataclass(frozen=True)
class Distance:
    """How far two sets of logits are apart.

    error: max |difference| / standard deviation of the reference. kl: mean of KL(reference ‖
    candidate) over positions, in nats. top1: share of positions with the same likeliest token.
    """

    error: float
    kl: float
    worst_kl: float
    top1: float
    spread: float


def compare_logits(
    reference: Artefact,
    candidate: Artefact,
    *,
    max_error: float | None = None,
    max_kl: float | None = None,
    memory: int | None = None,
) -> list[Check]:
    """Run both, one after the other, and compare.

    Args:
        max_error, max_kl: limits instead of those of the candidate's stored type.
        memory: bytes that a model may take; one that needs more in fp32 runs module by module.
    """
    probe = make_probe(reference)
    ours, plain, first = logits_of(reference, probe, memory)
    theirs, _, second = logits_of(candidate, probe, memory)
    if ours.shape != theirs.shape:
        text = f"{theirs.shape[-1]} logits, the reference has {ours.shape[-1]}"
        return [Check(STEP, "number of logits", text, "equal", False)]
    limits = LIMITS[_coarser(reference.dtype(), candidate.dtype())]
    error = limits[0] if max_error is None else max_error
    kl = limits[1] if max_kl is None else max_kl
    d = distance(ours, theirs)
    where = f"{len(probe.at)} positions, spread {d.spread:.3g}"
    checks = [
        Check(
            STEP,
            f"largest difference / spread ({where})",
            f"{d.error:.2e}",
            f"{error:.0e}",
            d.error <= error and d.spread > 0,
            ("the reference's logits do not spread: nothing can be told",) * (d.spread == 0),
            d.error,
        ),
        Check(STEP, "mean KL", f"{d.kl:.2e}", f"{kl:.0e}", d.kl <= kl, (), d.kl),
        Check(STEP, "largest KL, same first choice", f"{d.worst_kl:.1e}, {d.top1:.1%}", "–", True),
    ]
    if plain is not None:
        effect = float((ours - plain).square().mean().sqrt() / plain.std().clamp_min(1e-30))
        dead = ("the adapter changes nothing: it is as it was before training",) * (effect == 0)
        checks.append(
            Check(STEP, "what the adapter moves / spread", f"{effect:.2g}", "–", True, dead, effect)
        )
    if first or second:
        held = human_bytes(max(first, second))
        name = "weights in memory, module by module"
        checks.append(
            Check(STEP, name, f"{held} at most", "–", True, (), float(max(first, second)))
        )
    return checks


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
        if artefact.changes is not None:
            plain = run(base, probe)
        artefact.attach(base.model)
        return run(base, probe), plain, 0
    base = streamed_base(artefact.resolved)
    hooks, largest = stream(base, artefact.stored)
    if artefact.changes is not None:
        plain = run(base, probe)
        for hook in hooks:
            hook.remove()
        artefact.attach(base.model)
        stream(base, artefact.stored)
    return run(base, probe), plain, largest


def make_probe(artefact: Artefact) -> Probe:
    """Rendered prompts and random ids; at most `KEPT` logits, last positions always."""
    spec = ModelSpec.from_folder(artefact.stored.folder)
    vocabulary, context = spec.vocab_size, spec.context
    generator = torch.Generator().manual_seed(20240229)
    rows = [ids[-context:] for ids in prompts(artefact)]
    for length in RANDOM:
        drawn = torch.randint(0, vocabulary, (min(length, context),), generator=generator)
        rows.append(drawn.tolist())
    lengths = tuple(len(row) for row in rows)
    total = sum(lengths)
    keep = max(len(rows), min(total, KEPT // vocabulary))
    ends = torch.tensor(lengths).cumsum(0) - 1
    order = torch.randperm(total, generator=generator)
    at = torch.cat([ends, order[~torch.isin(order, ends)]])[:keep].sort().values
    return Probe(torch.tensor([[i for row in rows for i in row]]), lengths, at)


def run(base: Base, probe: Probe) -> Tensor:
    """(n, V) logits in fp32."""
    with torch.no_grad():
        return base.forward(probe.ids, ForwardBatch(probe.lengths), probe.at)[0].float()


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Of the candidate's logits (n, V) from the reference's; NaN counts as infinitely far."""
    spread = float(ours.std())
    error = float((theirs - ours).abs().max()) / spread if spread > 0 else 0.0
    a, b = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    if not bool(torch.isfinite(theirs).all()):
        return Distance(float("inf"), float("inf"), float("inf"), 0.0, spread)
    top1 = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return Distance(error, float(kl.mean().clamp_min(0)), float(kl.max()), top1, spread)


def _coarser(a: str, b: str) -> str:
    """The type that rounds more."""
    order = ("float32", "float64", "float16", "bfloat16")
    worse = max(a, b, key=lambda name: order.index(name) if name in order else len(order))
    return worse if worse in LIMITS else "float32"
