"""Step 2: every tensor. Untouched ones bit for bit; changed ones against the product in fp32.

A changed value may differ from the fp32 product by the rounding of its stored type, and by the
order of a fp32 sum. What is beyond that is named, with what it looks like. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tsugiki.adapters.algebra import LowRank
from tsugiki.files import sha256_file
from tsugiki.proof.artefact import NAMES, Artefact, Entry
from tsugiki.proof.checks import Check, found

SUM = 2.0**-20  # a fp32 sum of a few dozen terms, relative to the sum of their sizes
STEP = "2 tensors"
CHUNK = 4 << 20  # bytes compared at once


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference.

    worst: largest error in units of what rounding allows. coefficient: ⟨q, w⟩ / ⟨w, w⟩. effect: the
    same for the adapter's part alone: 1 when it was applied once. scale: the adapter's. low: its
    fp32 values are bf16's.
    """

    worst: float
    coefficient: float
    effect: float | None
    scale: float
    finite: bool
    low: bool

    def looks_like(self) -> str:
        """What the figures say went wrong."""
        if not self.finite:
            return "holds NaN or inf"
        words = [f"coefficient {self.coefficient:.4f}"]
        if self.effect is not None:
            words.append(f"the adapter's part {self.effect:.3f} times")
            if abs(self.effect) < 0.02 and abs(self.coefficient - 1) < 0.1:
                words.append("the adapter is not in it")
            elif self.scale != 1 and abs(self.effect / self.scale - 1) < 0.02:
                words.append("the scale was applied twice")
            elif abs(self.effect - 2) < 0.02:
                words.append("it was merged twice")
        if self.low:
            words.append("float32 values that were rounded to bfloat16")
        return f"error {self.worst:.3g} times the rounding; " + ", ".join(words)


def compare_files(candidate: Artefact) -> list[Check]:
    """A merged folder's files against the digests that were written with them."""
    record = candidate.record()
    if record is None:
        return []
    files = {str(k): str(v) for k, v in record.get("files", {}).items()}
    folder, wrong = candidate.stored.folder, []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif sha256_file(path) != digest:
            wrong.append(f"{name}: changed since it was merged")
    return [found("0 files", "as they were written (SHA-256)", wrong, len(files), "files")]


def compare_tensors(
    reference: Artefact, candidate: Artefact, dtype: str | None = None
) -> list[Check]:
    """Names, shapes, types and numbers of every tensor.

    Args:
        dtype: the type that float tensors were asked to have; the reference's own when None.
    """
    ours, theirs = reference.tensors(), candidate.tensors()
    names = [f"{name}: missing" for name in sorted(set(ours) - set(theirs))]
    names += [f"{name}: not in the reference" for name in sorted(set(theirs) - set(ours))]
    types: list[str] = []
    numbers: list[str] = []
    worst, exact = 0.0, 0
    both = sorted(set(ours) & set(theirs))
    for name in both:
        mine, other = ours[name], theirs[name]
        if mine.stored.shape != other.stored.shape:
            names.append(f"{name}: shape {other.stored.shape}, expected {mine.stored.shape}")
            continue
        is_float = mine.stored.dtype.is_floating_point
        wanted = dtype if dtype and is_float else NAMES.get(mine.stored.code, mine.stored.code)
        if NAMES.get(other.stored.code, other.stored.code) != wanted:
            got = NAMES.get(other.stored.code, other.stored.code)
            types.append(f"{name}: stored as {got}, {wanted} was asked")
        difference = compare_one(mine, other)
        if difference is None:
            exact += 1
            continue
        worst = max(worst, difference.worst)
        if difference.worst > 1 or not difference.finite:
            numbers.append(f"{name}: {difference.looks_like()}")
    count = len(both)
    figure = f"{exact} of {count} bit for bit"
    if exact < count:
        figure += f", {count - exact} within {worst:.2g} of the rounding"
    if numbers:
        figure = f"{len(numbers)} of {count} differ, by up to {worst:.3g} times the rounding"
    return [
        found(STEP, "names and shapes", names, len(set(ours) | set(theirs)), "tensors"),
        found(STEP, "stored types", types, count, "tensors"),
        Check(STEP, "numbers", figure, "the rounding", not numbers, tuple(numbers), worst),
    ]


def compare_one(mine: Entry, other: Entry) -> Difference | None:
    """The candidate's numbers against the reference's; None when they are the same bits."""
    if mine.change is None and other.change is None:
        a, b = mine.tensor(), other.tensor()
        if a.dtype == b.dtype and _same_bytes(mine, other):
            return None
    stored_low = other.stored.dtype if other.change is None else torch.float32
    rounding = 0.0 if stored_low == torch.float32 else torch.finfo(stored_low).eps / 2
    if mine.change is None and mine.stored.dtype == stored_low:
        rounding = 0.0  # one type on both sides: nothing was rounded
    tiny = float(torch.finfo(stored_low).smallest_normal)
    sums = torch.zeros(5, dtype=torch.float64)
    worst, finite, low = 0.0, True, stored_low == torch.float32
    for w, q, base, size in _side_by_side(mine, other):
        finite = finite and bool(torch.isfinite(q).all())
        error = (q - w).abs()
        allowed = rounding * w.abs() * 1.001 + tiny + (size * SUM if size is not None else 0.0)
        worst = max(worst, float((error / allowed).max()))
        low = low and bool(torch.equal(q.bfloat16().float(), q))
        delta = w - base
        sums += torch.stack(
            [_dot(q, w), _dot(w, w), _dot(q - base, delta), _dot(delta, delta), _dot(q, q)]
        )
    effect = float(sums[2] / sums[3]) if mine.change is not None and sums[3] > 0 else None
    coefficient = float(sums[0] / sums[1]) if sums[1] > 0 else float(sums[4] == 0)
    scale = mine.change.scale if isinstance(mine.change, LowRank) else 1.0
    return Difference(worst, coefficient, effect, scale, finite, low and worst > 1)


def _side_by_side(
    mine: Entry, other: Entry
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Blocks of the reference, the candidate, the reference's base, and the size of its sums."""
    change, tensor = mine.change, mine.tensor()
    products: Iterator[Tensor] | None = None
    if isinstance(change, LowRank) and change.magnitude is None:
        sizes = replace(change, a=change.a.abs(), b=change.b.abs(), scale=abs(change.scale))
        products = sizes.blocks(tensor)
    base = Entry(mine.model, mine.stored, None)
    for w, q, b in zip(mine.blocks(), other.blocks(), base.blocks(), strict=True):
        size = None
        if products is not None:
            size = next(products) - b + b.abs()  # |W| + s·|B|·|A|
        elif isinstance(change, LowRank):  # DoRA: the rounding of the norm comes on top
            size = w.abs().max() * 4
        yield w, q, b, size


def _same_bytes(mine: Entry, other: Entry) -> bool:
    """By chunks: comparing views goes element by element, which takes a hundred times longer."""
    a, b = mine.model.bytes_of(mine.stored), other.model.bytes_of(other.stored)
    return len(a) == len(b) and all(
        bytes(a[at : at + CHUNK]) == bytes(b[at : at + CHUNK]) for at in range(0, len(a), CHUNK)
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.reshape(-1).double(), b.reshape(-1).double())
