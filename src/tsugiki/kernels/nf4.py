"""NF4: four bits a weight in blocks of 64, their scales in eight bits, as bitsandbytes keeps them.

(Dettmers et al. 2023, QLoRA, arXiv:2305.14314.) A weight is one of 16 quantiles of a normal
distribution times its block's largest magnitude; those magnitudes, less their mean, are quantised
again in blocks of 256 ("double quantisation"): 0.516 bytes a weight. The products are in fp32 and
rounded once, bit for bit bitsandbytes' numbers. Knows no products and no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tsugiki.kernels.backend import compiled_bodies, triton_runs
from tsugiki.kernels.quantized import ALL, Workspace

if TYPE_CHECKING:
    from tsugiki.kernels.gpu.nf4 import Packed

BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share a scale
CHUNK = 1 << 18  # weights unpacked at a time: their fp32 numbers stay in cache
WAYS = 32  # independent parts of a table look-up, for the threads

# Quantiles of N(0, 1) scaled to [-1, 1] with an exact zero (appendix E of the paper).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Nf4Codes:
    """A matrix (out, in) of n weights in B = ⌈n / 64⌉ blocks along its rows.

    packed: (32·B,) uint8, two weights a byte, the first one high; padded to whole blocks.
    absmax: (B,) uint8, places in `dynamic_map`.
    scales: (⌈B / 256⌉,) and offset: (1,): fp32 numbers kept as their bits in int32, so that casting
        a model to another type does not round them.
    """

    packed: Tensor
    absmax: Tensor
    scales: Tensor
    offset: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(t.nbytes for t in (self.packed, self.absmax, self.scales, self.offset))

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def divisible(self) -> int:
        """Columns come in blocks; where blocks cross rows only the whole matrix is unpacked."""
        return BLOCK if self.shape[1] % BLOCK == 0 else 0

    def unpack(
        self, rows: slice, columns: slice, dtype: torch.dtype, workspace: Workspace
    ) -> Tensor:
        """A part of the matrix; columns begin and end at blocks."""
        out, width = self.shape
        if self.divisible == 0:
            assert rows == columns == ALL, "blocks cross rows"
            whole = dataclasses.replace(self, shape=(len(self.absmax), BLOCK))
            flat = whole.unpack(ALL, ALL, dtype, workspace).view(-1)
            return flat[: out * width].view(out, width)
        if self.device.type == "cuda":
            assert rows == columns == ALL, "a GPU has no cache that tiles would stay in"
        first, last, _ = columns.indices(width)
        packed = self.packed.view(out, -1)[rows, first // 2 : last // 2]
        count, width = packed.shape[0], packed.shape[1] * 2
        tile = workspace.take("tile", count * width, dtype, self.device).view(count, width)
        if rows == columns == ALL and triton_runs(tile, "nf4"):
            from tsugiki.kernels.gpu import nf4 as gpu

            return gpu.unpack(self._for_triton(), tile)
        if self.device.type == "cuda":
            from tsugiki.kernels import nf4_cuda

            if nf4_cuda.available():
                return nf4_cuda.unpack(self, dtype)
        scale = block_scales(self, workspace).view(out, -1)[rows, first // BLOCK : last // BLOCK]
        fused = compiled_bodies(tile, "nf4")
        if fused is not None:
            unpacked: Tensor = fused.nf4_unpack(packed, scale, _levels(self.device), tile)
            return unpacked
        pairs = _pairs(self.device).expand(WAYS, -1)
        step = max(1, CHUNK // width)
        for begin in range(0, count, step):
            some = slice(begin, min(begin + step, count))
            part = tile[some]
            index = workspace.take("index", part.numel() // 2, torch.int64, self.device)
            index.view(part.shape[0], -1).copy_(packed[some])
            if dtype == torch.float32:
                numbers = part.view(-1)
            else:
                numbers = workspace.take("numbers", part.numel(), torch.float32, self.device)
            found = numbers.view(torch.float64).view(WAYS, -1)
            torch.gather(pairs, 1, index.view(WAYS, -1), out=found)
            numbers.view(part.shape[0], -1, BLOCK).mul_(scale[some, :, None])
            if dtype != torch.float32:
                part.view(-1).copy_(numbers)
        return tile

    def product(self, x: Tensor) -> Tensor | None:
        """x (T, in)·Wᵀ, the codes read once, where that is less work than unpacking them first."""
        if self.divisible == 0 or not triton_runs(x, "nf4_product"):
            return None
        from tsugiki.kernels.gpu import nf4 as gpu

        few = len(x) <= gpu.SKINNY
        return gpu.matmul(x, self._for_triton(), self.shape[0]) if few else None

    def _for_triton(self) -> Packed:
        """The same codes with their tables."""
        from tsugiki.kernels.gpu.nf4 import Packed

        scales, offset = self.scales.view(torch.float32), self.offset.view(torch.float32)
        tables = _levels(self.device), dynamic_map(self.device)
        return Packed(self.packed, self.absmax, scales, offset, *tables)


def block_scales(codes: Nf4Codes, workspace: Workspace) -> Tensor:
    """(B,) fp32: each block's largest magnitude, as double quantisation left it."""
    blocks, groups = len(codes.absmax), len(codes.scales)
    held = workspace.take("scales", groups * NESTED, torch.float32, codes.device)
    table = dynamic_map(codes.device)
    torch.index_select(table, 0, codes.absmax.to(torch.int32), out=held[:blocks])
    grid = held.view(groups, NESTED)
    grid.mul_(codes.scales.view(torch.float32)[:, None]).add_(codes.offset.view(torch.float32))
    return held[:blocks]


