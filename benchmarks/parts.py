"""Where a step's time goes: seconds in each compiled body, and in all else (torch's own, Python).

Every compiled body is called through one door, which is timed here. Knows no contestants and no
comparison.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tsugiki.kernels.cpu import compiled, tiles
from tsugiki.kernels.int8 import Int8Weight
from tsugiki.models.projections import frozen_weight, projection

PARTS = {
    "frozen products": ("multiply", "multiply_codes", "scaled"),
    "head and loss": ("head_rows", "softmax_rows"),
    "rounding to int8": ("quantise",),
    "unpacking": ("nf4_unpack",),
    "low-rank products": ("shrink", "expand", "gather"),
    "attention": ("attend", "attend_back"),
    "feed-forward's gates": ("gate", "gate_back"),
    "norms": ("norm_rows", "norm_rows_back"),
    "rotary": ("turn",),
    "dropout": ("dropped",),
}
OTHER = "all else"


@contextmanager
def _timed(seconds: dict[str, float]) -> Iterator[None]:
    """The door to compiled bodies adds up what each takes."""
    plain = compiled.call

    def call(name: str, *given: Any) -> int:
        began = time.perf_counter()
        returned = plain(name, *given)
        seconds[name] += time.perf_counter() - began
        return returned

    compiled.call = tiles.call = call
    try:
        yield
    finally:
        compiled.call = tiles.call = plain


def parts_of(step: Callable[[], float], steps: int) -> dict[str, float]:
    """Seconds by part, medians over so many steps; "step" is the whole."""
    found: dict[str, list[float]] = defaultdict(list)
    step()
    for _ in range(steps):
        seconds: dict[str, float] = defaultdict(float)
        began = time.perf_counter()
        with _timed(seconds):
            step()
        whole = time.perf_counter() - began
        for part, bodies in PARTS.items():
            found[part].append(sum(seconds.get(body, 0.0) for body in bodies))
        found[OTHER].append(whole - sum(seconds.values()))
        found["step"].append(whole)
    return {part: statistics.median(every) for part, every in found.items()}


def int8_share(model: nn.Module) -> float:
    """Of the operations of frozen products, forth and back, those that are in int8."""
    taken = whole = 0
    for module in model.modules():
        if projection(module) is None:
            continue
        weight = frozen_weight(module)
        cells = weight.shape[0] * weight.shape[1]
        whole += 2 * cells
        if isinstance(weight, Int8Weight):
            taken += cells * (1 + weight.forward)
    return taken / whole if whole else 0.0
