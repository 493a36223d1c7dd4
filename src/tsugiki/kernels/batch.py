"""What every layer must know of a flat forward: where documents begin and whose rows they are.

Sequences lie end to end in (1, T). Training packs documents this way and the engine batches
requests this way; one `ForwardBatch` reaches the attention of every layer. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class KVCache(Protocol):
    """Where an engine keeps the past of its sequences; owned by that engine."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: ForwardBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q (1, H, T, d), k and v (1, Hkv, T, d) of the new tokens → (1, T, H, d)."""
        ...


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, padded to one: gather (n, L) flat indices, keep (n·L,) real."""

    gather: Tensor
    keep: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Sequences laid end to end.

    lengths: new tokens of each sequence; their sum is T.
    starts: position of each sequence's first new token (all 0 when None).
    kv, slots: where each sequence's past lives, and in which slot (engine only).
    adapters: adapter index of each sequence, -1 for the base; None means adapter 0 everywhere.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...] | None = None
    kv: KVCache | None = None
    slots: tuple[int, ...] | None = None
    adapters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        assert self.lengths
        assert min(self.lengths) > 0, "a sequence without tokens"

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position ids (1, T): each sequence counts from its own start."""
        starts = self.starts or (0,) * len(self.lengths)
        parts = [torch.arange(s, s + n) for s, n in zip(starts, self.lengths, strict=True)]
        return torch.cat(parts)[None].to(device)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence begins in the flat row."""
        out, at = [], 0
        for length in self.lengths:
            out.append(at)
            at += length
        return tuple(out)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Documents grouped by length so that at most a quarter of each group is padding.

        Padding stands after a document's end, where causal attention never looks, so no mask is
        needed. Computed once and used by every layer.
        """
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        groups: list[list[int]] = []
        real = 0
        for index in order:
            length = self.lengths[index]
            if groups:
                longest = self.lengths[groups[-1][0]]
                if (real + length) >= 0.75 * longest * (len(groups[-1]) + 1):
                    groups[-1].append(index)
                    real += length
                    continue
            groups.append([index])
            real = length
        return tuple(self._bucket(group) for group in groups)

    def buckets_on(self, device: torch.device) -> tuple[Bucket, ...]:
        """`buckets` with their indices on a device; moved once."""
        if device.type == "cpu":
            return self.buckets
        if device not in self._moved:
            self._moved[device] = tuple(
                Bucket(
                    b.gather.to(device),
                    None if b.keep is None else b.keep.to(device),
                    b.target.to(device),
                )
                for b in self.buckets
            )
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, tuple[Bucket, ...]]:
        return {}

    def _bucket(self, group: list[int]) -> Bucket:
        longest = self.lengths[group[0]]
        steps = torch.arange(longest)
        begins = torch.tensor([self.offsets[i] for i in group])
        lengths = torch.tensor([self.lengths[i] for i in group])
        inside = steps[None] < lengths[:, None]
        gather = begins[:, None] + torch.minimum(steps[None], lengths[:, None] - 1)
        if bool(inside.all()):
            return Bucket(gather, None, gather.reshape(-1))
        keep = inside.reshape(-1).nonzero().squeeze(1)
        return Bucket(gather, keep, gather.reshape(-1)[keep])
