"""The compiled elementwise bodies as functions of tensors, under the names that Triton's have.

Checks nothing that its callers know; `runs` says which tensors the bodies take. Knows no layers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from tsugiki.kernels.cpu.build import library

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
KINDS = {"silu": 0, "gelu_tanh": 1}

Argument = Tensor | int | float | None


def runs(x: Tensor) -> bool:
    """Whether the bodies take a tensor of this kind."""
    return x.dtype in NAMES and x.device.type == "cpu" and library()[0] is not None


def activates(activation: str) -> bool:
    """Whether this activation has a compiled body."""
    return activation in KINDS


def gate(e: Tensor, g: Tensor | None, activation: str) -> Tensor:
    """act(e)·g (T, m)."""
    h = torch.empty(e.shape, dtype=e.dtype)
    call("gate", e, e, g, h, *e.shape, e.stride(0), stride_of(g), KINDS[activation])
    return h


def gate_back(
    grad: Tensor,
    e: Tensor,
    g: Tensor | None,
    activation: str,
    h: Tensor | None,
    grad_e: Tensor,
    grad_g: Tensor | None,
) -> None:
    """From dh (T, m) to de and dg, and h again where wanted; dg may be dh's own memory."""
    assert grad.is_contiguous()
    assert h is None or h.is_contiguous()
    call(
        "gate_back", e, grad, e, g, h, grad_e, grad_g, *e.shape, e.stride(0), stride_of(g),
        grad_e.stride(0), stride_of(grad_g), KINDS[activation],
    )  # fmt: skip


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    factor: float,
    needs: bool,
) -> tuple[Tensor, Tensor | None]:
    """−log p(target) a row (n,), fp32; with `needs`, logits (n, V) become factor · d loss / d W·h
    but for the targets' entries (n, 1), which come apart, and are zero there."""
    assert logits.is_contiguous()
    targets = checked(targets, logits.shape[1])
    losses = torch.empty(len(targets))
    own = torch.empty(len(targets), 1)
    cap = softcap or 0.0
    call(
        "softmax_rows", logits, logits, targets, losses, own, *logits.shape, scale, cap, factor,
        int(needs),
    )  # fmt: skip
    return losses, own if needs else None


def checked(targets: Tensor, vocab: int) -> Tensor:
    """Targets as the bodies take them, none beyond the head."""
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"a target beyond the {vocab} rows of the head")
    return targets.to(torch.int64).contiguous()


def norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) · (weight + offset) and 1 / rms (T, 1), fp32."""
    x = x.contiguous()
    out, inverse = torch.empty_like(x), torch.empty(len(x), 1)
    call("norm_rows", x, x, weight, out, inverse, *x.shape, float(eps), float(offset))
    return out, inverse


def norm_rows_back(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> Tensor:
    """dX (T, k) of dY."""
    x = x.contiguous()
    out = torch.empty_like(x)
    call("norm_rows_back", x, grad.contiguous(), x, weight, inverse, out, *x.shape, float(offset))
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    """Rotary embedding of x (T, heads, d) into out; cos, sin (T, 2·h)."""
    x = along_rows(x)
    call(
        "turn", x, x, cos.contiguous(), sin.contiguous(), out, *x.shape, cos.shape[-1] // 2,
        x.stride(0), x.stride(1), out.stride(0), out.stride(1), float(direction),
    )  # fmt: skip


def dropped(x: Tensor, mask: Tensor, scale: float, out: Tensor, add: bool) -> Tensor:
    """x · mask · scale into out, or added to it; mask: bits (int16), one an entry of x."""
    call("dropped", x, x, mask, out, x.numel(), float(scale), int(add))
    return out


def nf4_unpack(packed: Tensor, scales: Tensor, levels: Tensor, out: Tensor) -> Tensor:
    """Codes (rows, width / 2) of NF4 with the scales (rows, width / 64) of their blocks, in out."""
    call("nf4_unpack", out, packed, scales, levels, out, *out.shape, packed.stride(0),
          scales.stride(0))  # fmt: skip
    return out


def quantise(
    x: Tensor,
    fold: Tensor | None,
    chance: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    ratio: Tensor,
    levels: int,
) -> None:
    """x (T, K) · fold (K,) in whole numbers of its rows' scales, into codes (T, K) int8.

    chance: a table of which a part, another for each row, is added before rounding.
    scale (T, 1): a row's peak over levels; ratio (T, 1): over its root mean square.
    """
    x = along_rows(x)
    call("quantise", x, x, fold, chance, codes, scale, ratio, *x.shape, x.stride(0), levels,
          0 if chance is None else chance.numel())  # fmt: skip


def scaled(
    products: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    add: bool,
) -> None:
    """products (T, n) int32 · row_scale (T, 1) · column_scale (n,) + bias (n,) into or onto y."""
    call("scaled", y, products, row_scale, column_scale, bias, y, *y.shape, y.stride(0), int(add))


def along_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def stride_of(x: Tensor | None) -> int:
    """Entries from row to row."""
    return 0 if x is None else x.stride(0)


def call(name: str, like: Tensor, *given: Argument) -> int:
    """A body by name and type, on torch's threads; strides along the last dimension are one.

    What it returns means something only of bodies that return something.
    """
    loaded = library()[0]
    assert loaded is not None
    arguments: list[Any] = []
    for value in given:
        if isinstance(value, Tensor):
            assert value.stride(-1) == 1 or value.shape[-1] <= 1, name
            arguments.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, float):
            arguments.append(ctypes.c_float(value))
        elif value is None:
            arguments.append(ctypes.c_void_p(None))
        else:
            arguments.append(ctypes.c_int64(value))
    body = getattr(loaded, f"{name}_{NAMES[like.dtype]}")
    returned: int = body(*arguments, ctypes.c_int(torch.get_num_threads()))
    return returned
