"""The compiled bodies as functions of tensors, under the names that the Triton bodies have.

Checks nothing that its callers know; `runs` says which tensors the bodies take. Knows no layers.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
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


@lru_cache(maxsize=1)
def tiles() -> bool:
    """Whether this CPU has tile registers that this process may use."""
    loaded = library()[0]
    return loaded is not None and bool(loaded.tiles_ready())


Bits = tuple[Tensor, Tensor, int]
Term = tuple[Tensor, Tensor, float, Bits | None]


def multiply(
    x: Tensor, matrix: Tensor, bias: Tensor | None, y: Tensor, add: bool, term: Term | None = None
) -> None:
    """y (T, n) = or += x (T, K) · matrixᵀ (n, K) + bias (n,) + term, bf16; bias fp32; K in 32s.

    term: s (T, R), b (n, R), a scale and a mask's bits: scale · mask(s · bᵀ), n in 32s.
    """
    _multiply("multiply", _along_rows(x), matrix, None, None, bias, y=y, add=add, term=term)


def multiply_codes(
    codes: Tensor,
    matrix: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    add: bool,
    term: Term | None = None,
) -> None:
    """The same of int8 codes, times the scales rows (T, 1) and columns (n,); K in 64s."""
    _multiply("multiply_codes", codes, matrix, rows, columns, bias, y=y, add=add, term=term)


def _multiply(
    name: str, x: Tensor, matrix: Tensor, *rest: Tensor | None, y: Tensor, add: bool,
    term: Term | None,
) -> None:  # fmt: skip
    """matrix (n, K) lies along either dimension."""
    stored, across = _stored(matrix)
    s, b, scale, bits = term or (None, None, 0.0, None)
    thin, thin_across = (None, 0) if b is None else _stored(b)
    rank = 0 if s is None else s.shape[1]
    given = (s, thin, rank, _stride(s), _stride(thin), thin_across, *(bits or (None, None, 1)))
    done = _call(name, y, x, stored, *rest, y, *y.shape, x.shape[1], x.stride(0),
                 stored.stride(0), y.stride(0), across, int(add), *given, float(scale))  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for the tiles of a product with {tuple(y.shape)} results")


def _stored(matrix: Tensor) -> tuple[Tensor, int]:
    """As it lies in memory, and whether that is transposed."""
    across = matrix.stride(1) != 1
    return matrix.T if across else matrix, int(across)


def activates(activation: str) -> bool:
    """Whether this activation has a compiled body."""
    return activation in KINDS


def gate(e: Tensor, g: Tensor | None, activation: str) -> Tensor:
    """act(e)·g (T, m)."""
    h = torch.empty(e.shape, dtype=e.dtype)
    _call("gate", e, e, g, h, *e.shape, e.stride(0), _stride(g), KINDS[activation])
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
    _call(
        "gate_back", e, grad, e, g, h, grad_e, grad_g, *e.shape, e.stride(0), _stride(g),
        grad_e.stride(0), _stride(grad_g), KINDS[activation],
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
    targets = _checked(targets, logits.shape[1])
    losses = torch.empty(len(targets))
    own = torch.empty(len(targets), 1)
    cap = softcap or 0.0
    _call(
        "softmax_rows", logits, logits, targets, losses, own, *logits.shape, scale, cap, factor,
        int(needs),
    )  # fmt: skip
    return losses, own if needs else None


def head_rows(
    x: Tensor,
    matrix: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    factor: float,
    needs: bool,
) -> tuple[Tensor, Tensor | None]:
    """−log p(target) a row (n,), fp32, of hidden rows (n, k) and the head's matrix (V, k), bf16;
    with `needs`, factor · d loss / dx (n, k) too. On tile registers; k in 32s, scale above 0."""
    targets = _checked(targets, len(matrix))
    losses = torch.empty(len(targets))
    grad = torch.empty(x.shape, dtype=x.dtype) if needs else None
    x, cap = _along_rows(x), float(softcap or 0)
    done = _call("head_rows", x, x, matrix, targets, losses, grad, *x.shape, len(matrix),
                 x.stride(0), matrix.stride(0), float(scale), cap, float(factor))  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for the tiles of a head of {len(matrix)} rows")
    return losses, grad


def shrink(x: Tensor, a: Tensor, scale: float, bits: Bits | None, out: Tensor) -> Tensor:
    """out (T, R) = scale · mask(x) · aᵀ on tile registers: x (T, k), k in 32s, a (R, k) along
    either dimension, bits as `dropout.bits_of` gives them."""
    stored, across = _stored(a)
    _lowrank("shrink", x, stored, out, across=across, mask=bits, scale=scale, rank=len(a))
    return out


def expand(onto: Tensor, s: Tensor, b: Tensor, scale: float, bits: Bits | None) -> Tensor:
    """onto (T, n) += scale · mask(s · bᵀ): s (T, R), b (n, R) along either dimension, n in 32s."""
    stored, across = _stored(b)
    _lowrank("expand", onto, s, stored, across=across, mask=bits, scale=scale, rank=s.shape[1])
    return onto


def gather(x: Tensor, s: Tensor, scale: float, bits: Bits | None) -> Tensor:
    """scale · sᵀ · mask(x) (R, n), fp32: x (T, n), n in 32s, s (T, R)."""
    out = torch.empty(s.shape[1], x.shape[1])
    asked = _wide(x, s.shape[1], scale, bits)
    if not _call("gather", x, x, s, out, x.stride(0), s.stride(0), *asked):
        raise MemoryError(NO_ROOM)
    return out


NO_ROOM = "no memory for the tiles of a product with a low rank"


def _lowrank(
    name: str, wide: Tensor, *others: Tensor, across: int, mask: Bits | None, scale: float,
    rank: int,
) -> None:  # fmt: skip
    strides = [x.stride(0) for x in (wide, *others)]
    asked = _wide(wide, rank, scale, mask)
    if not _call(name, wide, wide, *others, *strides, across, *asked):
        raise MemoryError(NO_ROOM)


def _wide(x: Tensor, rank: int, scale: float, bits: Bits | None) -> list[Argument]:
    table, places, rows = bits or (None, None, 1)
    return [*x.shape, rank, table, places, rows, float(scale)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of documents, bf16, on tile registers: q (H, T, d), k and v (Hkv, T, d), d
    in 32s, lengths (n,) int64 → (T, H, d), and log Σ e^score (H, T) for the way back."""
    heads, tokens, width = q.shape
    out, norms = q.new_empty(tokens, heads, width), torch.empty(heads, tokens)
    asked = _attention(q, k, v, lengths, scale, window, softcap)
    if not _call("attend", q, *asked, out, norms):
        raise MemoryError(f"no memory for the tiles of attention over {int(lengths.max())} tokens")
    return out, norms


