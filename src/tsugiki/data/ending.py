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
CALLED = Message("assistant", "", ((CALLS, [CALL]),))

Render = Callable[[Sequence[Message]], str]
Encode = Callable[[str], list[int]]


def find_stop(render: Render, encode: Encode, added: set[int]) -> int | None:
    """The first added token that the template puts after an answer; None if it puts none."""
    return next(
        (i for i in _after(Message("assistant", MARKER), render, encode) if i in added), None
    )


def find_call_stop(render: Render, encode: Encode, added: set[int], stop: int) -> int:
    """What ends an answer that calls a tool: the same, or a token of its own (gpt-oss)."""
    after = _after(CALLED, render, encode)
    if stop in after:
        return stop
    return next((i for i in reversed(after) if i in added), stop)


def _after(answer: Message, render: Render, encode: Encode) -> list[int]:
    """The tokens that follow the mark of an answer."""
    try:
        text = render((ASKED, answer))
    except RowProblem:
        return []
    return encode(text[text.rindex(MARKER) + len(MARKER) :]) if MARKER in text else []


def continued(text: str, encode: Encode) -> list[int]:
    """The tokens of a text that goes on from another: without the blank that sentencepiece puts
    before a text of its own.
    """
    line = encode("\n")
    both = encode(f"\n{text}")
    return both[len(line) :] if both[: len(line)] == line else encode(text)


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
        said = f"{thought}\n</{name[1]}>\n\n{said}"
    return said + rest.removeprefix(MARKER)
