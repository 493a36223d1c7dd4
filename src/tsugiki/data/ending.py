"""How a chat template ends an answer and opens the next: found by rendering one with a mark.

Knows no conversations and no labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tsugiki.data.row import CALLS, Message, RowProblem
from tsugiki.data.written import MARKER

ASKED = Message("user", "a")
CALL = {"id": "call00001", "type": "function", "function": {"name": MARKER, "arguments": {}}}

Render = Callable[[Sequence[Message]], str]
Encode = Callable[[str], list[int]]


def find_stop(render: Render, encode: Encode, added: set[int]) -> int | None:
    """The first added token that the template puts after an answer; None if it puts none."""
    return next(
        (i for i in _after(Message("assistant", MARKER), render, encode) if i in added), None
    )


def find_call_stop(render: Render, encode: Encode, added: set[int], stop: int) -> int:
    """What ends an answer that calls a tool: the same, or a token of its own (gpt-oss).

    What closes each of two calls is no end of the answer.
    """
    once, twice = (
        _after(Message("assistant", "", ((CALLS, [CALL] * count),)), render, encode)
        for count in (1, 2)
    )
    if stop in once:
        return stop
    ends = (i for i in reversed(once) if i in added and twice.count(i) <= once.count(i))
    return next(ends, stop)


def _after(answer: Message, render: Render, encode: Encode) -> list[int]:
    """The tokens that follow the first mark of an answer."""
    try:
        text = render((ASKED, answer))
    except RowProblem:
        return []
    return encode(text[text.index(MARKER) + len(MARKER) :]) if MARKER in text else []


def continued(text: str, encode: Encode, unknown: int | None) -> list[int]:
    """The tokens of a text that goes on from another: without the blank that sentencepiece puts
    before a text of its own. unknown: the tokenizer's token for what it does not know.
    """
    line = encode("\n")
    both = encode(f"\n{text}")
    usable = line and unknown not in line and both[: len(line)] == line
    return both[len(line) :] if usable else encode(text)


def unopened(before: str, marked: str, thought: str, said: str) -> str | None:
    """An answer and what ends it, for a prompt that opens what the template then drops.

    R1's prompt ends with <think>, and its finished turns have none. A thought follows with its end;
    without one the answer as it is. A tag that the prompt has opened is not said twice.

    Args:
        before: the rendered prompt.
        marked: the conversation rendered with MARKER for the answer.
        thought: the answer's, if it has one.

    Returns:
        None where the two differ by more than how the prompt ends.
    """
    both = zip(before, marked, strict=False)
    shared = next((i for i, (a, b) in enumerate(both) if a != b), min(len(before), len(marked)))
    opened, rest = before[shared:], marked[shared:].lstrip()
    if not rest.startswith(MARKER) or not said.strip():
        return None
    tag = opened.strip()
    if tag and said.lstrip().startswith(tag):
        said = said.lstrip().removeprefix(tag).removeprefix(opened[len(opened.rstrip()) :])
    elif thought and (name := re.fullmatch(r"<(\w+)>", tag)):
        said = f"{thought.strip()}\n</{name[1]}>\n\n{said}"
    return said + rest.removeprefix(MARKER)
