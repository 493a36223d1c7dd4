"""Who this process is among those that train together: rank 0 of 1 when alone.

Read from torch.distributed, which the launcher (torchrun) has begun or not. Every rank holds all
weights; passes are shared out, and losses, labels and gradients are summed, so that N ranks of k
passes do the step of one process with N·k passes. Only rank 0 writes. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and where tensors to be exchanged must lie."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, passes: Sequence[T]) -> Sequence[T]:
        """This rank's part of a step's forward passes; may be empty at an epoch's end."""
        return passes[self.rank :: self.world]

    def sum(self, value: float) -> float:
        """Sum over ranks, in fp64."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def gather(self, value: Tensor) -> list[Tensor]:
        """Each rank's tensor (same shape and type), on the CPU, in order."""
        if self.world == 1:
            return [value]
        here = value.to(self.device)
        found = [torch.empty_like(here) for _ in range(self.world)]
        dist.all_gather(found, here)
        return [one.cpu() for one in found]

    def sum_gradients(self, trained: dict[str, nn.Parameter]) -> None:
        """Every parameter's gradient becomes the sum over ranks, in one exchange (fp32)."""
        if self.world == 1:
            return
        parameters = list(trained.values())
        sizes = [p.numel() for p in parameters]
        flat = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).float().reshape(-1)
                for p in parameters
            ]
        )
        dist.all_reduce(flat)
        for parameter, piece in zip(parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def ranks(device: torch.device) -> Ranks:
    """From torch.distributed where a process group has begun; else alone."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks(0, 1, device)
