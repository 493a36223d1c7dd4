"""Packed attention by torch's own flash kernels, which read documents end to end as they lie.

For half precision on GPUs that have them; no padding, no buckets, no mask. Knows neither soft caps
nor sinks: those, and other GPUs, take `kernels/attention.py`'s way.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from tsugiki.kernels.backend import why_plain

WIDEST = 256  # of a head; a multiple of eight
# torch before 2.12 takes grouped heads without being told
_KNOWN = inspect.signature(varlen_attn).parameters
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _KNOWN else {}


def flash_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention takes q (1, H, T, d), k and v (1, Hkv, T, d)."""
    width = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and width == v.shape[-1] <= WIDEST
        and width % 8 == 0
        and not why_plain(q.device, q.dtype, "attention")
    )


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, scale: float, window: int | None
) -> Tensor:
    """q (1, H, T, d), k and v (1, Hkv, T, d) of documents end to end → (1, T, H, d)."""
    bounds, longest = _bounds(lengths, q.device), max(lengths)
    q, k, v = (_rows(t) for t in (q, k, v))
    # (left, right) beside the token itself; (-1, 0) is plain causal attention
    sees = (-1 if window is None or window > longest else window - 1, 0)
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sees, **_GROUPED
    )
    assert isinstance(out, Tensor)
    return out[None]


def _rows(x: Tensor) -> Tensor:
    """(1, H, T, d) → (T, H, d), heads contiguous."""
    x = x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents begin, and T; every layer of a pass asks for the same."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device, torch.int32)