def attend_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    out: Tensor,
    norms: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (T, H, d), dk and dv (T, Hkv, d) of grad (T, H, d)."""
    assert grad.is_contiguous()
    heads, tokens, width = q.shape
    grad_q = torch.empty_like(out)
    grad_k, grad_v = (out.new_empty(tokens, k.shape[0], width) for _ in range(2))
    parts = torch.empty(2, heads, tokens, width)
    asked = _attention(q, k, v, lengths, scale, window, softcap)
    given = (out, grad, norms, grad_q, grad_k, grad_v, parts[0], parts[1])
    if not _call("attend_back", q, *asked, *given):
        raise MemoryError(f"no memory for the tiles of attention over {int(lengths.max())} tokens")
    return grad_q, grad_k, grad_v


def _attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, window: int | None,
    softcap: float | None,
) -> list[Argument]:  # fmt: skip
    heads, tokens, width = q.shape
    assert int(lengths.sum()) == tokens
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    return [q, k, v, lengths, len(lengths), heads, k.shape[0], width, tokens, *strides,
            float(scale), float(softcap or 0), window or 0]  # fmt: skip


def _checked(targets: Tensor, vocab: int) -> Tensor:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise IndexError(f"a target beyond the {vocab} rows of the head")
    return targets.to(torch.int64).contiguous()


def norm_rows(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) · (weight + offset) and 1 / rms (T, 1), fp32."""
    x = x.contiguous()
    out, inverse = torch.empty_like(x), torch.empty(len(x), 1)
    _call("norm_rows", x, x, weight, out, inverse, *x.shape, float(eps), float(offset))
    return out, inverse


def norm_rows_back(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> Tensor:
    """dX (T, k) of dY."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("norm_rows_back", x, grad.contiguous(), x, weight, inverse, out, *x.shape, float(offset))
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, direction: int) -> None:
    """Rotary embedding of x (T, heads, d) into out; cos, sin (T, 2·h)."""
    x = _along_rows(x)
    _call(
        "turn", x, x, cos.contiguous(), sin.contiguous(), out, *x.shape, cos.shape[-1] // 2,
        x.stride(0), x.stride(1), out.stride(0), out.stride(1), float(direction),
    )  # fmt: skip


def dropped(x: Tensor, mask: Tensor, scale: float, out: Tensor, add: bool) -> Tensor:
    """x · mask · scale into out, or added to it; mask: bits (int16), one an entry of x."""
    _call("dropped", x, x, mask, out, x.numel(), float(scale), int(add))
    return out


def nf4_unpack(packed: Tensor, scales: Tensor, levels: Tensor, out: Tensor) -> Tensor:
    """Codes (rows, width / 2) of NF4 with the scales (rows, width / 64) of their blocks, in out."""
    _call("nf4_unpack", out, packed, scales, levels, out, *out.shape, packed.stride(0),
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
    x = _along_rows(x)
    _call("quantise", x, x, fold, chance, codes, scale, ratio, *x.shape, x.stride(0), levels,
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
    _call("scaled", y, products, row_scale, column_scale, bias, y, *y.shape, y.stride(0), int(add))


def _along_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _call(name: str, like: Tensor, *given: Argument) -> int:
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
