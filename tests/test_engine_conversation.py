"""Turns are dropped whole, oldest first, and the count is told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.data.row import Message, RowProblem
from tsugiki.engine.conversation import Conversation
from tsugiki.errors import UsageError


class Words:
    """One token a character and one a turn; refuses a system turn when told to."""

    def __init__(self, system: bool = True) -> None:
        self.system = system

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        if not self.system and messages[0].role == "system":
            raise RowProblem("no system turns")
        return [0] * sum(1 + len(m.content) for m in messages)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 25)), max_size=15), st.booleans())
def test_it_always_fits_and_keeps_the_newest(sizes: list[tuple[int, int]], system: bool) -> None:
    talk = Conversation(context=100, room=25, system="rules" if system else None)
    said: list[tuple[str, str]] = []
    dropped = 0
    for number, (question, answer) in enumerate(sizes):
        text = f"{number:02}" + "q" * question
        asked = talk.ask(text, Words())
        dropped += asked.dropped
        assert len(asked.ids) + 25 <= 100
        talk.answer("a" * answer)
        said += [("user", text), ("assistant", "a" * answer)]
        kept = [(m.role, m.content) for m in talk.messages]
        assert kept == [("system", "rules")] * system + said[2 * dropped :]
        if asked.dropped:
            one_more = said[2 * dropped - 2 : -1]
            total = sum(1 + len(t) for _, t in one_more) + 6 * system
            assert total > 75, "a turn was dropped that would have fitted"


def test_a_question_too_long_changes_nothing() -> None:
    talk = Conversation(context=40, room=100)
    assert talk.room == 10
    talk.ask("first", Words())
    talk.answer("yes")
    before = talk.messages
    with pytest.raises(UsageError, match="41 tokens"):
        talk.ask("x" * 40, Words())
    assert talk.messages == before


def test_what_the_template_refuses_is_told() -> None:
    talk = Conversation(context=40, room=4, system="rules")
    with pytest.raises(UsageError, match="no system turns"):
        talk.ask("hello", Words(system=False))
    assert [m.role for m in talk.messages] == ["system"]


def test_take_back_and_reset() -> None:
    talk = Conversation(context=40, room=4, system="rules")
    talk.ask("one", Words())
    talk.take_back()
    assert len(talk.messages) == 1
    talk.ask("two", Words())
    talk.answer("2")
    talk.reset()
    assert [m.content for m in talk.messages] == ["rules"]
