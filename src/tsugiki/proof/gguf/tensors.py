"""Step 2 for GGUF: every tensor of the file against the reference's, in the file's layout.

F32, F16 and BF16 must be the same bits, or within the rounding that their types allow; quantised
ones are quantised again (`quantised`). An adapter that lies over a file is compared as the product
that it adds. What is beyond is named, with what it looks like. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.formats.gguf_encode import DTYPES
from tsugiki.formats.gguf_file import decode_numbers
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.checks import Check, found
from tsugiki.proof.gguf.artefact import EMBEDDING, HEAD, bits
from tsugiki.proof.gguf.form import Form, Numbers
from tsugiki.proof.gguf.quantised import FEW, effect_words, judge, maker, measure

STEP = "2 tensors"
SUM = 2.0**-20  # a fp32 sum of a few dozen terms, relative to the sum of their sizes
ALIKE = 0.99  # coefficient at which two orders of rows are the same
FLOATS = tuple(DTYPES)


@dataclass(frozen=True)
class Outcome:
    """One tensor.

    fault: what is wrong, for people. differing, blocks: numbers (or blocks of quantised ones)
    whose bytes are not the reference's, and all. worst: the largest error, in units of what the
    rounding allows.
    """

    name: str
    quantised: bool
    fault: str | None
    differing: int
    blocks: int
    worst: float


def compare_tensors(reference: Form, candidate: Form, llama: LlamaCpp | None) -> list[Check]:
    """Names, shapes and numbers of every tensor; then what an adapter over the file adds.

    Args:
        llama: what quantises again; without it, coefficients are all that can be told.
    """
    ours, theirs = _same_heads(reference, candidate)
    names = [f"{name}: missing" for name in sorted(set(ours) - set(theirs))]
    names += [f"{name}: not in the reference" for name in sorted(set(theirs) - set(ours))]
    lowest = min((n.type for n in candidate.tensors.values()), key=bits).name
    outcomes = []
    for name in sorted(set(ours) & set(theirs)):
        mine, other = ours[name], theirs[name]
        if _trimmed(mine.shape) != _trimmed(other.shape):
            names.append(f"{name}: shape {other.shape}, expected {mine.shape}")
        else:
            outcomes.append(_compare(mine, other, lowest, llama))
    checks = [found(STEP, "names and shapes", names, len(set(ours) | set(theirs)), "tensors")]
    damaged = _damage(outcomes)
    checks += [
        _summary([o for o in outcomes if o.quantised == quantised], quantised, damaged)
        for quantised in (False, True)
        if any(o.quantised == quantised for o in outcomes)
    ]
    if candidate.pairs:
        checks.append(_compare_pairs(reference, candidate))
    return checks


def _same_heads(reference: Form, candidate: Form) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """A head that one side leaves out because it is the embedding, is the embedding."""
    ours, theirs = dict(reference.tensors), dict(candidate.tensors)
    if HEAD in ours and HEAD not in theirs and HEAD in reference.optional:
        if reference.folder:
            del ours[HEAD]  # tied there too: the same numbers
        else:
            theirs[HEAD] = theirs[EMBEDDING]
    elif HEAD in theirs and HEAD not in ours and HEAD in candidate.optional:
        ours[HEAD] = ours[EMBEDDING]
    return ours, theirs


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml counts no dimension of one at the far end."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _compare(mine: Numbers, other: Numbers, lowest: str, llama: LlamaCpp | None) -> Outcome:
    """lowest: the coarsest type in the file."""
    changed = not (mine.pair is not None and other.pair is not None)  # else compared as products
    if other.type.name in FLOATS:
        return _floats(mine, other, lowest, changed)
    assert other.raw is not None
    make = maker(other.type, llama) if other.pair is None or not changed else None
    bases = mine.read(False) if changed and mine.changed else None
    sizes = decode_numbers(other.raw[:1], other.type, other.columns)
    if sizes is None:
        unreadable = f"{other.name}: nobody here can read type {other.type.name}"
        return Outcome(other.name, True, unreadable, 1, 1, 0.0)
    errors = measure(
        mine.read(changed), bases, other.raw, other.type, other.columns, make,
        other.read(changed) if other.pair is not None and changed else None,
    )  # fmt: skip
    fault = judge(errors, other.type, mine.scale)
    if fault is not None and _rows_in_checkpoint_order(mine, other):
        fault += ", its rows are in the checkpoint's order: not permuted"
    told = f"{other.name} ({other.type.name}): {fault}" if fault else None
    if make is None:
        return Outcome(other.name, True, told, 1, 1, 0.0)
    return Outcome(other.name, True, told, errors.differing, errors.blocks, errors.worst)


def _floats(mine: Numbers, other: Numbers, lowest: str, changed: bool) -> Outcome:
    rounding = _rounding(other.type.name)
    if lowest != "F32" and (mine.changed or mine.type.name != other.type.name or not rounding):
        # Merged in 16 bits on the way, which only a file all in F32 says that it was not.
        rounding += _rounding("F16" if lowest == "F16" else "BF16")
    tiny = float(torch.finfo(DTYPES[other.type.name]).smallest_normal)
    sums = torch.zeros(5, dtype=torch.float64)
    worst, finite, low, count, differing = 0.0, True, other.type.name == "F32", 0, 0
    for w, q, base, size in _side_by_side(mine, other, changed):
        finite = finite and bool(torch.isfinite(q).all())
        count += w.numel()
        if other.pair is None and _same_bits(w, q, other.type.name):
            unequal = None
        else:
            unequal = q != w if other.type.name == "F32" else q != w.to(DTYPES[other.type.name])
            differing += int(unequal.sum())
            allowed = rounding * w.abs() * 1.001 + tiny + (size * SUM if size is not None else 0.0)
            worst = max(worst, float(((q - w).abs() / allowed).nan_to_num(torch.inf).max()))
        low = low and bool(torch.equal(q.bfloat16().float(), q))
        delta = w - base
        sums += torch.stack(
            [_dot(q, w), _dot(w, w), _dot(q - base, delta), _dot(delta, delta), _dot(q, q)]
        )
    words = []
    if not finite:
        words.append("holds NaN or inf")
    elif worst > 1:
        words = [f"error {worst:.3g} times the rounding", f"coefficient {_ratio(sums):.4f}"]
        if sums[3] > 0:
            words += effect_words(float(sums[2] / sums[3]), mine.scale)
        if low:
            words.append("float32 values that were rounded to bfloat16")
        if _rows_in_checkpoint_order(mine, other):
            words.append("its rows are in the checkpoint's order: not permuted")
    fault = f"{other.name} ({other.type.name}): " + ", ".join(words) if words else None
    return Outcome(other.name, False, fault, differing, count, worst)


def _side_by_side(
    mine: Numbers, other: Numbers, changed: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Blocks of the reference, the file, the reference's base, and the size of its sums."""
    at = 0
    pairs = [n.pair for n in (mine, other) if n.pair is not None] if changed else []
    bases = mine.read(False) if changed and mine.changed else None
    for w, q in zip(mine.read(changed), other.read(changed), strict=True):
        base = next(bases) if bases is not None else w
        size = None
        if pairs:
            size = base.abs() + sum(pair.sizes(at, at + len(w)) for pair in pairs)
        elif changed and mine.changed:  # DoRA: the rounding of the norm comes on top
            size = w.abs().max() * 4
        at += len(w)
        yield w, q, base, size


