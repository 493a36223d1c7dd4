"""The turns of a chat, cut to the context: whole oldest turns go first, and it says how many.

Knows the chat format by its one function from messages to tokens; knows no model and no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tsugiki.data.row import Message, RowProblem
from tsugiki.errors import UsageError


class Formats(Protocol):
    """What is needed of a `ChatFormat`."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Messages to the ids that the model answers."""
        ...


@dataclass(frozen=True)
class Asked:
    """A prompt that fits. dropped: turns (questions with their answers) left out for good."""

    ids: tuple[int, ...]
    dropped: int


class Conversation:
    """Messages so far. The system message, if any, always stays.

    Args:
        context: most tokens the model takes, the answer included.
        room: tokens kept free for an answer; at most a quarter of the context.
    """

    def __init__(self, context: int, room: int, system: str | None = None) -> None:
        self.context = context
        self.room = max(1, min(room, context // 4))
        self._system = [Message("system", system)] if system else []
        self._turns: list[list[Message]] = []

    @property
    def messages(self) -> list[Message]:
        """All that the model still sees."""
        return [*self._system, *(message for turn in self._turns for message in turn)]

    def ask(self, text: str, chat: Formats) -> Asked:
        """Add a question; drop whole oldest turns until it and an answer fit.

        Raises:
            UsageError: the question alone does not fit, or the template refuses it; it is not
                added, and nothing is dropped.
        """
        turns = [*self._turns, [Message("user", text)]]
        limit = self.context - self.room
        for dropped in range(len(turns)):
            kept = turns[dropped:]
            messages = [*self._system, *(message for turn in kept for message in turn)]
            try:
                ids = chat.prompt_ids(messages)
            except RowProblem as problem:
                raise UsageError(f"this turn cannot be put into the template: {problem}") from None
            if len(ids) <= limit:
                self._turns = kept
                return Asked(tuple(ids), dropped)
        raise UsageError(
            f"this message alone takes {len(ids):,} tokens",
            allowed=f"{limit:,}: the context of {self.context:,} less {self.room:,} for the answer",
            fix="shorten it",
        )

    def answer(self, text: str) -> None:
        """The answer to the last question."""
        assert self._turns, "an answer without a question"
        self._turns[-1].append(Message("assistant", text))

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        assert self._turns, "nothing was asked"
        assert len(self._turns[-1]) == 1, "it was answered"
        self._turns.pop()

    def reset(self) -> None:
        """Forget every turn but the system message."""
        self._turns.clear()
