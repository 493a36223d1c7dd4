"""The order of examples: a seeded shuffle each epoch, cut into optimiser steps; resumable.

The order is a pure function of (seed, epoch), so the position is the whole state. Each example
comes once an epoch; the last step of an epoch may be short. Knows no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tsugiki.data.example import Example
from tsugiki.errors import RunError


@dataclass(frozen=True)
class Step:
    """One optimiser step: its forward passes, and how far the data is read after it."""

    passes: tuple[tuple[Example, ...], ...]
    epoch: float

    @property
    def tokens(self) -> int:
        """All tokens of the step; there is no padding."""
        return sum(len(e.ids) for one in self.passes for e in one)


class Loader:
    """Yields steps without end; the caller counts them.

    Args:
        examples: what to train on.
        micro_batch: rows of one forward pass.
        accumulation: forward passes of one step.
        seed: of the shuffle.
    """

    def __init__(
        self, examples: tuple[Example, ...], *, micro_batch: int, accumulation: int, seed: int
    ) -> None:
        assert examples, "nothing to load"
        self.examples = examples
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.seed = seed
        self.epoch = 0
        self.position = 0

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        order = epoch_order(len(self.examples), self.seed, self.epoch)
        count = self.micro_batch * self.accumulation
        rows = [self.examples[i] for i in order[self.position : self.position + count]]
        self.position += len(rows)
        read = self.epoch + self.position / len(order)
        if self.position >= len(order):
            self.epoch, self.position = self.epoch + 1, 0
        passes = [
            tuple(rows[i : i + self.micro_batch]) for i in range(0, len(rows), self.micro_batch)
        ]
        return Step(tuple(passes), read)

    def state_dict(self) -> dict[str, int]:
        """Where the data is read."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved place.

        Raises:
            RunError: a place that these examples do not have.
        """
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < len(self.examples):
            raise RunError(
                "the saved place does not lie in this data",
                got=f"epoch {epoch}, example {position}",
                allowed=f"examples 0 to {len(self.examples) - 1}",
            )
        self.epoch, self.position = epoch, position


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch (Python's Mersenne Twister: the same on every platform)."""
    order = list(range(count))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order
