"""Which bodies compute on which device: plain torch everywhere, Triton's on a GPU that proved them,
compiled ones on a CPU where a compiler is.

Before their first use on a device, the Triton bodies of each family of operations compute a small
case there beside the plain ones (`gpu/proof.py`); whatever goes wrong, a missing package included,
leaves that family plain and is said once. Nothing is timed; a run writes down what it took, and a
resumed one is held to it. Knows no operation.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FAMILIES = (
    "attention", "lowrank", "product", "norms", "activations", "loss", "nf4", "nf4_product",
)  # fmt: skip
TYPES = (torch.float16, torch.bfloat16, torch.float32)
# Before compute capability 8 Triton multiplies without tensor cores, and spills what it holds.
PRODUCTS = ("lowrank", "product", "nf4_product")
ON_CPU = ("norms", "activations", "loss", "dropout", "nf4", "int8", "tiles", "attention")

_plain: set[str] = set()


def hold_plain(families: Iterable[str]) -> None:
    """These families, and no others, compute by plain torch from now on."""
    _plain.clear()
    _plain.update(families)


def operations(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What computes each family of operations just now: torch, compiled or triton."""
    if device.type == "cuda":
        return {
            family: "torch" if family in _plain or why_plain(device, dtype, family) else "triton"
            for family in FAMILIES
        }
    some = torch.empty(1, dtype=dtype, device=device)
    return {
        family: "torch" if compiled_bodies(some, family) is None else "compiled"
        for family in ON_CPU
    }


def replay(
    noted: dict[str, str], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, str], str]:
    """Hold to what a run wrote down, if anything; what computes now, and a warning if others do.

    A family that an older version did not know was torch's then.
    """
    known = (FAMILIES if device.type == "cuda" else ON_CPU) if noted else ()
    hold_plain(family for family in known if noted.get(family, "torch") == "torch")
    found = operations(device, dtype)
    lost = [family for family, taken in noted.items() if found.get(family) != taken]
    if not lost:
        return found, ""
    return found, (
        f"{', '.join(lost)}: this run began with {noted[lost[0]]} kernels, which cannot be had "
        "now; it goes on, but not to the same bytes"
    )


def bodies(x: Tensor, family: str) -> Any:
    """The module with one-pass bodies of a family for this tensor; None: plain torch."""
    if triton_runs(x, family):
        return importlib.import_module(f"tsugiki.kernels.gpu.{family}")
    return compiled_bodies(x, family)


def compiled_bodies(x: Tensor, family: str) -> Any:
    """The same of compiled bodies alone, for families that have no Triton ones of that shape."""
    if x.device.type != "cpu" or family in _plain:
        return None
    from tsugiki.kernels.cpu import compiled, tiles

    if not compiled.runs(x):
        return None
    if family == "tiles":
        return tiles if tiles.ready() else None
    return compiled


def triton_runs(x: Tensor, family: str) -> bool:
    """Whether Triton's bodies of a family take this tensor."""
    if not x.is_cuda or x.dtype not in TYPES or family in _plain:
        return False
    return not why_plain(x.device, x.dtype, family)


@lru_cache(maxsize=64)
def why_plain(device: torch.device, dtype: torch.dtype, family: str) -> str:
    """Why a GPU runs the plain bodies of a family; '' where it runs Triton's."""
    reason = unsuited(device, dtype, family)
    if not reason:
        reason = judged(device, dtype, family)
        if reason:
            warnings.warn(f"plain torch kernels on {device}: {reason}", stacklevel=2)
    return reason


def unsuited(device: torch.device, dtype: torch.dtype, family: str) -> str:
    """Why a family is not even tried on this kind of GPU."""
    capability = torch.cuda.get_device_capability(device)
    if family == "attention" and (capability < (8, 0) or dtype == torch.float32):
        return "torch's flash kernels want half precision and a newer GPU (attention)"
    if family in PRODUCTS and capability < (8, 0):
        return f"Triton has no tensor-core products for this GPU ({family})"
    if family == "product" and capability >= (9, 0):
        # The library's products use copy engines there that ours does not, and one more pass over
        # the result costs less. Not yet measured: benchmarks/gpu.py times both.
        return "the library's own products and one more pass are taken (product)"
    return ""


def judged(device: torch.device, dtype: torch.dtype, family: str) -> str:
    """What is wrong with a family's bodies on this device; '' where nothing is."""
    if family != "attention" and importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'tsugiki[cuda]')"
    try:
        from tsugiki.kernels.gpu.proof import prove

        return prove(family, device, dtype)
    except Exception as error:  # a compiler or driver that cannot: plain bodies can
        return f"{family} cannot be tried: {str(error).strip().splitlines()[0][:200]}"


def describe(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What computes beside torch's own products, and why; for people."""
    if device.type == "cpu":
        from tsugiki.kernels.cpu.build import library

        found, reason = library()
        if found is not None and _plain.issuperset(ON_CPU):
            return "plain torch", "as this run began"
        return "plain torch" if found is None else "compiled", reason
    if device.type != "cuda":
        return "plain torch", f"nothing else is written for {device.type}"
    plain = {f: why_plain(device, dtype, f) for f in FAMILIES if f not in _plain}
    taken = [f for f, reason in plain.items() if not reason]
    reasons = list(dict.fromkeys(reason for reason in plain.values() if reason))
    return f"Triton: {', '.join(taken)}" if taken else "plain torch", "; ".join(reasons)
