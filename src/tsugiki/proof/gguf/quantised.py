"""A quantised tensor beside its reference: quantised again, byte for byte, or by its errors.

The same numbers give the same bytes. Where they do not (another build of llama.cpp, an importance
matrix, a rounding to 16 bits on the way) the file's numbers are held to the reference and to our
own quantisation of it. Knows no names and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsugiki.formats.ggml_types import GgmlType
from tsugiki.formats.gguf_encode import encode_numbers
from tsugiki.formats.gguf_file import decode_numbers
from tsugiki.formats.llama_cpp.process import LlamaCpp

GROUP = 32  # numbers whose errors are summed
# Types that ggml makes without an importance matrix.
MADE = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
# ⟨q, w⟩ / ⟨w, w⟩ of a type's numbers q on the reference's w, on normal and heavy-tailed weights.
COEFFICIENTS = {
    "Q8_0": (0.9999, 1.0001), "Q6_K": (0.9998, 1.0002), "Q5_K": (0.9985, 0.9992),
    "Q4_K": (0.9967, 0.9973), "Q3_K": (0.993, 0.995), "Q2_K": (0.983, 0.990),
}  # fmt: skip
ANY_TYPE = (0.95, 1.01)  # what is not in the table
SLACK = 0.005  # beyond that is a fault
FEW = 8  # blocks: so few in a whole file that is equal otherwise are damage
# The file's error in 32 numbers over ours: an importance matrix or 16 bits on the way make a few
# times, a wrong high bit thousands.
WORST = 100.0
EFFECT, DOUBTS = 0.1, 5.0  # of the adapter's part, beside standard errors
ABOUT = 0.05


@dataclass
class Errors:
    """What was summed over a tensor, in fp64.

    q: the file's numbers, w: the reference's, o: our own quantisation of w, d: the adapter's part
    of w. worst: the largest error of a group of q, over that of o.
    """

    qw: float = 0.0
    ww: float = 0.0
    ow: float = 0.0
    qd: float = 0.0
    dd: float = 0.0
    qq: float = 0.0
    ours: float = 0.0
    theirs: float = 0.0
    worst: float = 0.0
    blocks: int = 0
    differing: int = 0
    count: int = 0
    made: bool = True
    finite: bool = True

    @property
    def coefficient(self) -> float:
        """⟨q, w⟩ / ⟨w, w⟩."""
        return self.qw / self.ww if self.ww else float(self.qq == 0)

    @property
    def expected(self) -> float | None:
        """The same of our own quantisation."""
        return (self.ow / self.ww if self.ww else 1.0) if self.made else None

    @property
    def effect(self) -> float | None:
        """How many times the adapter's part is in q: 1 when it was applied once."""
        return 1 + self.qd / self.dd if self.dd else None

    @property
    def doubt(self) -> float:
        """Standard error of `effect`, the errors of q being noise to the adapter's part."""
        return (self.theirs / max(1, self.count) / self.dd) ** 0.5 if self.dd else 0.0


Make = Callable[[Tensor], NDArray[np.uint8]]


def maker(kind: GgmlType, llama: LlamaCpp | None) -> Make | None:
    """What quantises fp32 rows (rows, columns) to a type's bytes; None where nothing here can."""
    if kind.name == "Q8_0":
        return lambda block: encode_numbers(block, kind).numpy()
    if llama is not None and kind.name in MADE:
        return lambda block: llama.quantise(block.numpy(), kind.name)
    return None


def measure(
    blocks: Iterator[Tensor],
    bases: Iterator[Tensor] | None,
    raw: NDArray[np.uint8],
    kind: GgmlType,
    columns: int,
    make: Make | None,
    values: Iterator[Tensor] | None = None,
) -> Errors:
    """Hold a file's bytes to the reference's numbers.

    Args:
        blocks: the reference in fp32, some rows at a time. bases: the same without the adapter.
        raw: the file's bytes, (rows, bytes of a row).
        values: the file's numbers, where an adapter lies over them; else what `raw` stands for.
    """
    found = Errors(made=make is not None)
    at = 0
    for w in blocks:
        stored = raw[at : at + len(w)]
        at += len(w)
        if values is not None:
            q = next(values)
        else:
            decoded = decode_numbers(stored, kind, columns)
            assert decoded is not None, "the caller knows the types"
            q = torch.from_numpy(np.array(decoded)).reshape(w.shape)
        found.finite = found.finite and bool(torch.isfinite(q).all())
        bytes_ = make(w) if make else None
        o = None
        if bytes_ is not None:
            width = kind.nbytes
            other = (bytes_.reshape(-1, width) != stored.reshape(-1, width)).any(1)
            found.differing += int(other.sum())
            found.blocks += len(other)
            if other.any():
                ours = decode_numbers(bytes_, kind, columns)
                assert ours is not None
                o = torch.from_numpy(np.array(ours)).reshape(w.shape)
            else:
                o = q
        _add(found, w, q, o, next(bases) if bases is not None else None)
    return found


def judge(found: Errors, kind: GgmlType, scale: float) -> str | None:
    """What is wrong with a tensor, for people; None where it is the reference's.

    scale: the adapter's, to tell one that was applied twice.
    """
    if not found.finite:
        return "holds NaN or inf"
    if found.made and not found.differing:
        return None
    low, high = COEFFICIENTS.get(kind.name, ANY_TYPE)
    if found.expected is not None:
        low = high = found.expected
    words = []
    if not low - SLACK <= found.coefficient <= high + SLACK:
        words.append(f"coefficient {found.coefficient:.4f}, expected {low:.4f} to {high:.4f}")
    if found.effect is not None and abs(found.effect - 1) > EFFECT + DOUBTS * found.doubt:
        words += effect_words(found.effect, scale)
    if found.worst > WORST:
        words.append(f"32 numbers have {found.worst:.3g} times the type's error")
    if words and found.made:
        words.append(f"{found.differing} of {found.blocks} blocks differ")
    return ", ".join(words) or None


def effect_words(effect: float, scale: float) -> list[str]:
    """How often the adapter's part is in a tensor, and what that looks like."""
    words = [f"the adapter's part {effect:.3f} times"]
    if abs(effect) < ABOUT:
        words.append("the adapter is not in it")
    elif scale != 1 and abs(effect / scale - 1) < ABOUT:
        words.append("the scale was applied twice")
    elif abs(effect - 2) < ABOUT:
        words.append("it was merged twice")
    return words


def _add(found: Errors, w: Tensor, q: Tensor, o: Tensor | None, base: Tensor | None) -> None:
    error = q - w
    found.qw += _dot(q, w)
    found.ww += _dot(w, w)
    found.qq += _dot(q, q)
    found.theirs += _dot(error, error)
    found.count += w.numel()
    if o is not None:
        found.ow += _dot(o, w)
        found.ours += _dot(o - w, o - w)
        if o is not q:
            theirs, ours = (_groups(e) for e in (error, o - w))
            # A group that was hit exactly has no error to compare with: the average's, then.
            floor = ours.mean().clamp_min(1e-30)
            found.worst = max(found.worst, float((theirs / torch.maximum(ours, floor)).max()))
    if base is not None:
        part = w - base
        found.qd += _dot(error, part)
        found.dd += _dot(part, part)


def _groups(error: Tensor) -> Tensor:
    """Sums of squares of 32 neighbours."""
    return error.square().reshape(-1, GROUP).sum(1)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))
