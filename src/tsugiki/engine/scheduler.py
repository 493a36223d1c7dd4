"""Decides which tokens of which requests the next forward computes, and in which slot.

Running requests decode first, one token each; the rest of the token budget goes to prompts in the
order they came, in chunks. A slot keeps the tokens of its last request, so that the next turn of a
conversation computes only what is new. Knows no torch, no text and no sampling.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field


@dataclass
class Sequence:
    """One request on its way: ids are prompt and answer so far; `done` of them are cached."""

    number: int
    ids: list[int]
    adapter: int
    prompt: int
    slot: int = -1
    done: int = 0
    reused: int = 0

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.ids) - self.done


@dataclass(frozen=True)
class Work:
    """`count` tokens of a sequence from its `start` on, in the next forward."""

    sequence: Sequence
    start: int
    count: int

    @property
    def tokens(self) -> list[int]:
        """Their ids."""
        return self.sequence.ids[self.start : self.start + self.count]

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be chosen after this."""
        return self.start + self.count == len(self.sequence.ids)


@dataclass
class Slot:
    """Tokens whose keys and values a slot holds, and for which adapter they were computed."""

    tokens: list[int] = field(default_factory=list)
    adapter: int = -1
    used: int = 0
    free: bool = True


class Scheduler:
    """Slots, a queue, and a token budget.

    Args:
        slots: most requests that run at once.
        token_budget: most tokens in one forward; decoding may use all of it, so it is at least
            one more than `slots` and prompts never starve.
        can_cut: whether a slot can be cut back to a shorter prefix; else a prefix is reused only
            where it is everything that the slot holds.
    """

    def __init__(self, slots: int, token_budget: int, can_cut: bool = True) -> None:
        assert slots >= 1
        self.token_budget = max(token_budget, slots + 1)
        self.can_cut = can_cut
        self.slots = [Slot() for _ in range(slots)]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._clock = 0

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def plan(self) -> list[Work]:
        """What the next forward computes: decodes by slot, then prompts; empty when idle."""
        self._admit()
        decoding = [s for s in self.running if s.pending == 1]
        decoding.sort(key=lambda s: s.slot)
        work = [Work(s, s.done, 1) for s in decoding]
        left = self.token_budget - len(work)
        for sequence in self.running:  # in order of arrival
            if sequence.pending > 1 and left > 0:
                count = min(sequence.pending, left)
                work.append(Work(sequence, sequence.done, count))
                left -= count
        return work

    def commit(self, work: Items[Work]) -> None:
        """The forward went through: its tokens are cached. Until then nothing has changed."""
        for item in work:
            item.sequence.done = item.start + item.count
            self.slots[item.sequence.slot].tokens[item.start :] = item.tokens

    def remove(self, sequence: Sequence) -> None:
        """A request ended or was cancelled; its slot is free and remembers what it holds."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._clock += 1
        slot = self.slots[sequence.slot]
        slot.free, slot.used = True, self._clock

    def forget(self) -> None:
        """Free slots hold nothing any more (the weights have changed)."""
        for slot in self.slots:
            if slot.free:
                slot.tokens = []

    def _admit(self) -> None:
        while self.waiting and any(slot.free for slot in self.slots):
            sequence = self.waiting.popleft()
            best = max(
                (index for index, slot in enumerate(self.slots) if slot.free),
                key=lambda index: (
                    self._gain(index, sequence),
                    -self.slots[index].used,
                    -index,
                ),
            )
            slot = self.slots[best]
            kept = self._reusable(best, sequence)
            slot.tokens = slot.tokens[:kept]
            slot.adapter, slot.free = sequence.adapter, False
            sequence.slot, sequence.done, sequence.reused = best, kept, kept
            self.running.append(sequence)

    def _gain(self, index: int, sequence: Sequence) -> int:
        """What speaks for a slot: a prefix, unless most of another conversation would be lost."""
        same = self._reusable(index, sequence)
        return same if 2 * same >= len(self.slots[index].tokens) else 0

    def _reusable(self, index: int, sequence: Sequence) -> int:
        """Tokens at the start of a request that a slot holds; the last is always computed anew."""
        slot = self.slots[index]
        if slot.adapter != sequence.adapter:
            return 0
        most = min(len(slot.tokens), len(sequence.ids) - 1)
        same = 0
        while same < most and slot.tokens[same] == sequence.ids[same]:
            same += 1
        return same if self.can_cut or same == len(slot.tokens) else 0
