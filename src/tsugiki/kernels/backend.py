"""Which bodies compute on which device: plain torch everywhere, Triton's on a GPU that proved them,
compiled ones on a CPU where a compiler is.

Before their first use on a device, the Triton bodies of each family of operations compute a small
case there beside the plain ones (`gpu/proof.py`); whatever goes wrong, a missing package included,
leaves that family plain and is said once. Nothing is timed, so a resumed run takes the same bodies.
Knows no operation.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
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


_compiled = [True]


def use_compiled(on: bool) -> None:
    """Whether CPU tensors may take compiled bodies from now on, where they can be built."""
    _compiled[0] = on


def bodies(x: Tensor, family: str) -> Any:
    """The module with one-pass bodies of a family for this tensor; None: plain torch."""
    if triton_runs(x, family):
        return importlib.import_module(f"tsugiki.kernels.gpu.{family}")
    if _compiled[0] and x.device.type == "cpu":
        from tsugiki.kernels.cpu import compiled

        return compiled if compiled.runs(x) else None
    return None


def triton_runs(x: Tensor, family: str) -> bool:
    """Whether Triton's bodies of a family take this tensor."""
    return x.is_cuda and x.dtype in TYPES and not why_plain(x.device, x.dtype, family)


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


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the log."""
    if device.type == "cpu" and _compiled[0]:
        from tsugiki.kernels.cpu.build import library

        found, reason = library()
        return f"{'plain torch' if found is None else 'compiled'} kernels: {reason}"
    if device.type != "cuda":
        return "plain torch kernels"
    plain = {f: why_plain(device, dtype, f) for f in FAMILIES}
    taken = [f for f, reason in plain.items() if not reason]
    reasons = list(dict.fromkeys(reason for reason in plain.values() if reason))
    said = [f"GPU kernels: {', '.join(taken)}"] if taken else []
    return "; ".join(said + [f"plain torch kernels: {reason}" for reason in reasons])