def _same_bits(w: Tensor, q: Tensor, kind: str) -> bool:
    rounded = w if kind == "F32" else w.to(DTYPES[kind]).float()
    return torch.equal(rounded.contiguous().view(torch.int32), q.contiguous().view(torch.int32))


def _rows_in_checkpoint_order(mine: Numbers, other: Numbers) -> bool:
    """Whether rotary rows were left as the checkpoint has them."""
    if mine.place is None or not mine.place.heads or mine.shape[0] % (2 * mine.place.heads):
        return False
    w, q = mine.whole(), other.whole()
    unpermuted = mine.place.restore(w)
    alike = _dot(unpermuted, q) > ALIKE * (_dot(w, w) * _dot(q, q)).sqrt()
    return bool(alike) and not torch.equal(unpermuted, w)


def _damage(outcomes: list[Outcome]) -> set[str]:
    """Tensors with a few other bytes in a file that is otherwise the reference's to the bit."""
    differing = sum(o.differing for o in outcomes)
    compared = sum(o.blocks for o in outcomes)
    few = 0 < differing <= min(FEW, compared // 20)
    return {o.name for o in outcomes if o.differing} if few else set()


def _summary(outcomes: list[Outcome], quantised: bool, damaged: set[str]) -> Check:
    what = "blocks" if quantised else "numbers"
    wrong = [
        o.fault or f"{o.name}: {o.differing} of {o.blocks} {what} differ: damaged after writing?"
        for o in outcomes
        if o.fault or o.name in damaged
    ]
    exact = sum(o.differing == 0 for o in outcomes)
    figure = f"{exact} of {len(outcomes)} bit for bit"
    worst = max(o.worst for o in outcomes)
    if exact < len(outcomes) and not quantised:
        figure += f", {len(outcomes) - exact} within {worst:.2g} of the rounding"
    elif exact < len(outcomes):
        figure += f", {len(outcomes) - exact} of another make"
    if wrong:
        figure = f"{len(wrong)} of {len(outcomes)} differ"
    name = "quantised again" if quantised else "numbers in F32, F16, BF16"
    limit = "the type's error" if quantised else "the rounding"
    return Check(STEP, name, figure, limit, not wrong, tuple(wrong), exact / len(outcomes))


def _compare_pairs(reference: Form, candidate: Form) -> Check:
    """What the adapter over the file adds, against what the reference's adapter adds."""
    wrong = list(reference.beyond)
    ours, theirs = reference.pairs, candidate.pairs
    if not ours and not reference.beyond:
        return Check(STEP, "the adapter over the file", "told by the sums above", "–", True)
    wrong += [f"{name}: the adapter's part is missing" for name in sorted(set(ours) - set(theirs))]
    wrong += [f"{name}: not in the reference" for name in sorted(set(theirs) - set(ours))]
    worst = 0.0
    both = sorted(set(ours) & set(theirs))
    for name in both:
        numbers, a, b = candidate.tensors[name], ours[name], theirs[name]
        rows = numbers.shape[0]
        pq = pp = 0.0
        here = 0.0
        for begin in range(0, rows, numbers.step):
            end = min(begin + numbers.step, rows)
            p, q = a.rows(begin, end), b.rows(begin, end)
            slack = a.sizes(begin, end) * (SUM if b.exact else 2.0**-9)
            here = max(here, float(((q - p).abs() / (slack + 1e-30)).max()))
            pq, pp = pq + float(_dot(p, q)), pp + float(_dot(p, p))
        worst = max(worst, here)
        if here > 1:
            words = effect_words(pq / pp if pp else 0.0, reference.tensors[name].scale)
            wrong.append(f"{name}: {', '.join(words)}; A and B of another adapter, or swapped")
    figure = f"{len(both)} products equal, within {worst:.2g} of the rounding"
    if wrong:
        figure = f"{len(wrong)} of {len(set(ours) | set(theirs))} differ"
    name = "what the adapter adds"
    return Check(STEP, name, figure, "the rounding", not wrong, tuple(wrong), worst)


def _rounding(kind: str) -> float:
    """Half a unit in the last place; none for F32 and for what is no float here."""
    return torch.finfo(DTYPES[kind]).eps / 2 if kind in ("F16", "BF16") else 0.0


def _ratio(sums: Tensor) -> float:
    return float(sums[0] / sums[1]) if sums[1] > 0 else float(sums[4] == 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())
