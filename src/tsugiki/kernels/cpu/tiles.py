"""The compiled bodies that compute in tiles as functions of tensors, bf16 and int8 codes: in tile
registers (Intel AMX), or bf16 alone in vector registers (AVX512-BF16: AMD from Zen 4 on).

Checks nothing that its callers know; `ready` says whether there are any. Each raises MemoryError
where a thread finds no room for its tiles. Knows no layers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tsugiki.kernels.cpu.build import library
from tsugiki.kernels.cpu.compiled import Argument, along_rows, call, checked, stride_of

FEW = 64  # rows: below, laying a matrix out for the tiles costs more than they save
SIDE = 32  # entries: the width of a block
DEPTH = 64  # bytes of K that a tile takes at once
NO_ROOM = "no memory for the tiles of a product with a low rank"


@lru_cache(maxsize=1)
def kind() -> str:
    """What holds the tiles on this CPU: "tile registers", "vector registers" or "" (nothing)."""
    loaded = library()[0]
    return ("", "tile registers", "vector registers")[loaded.tiles_ready() if loaded else 0]


def ready() -> bool:
    """Whether there are any; codes need tile registers."""
    return kind() != ""


Bits = tuple[Tensor, Tensor, int]
Term = tuple[Tensor, Tensor, float, Bits | None]


def multiply(
    x: Tensor, matrix: Tensor, bias: Tensor | None, y: Tensor, add: bool, term: Term | None = None
) -> None:
    """y (T, n) = or += x (T, K) · matrixᵀ (n, K) + bias (n,) + term, bf16; bias fp32; K in 32s.

    term: s (T, R), b (n, R), a scale and a mask's bits: scale · mask(s · bᵀ), n in 32s.
    """
    _multiply("multiply", along_rows(x), matrix, None, None, bias, y=y, add=add, term=term)


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
    given = (s, thin, rank, stride_of(s), stride_of(thin), thin_across, *(bits or (None, None, 1)))
    done = call(name, y, x, stored, *rest, y, *y.shape, x.shape[1], x.stride(0),
                 stored.stride(0), y.stride(0), across, int(add), *given, float(scale))  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for the tiles of a product with {tuple(y.shape)} results")


def _stored(matrix: Tensor) -> tuple[Tensor, int]:
    """As it lies in memory, and whether that is transposed."""
    across = matrix.stride(1) != 1
    return matrix.T if across else matrix, int(across)


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
    with `needs`, factor · d loss / dx (n, k) too; k in 32s, scale above 0."""
    targets = checked(targets, len(matrix))
    losses = torch.empty(len(targets))
    grad = torch.empty(x.shape, dtype=x.dtype) if needs else None
    x, cap = along_rows(x), float(softcap or 0)
    done = call("head_rows", x, x, matrix, targets, losses, grad, *x.shape, len(matrix),
                 x.stride(0), matrix.stride(0), float(scale), cap, float(factor))  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for the tiles of a head of {len(matrix)} rows")
    return losses, grad


def shrink(x: Tensor, a: Tensor, scale: float, bits: Bits | None, out: Tensor) -> Tensor:
    """out (T, R) = scale · mask(x) · aᵀ: x (T, k), k in 32s, a (R, k) along
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
    if not call("gather", x, x, s, out, x.stride(0), s.stride(0), *asked):
        raise MemoryError(NO_ROOM)
    return out


def _lowrank(
    name: str, wide: Tensor, *others: Tensor, across: int, mask: Bits | None, scale: float,
    rank: int,
) -> None:  # fmt: skip
    strides = [x.stride(0) for x in (wide, *others)]
    asked = _wide(wide, rank, scale, mask)
    if not call(name, wide, wide, *others, *strides, across, *asked):
        raise MemoryError(NO_ROOM)


def _wide(x: Tensor, rank: int, scale: float, bits: Bits | None) -> list[Argument]:
    table, places, rows = bits or (None, None, 1)
    return [*x.shape, rank, table, places, rows, float(scale)]