def quantize_nf4(weight: Tensor) -> Nf4Codes:
    """Codes of a finite matrix (out, in) of any floating type, contiguous or not.

    Peak memory is the codes and about 20 MB, whatever the matrix's size.

    Raises:
        ValueError: it holds NaN or inf.
    """
    blocks = -(-weight.numel() // BLOCK)
    packed = torch.empty(blocks, BLOCK // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    levels = torch.tensor(LEVELS)
    borders = ((levels[:-1] + levels[1:]) / 2).tolist()
    at = 0
    for some in _in_blocks(weight):
        here = slice(at, at + len(some))
        torch.amax(some.abs(), dim=1, out=absmax[here])
        some.mul_(absmax[here].clamp(min=1e-38).reciprocal_()[:, None]).clamp_(-1, 1)
        # how many borders lie below; in fp32, where comparing is vectorised
        above, count = torch.empty_like(some), torch.zeros_like(some)
        for border in borders:
            count += torch.gt(some, border, out=above)
        level = count.to(torch.uint8)
        packed[here] = (level[:, ::2] << 4) | level[:, 1::2]
        at = here.stop
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("NaN or inf")
    offset = absmax.mean().view(1)
    nested, scales = _quantize_scales(absmax - offset)
    return Nf4Codes(
        packed.view(-1),
        nested,
        scales.view(torch.int32),
        offset.view(torch.int32),
        (weight.shape[0], weight.shape[1]),
    )


def reference_nf4(codes: Nf4Codes, dtype: torch.dtype) -> Tensor:
    """The plain meaning of `Nf4Codes.unpack` for the whole matrix, for tests."""
    levels = torch.tensor(LEVELS)
    places = torch.stack([codes.packed >> 4, codes.packed & 15], dim=1).view(-1, BLOCK).long()
    group = torch.arange(len(codes.absmax)) // NESTED
    scale = dynamic_map(torch.device("cpu"))[codes.absmax.long()]
    scale = scale * codes.scales.view(torch.float32)[group] + codes.offset.view(torch.float32)
    flat = (levels[places] * scale[:, None]).view(-1)
    return flat[: codes.shape[0] * codes.shape[1]].view(codes.shape).to(dtype)


def _in_blocks(weight: Tensor) -> Iterator[Tensor]:
    """The weights in fp32 as (k, 64), some rows at a time, zeros after the last one."""
    rows, width = weight.shape
    whole = BLOCK // gcd(width, BLOCK)  # rows that fill whole blocks
    step = max(1, CHUNK // width // whole) * whole
    for begin in range(0, rows, step):
        flat = weight[begin : begin + step].to(torch.float32, copy=True).reshape(-1)
        if flat.numel() % BLOCK:
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
        yield flat.view(-1, BLOCK)


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) fp32 → places in the dynamic map (B,) and the scales of their groups."""
    groups = -(-len(values) // NESTED)
    padded = torch.nn.functional.pad(values, (0, groups * NESTED - len(values)))
    grid = padded.view(groups, NESTED)
    scales = grid.abs().amax(dim=1)
    table = dynamic_map(values.device)
    scaled = (grid * scales.reciprocal()[:, None]).nan_to_num_(0.0).clamp_(-1, 1)
    # bitsandbytes looks the nearest place up by sixteen bits (0.50, on a CPU)
    scaled = ((scaled + 1) * 0.5 * 65535 + 0.5).to(torch.int32) / 65535 * 2 - 1
    right = torch.searchsorted(table, scaled).clamp_(1, len(table) - 1)
    left = right - 1
    nearer = (table[right] - scaled).abs() < (scaled - table[left]).abs()
    places = torch.where(nearer, right, left).to(torch.uint8)
    return places.view(-1)[: len(values)].clone(), scales


@lru_cache(maxsize=4)
def dynamic_map(device: torch.device) -> Tensor:
    """(256,) ascending fp32: the eight-bit type with a moving exponent.

    (Dettmers 2015, arXiv:1511.04561.) Seven powers of ten, the larger the finer their fractions.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@lru_cache(maxsize=4)
def _levels(device: torch.device) -> Tensor:
    """(16,) fp32."""
    return torch.tensor(LEVELS).to(device)


@lru_cache(maxsize=4)
def _pairs(device: torch.device) -> Tensor:
    """(256,): the two fp32 levels of each byte as the eight bytes of one element."""
    levels = torch.tensor(LEVELS, dtype=torch.float32)
    byte = torch.arange(256)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return pairs.view(torch.float64).view(-1).to(device)
