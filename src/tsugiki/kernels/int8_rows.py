"""Eight bits a weight with one scale a row: storage, not arithmetic.

Scales are rounded up to bf16, so that a weight is the product of two short numbers and is rounded
once. Knows no products and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.kernels.quantized import Workspace

LEVELS = 127  # each side of zero
CHUNK = 1 << 20  # weights quantised at a time


@dataclass(frozen=True)
class Int8Codes:
    """A matrix (out, in).

    packed: (out, in) int8, -127…127.
    scales: (out,) bf16 as its bits in int16, so that casting a model does not touch it.
    """

    packed: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        rows, columns = self.packed.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def divisible(self) -> int:
        """Any part can be unpacked."""
        return 1

    def unpack(
        self, rows: slice, columns: slice, dtype: torch.dtype, workspace: Workspace
    ) -> Tensor:
        """A part of the matrix."""
        packed = self.packed[rows, columns]
        scale = self.scales.view(torch.bfloat16)[rows, None]
        # fp16 does not reach down to small scales: multiplied in fp32, rounded once as well
        wide = torch.float32 if dtype == torch.float16 else dtype
        tile = workspace.take("tile", packed.numel(), wide, self.device).view(packed.shape)
        return tile.copy_(packed).mul_(scale.to(wide)).to(dtype)

    def product(self, x: Tensor) -> None:
        """There is no better way."""


def quantize_int8(weight: Tensor) -> Int8Codes:
    """Codes of a finite matrix (out, in) of any floating type, contiguous or not.

    Raises:
        ValueError: it holds NaN or inf.
    """
    packed = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    step = max(1, CHUNK // weight.shape[1])
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, begin + step)
        some = weight[rows].to(torch.float32, copy=True)
        scales[rows] = _rounded_up(some.abs().amax(dim=1) / LEVELS)
        scale = scales[rows].float()[:, None]
        packed[rows] = some.div_(torch.where(scale == 0, 1.0, scale)).round_().to(torch.int8)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("NaN or inf")
    return Int8Codes(packed, scales.view(torch.int16))


def reference_int8(codes: Int8Codes, dtype: torch.dtype) -> Tensor:
    """The plain meaning of `Int8Codes.unpack` for the whole matrix, for tests."""
    return (codes.packed.double() * codes.scales.view(torch.bfloat16).double()[:, None]).to(dtype)


def _rounded_up(values: Tensor) -> Tensor:
    """The smallest bf16 numbers that are not below (n,) fp32 ones, which are not negative."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)
