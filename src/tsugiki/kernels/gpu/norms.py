"""Triton bodies of row norms and rotary embedding: each tensor is read once and written once.

Sums are fp32. A program takes several rows where rows are short (head norms).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CELLS = 4096  # of one program's tile, a row at least


@triton.jit
def _norm(x, weight, out, inverse, T, K, xt, eps, offset, BT: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BK)
    inside = (rows < T)[:, None] & (columns < K)[None]
    at = rows.to(tl.int64)[:, None]
    tile = tl.load(x + at * xt + columns[None], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(tile * tile, axis=1) / K + eps)
    scale = tl.load(weight + columns, mask=columns < K, other=0.0).to(tl.float32) + offset
    tl.store(out + at * K + columns[None], tile * r[:, None] * scale[None], mask=inside)
    tl.store(inverse + rows, r, mask=rows < T)


def norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x (T, k), weight (k,) → x / rms(x)·(weight + offset), and 1 / rms (T, 1) in fp32."""
    count, width = x.shape
    x = _along_rows(x)
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    inverse = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    rows, columns = _tile(width)
    _norm[(triton.cdiv(count, rows),)](
        x, weight, out, inverse, count, width, x.stride(0), eps, offset,
        BT=rows, BK=columns, num_warps=_warps(columns),
    )  # fmt: skip
    return out, inverse


@triton.jit
def _norm_back(
    grad, x, weight, inverse, out, T, K, gt, xt, offset, BT: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BK)
    inside = (rows < T)[:, None] & (columns < K)[None]
    at = rows.to(tl.int64)[:, None]
    r = tl.load(inverse + rows, mask=rows < T, other=0.0)[:, None]
    unit = tl.load(x + at * xt + columns[None], mask=inside, other=0.0).to(tl.float32) * r
    scale = tl.load(weight + columns, mask=columns < K, other=0.0).to(tl.float32) + offset
    upstream = tl.load(grad + at * gt + columns[None], mask=inside, other=0.0).to(tl.float32)
    upstream *= scale[None]
    mean = tl.sum(unit * upstream, axis=1)[:, None] / K
    tl.store(out + at * K + columns[None], (upstream - unit * mean) * r, mask=inside)


def norm_rows_back(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> Tensor:
    """The gradient of x (T, k) from that of the norm's output."""
    count, width = x.shape
    grad, x = _along_rows(grad), _along_rows(x)
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    rows, columns = _tile(width)
    _norm_back[(triton.cdiv(count, rows),)](
        grad, x, weight, inverse, out, count, width, grad.stride(0), x.stride(0), offset,
        BT=rows, BK=columns, num_warps=_warps(columns),
    )  # fmt: skip
    return out


@triton.jit
def _turn(
    x, cos, sin, out, T, D, H, xt, xh, xd, ot, oh, od, ct, st, sign,
    REST: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    columns = tl.arange(0, BH)
    inside = (rows < T)[:, None] & (columns < H)[None]
    at = rows.to(tl.int64)[:, None]
    source = x + at * xt + head * xh
    target = out + at * ot + head * oh
    one = tl.load(source + columns[None] * xd, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + (columns[None] + H) * xd, mask=inside, other=0.0).to(tl.float32)
    c1 = tl.load(cos + at * ct + columns[None], mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + at * ct + columns[None] + H, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + at * st + columns[None], mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + at * st + columns[None] + H, mask=inside, other=0.0).to(tl.float32)
    if sign < 0:  # the transpose of the same matrix
        s1, s2 = s2, s1
    tl.store(target + columns[None] * od, one * c1 - sign * two * s1, mask=inside)
    tl.store(target + (columns[None] + H) * od, two * c2 + sign * one * s2, mask=inside)
    if REST:
        more = 2 * H + tl.arange(0, BR)
        inside = (rows < T)[:, None] & (more < D)[None]
        kept = tl.load(source + more[None] * xd, mask=inside, other=0.0)
        tl.store(target + more[None] * od, kept, mask=inside)


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    """Rotary embedding of x (T, heads, d) into out (T, heads, d), any strides.

    cos, sin: (T, 2·h), rows contiguous. direction: 1 forward, -1 its transpose.
    """
    count, heads, width = x.shape
    half = cos.shape[-1] // 2
    rest = width - 2 * half
    block = triton.next_power_of_2(half)
    rows = max(1, min(64, CELLS // (2 * block)))
    cos, sin = _along_rows(cos), _along_rows(sin)
    _turn[(triton.cdiv(count, rows), heads)](
        x, cos, sin, out, count, width, half, *x.stride(), *out.stride(),
        cos.stride(0), sin.stride(0), float(direction),
        REST=rest > 0, BT=rows, BH=block, BR=triton.next_power_of_2(max(1, rest)), num_warps=4,
    )  # fmt: skip


def _along_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _tile(width: int) -> tuple[int, int]:
    columns = triton.next_power_of_2(width)
    return max(1, CELLS // columns), columns


def _warps(columns: int) -> int:
    return 4 if columns <= CELLS else 8 if columns <= 2 * CELLS else 16
