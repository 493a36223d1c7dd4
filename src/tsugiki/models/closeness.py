"""When a faster way of computing is as good as the one it replaces.

Both are compared with a wider copy: the faster one may be at most 1.2 times as far from it. Knows
no modules.
"""

from __future__ import annotations

from torch import Tensor

WORSE = 1.2  # times the original's own error
# Relative, four units in fp32's last place. Models compute norms in fp32 even where they are held
# in fp64, and then their own error reads as zero; below this, which of two is nearer is luck.
UNSEEN = 5e-7


def compare(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> str:
    """Which tensor is further from `exact` than allowed, and how far; '' where none is."""
    if len(ours) != len(exact):
        return f"{len(ours)} results instead of {len(exact)}"
    for number, (one, two, e) in enumerate(zip(ours, plain, exact, strict=True)):
        if one.shape != two.shape:
            return f"result {number} has shape {tuple(one.shape)}, not {tuple(two.shape)}"
        size = float(e.double().norm()) or 1.0
        mine, its = (float((t.double() - e.double()).norm()) / size for t in (one, two))
        if not mine <= max(WORSE * its, UNSEEN):
            return f"result {number} is off by {mine:.1e}, the original by {its:.1e}"
    return ""
