"""A conversation in forms that more chat templates take, the least changed first, each named.

Knows no template: which form one takes is found by rendering (`chat.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tsugiki.data.row import Message, RowProblem

FOLDED = "system turn put into the first user turn"
JOINED = "turns of one role joined"
ENDED = "stop token that an answer ended with taken off"
UNASKED = "opening answer that nothing asked for left out"

Messages = tuple[Message, ...]


def forms(messages: Messages) -> Iterator[tuple[Messages, tuple[str, ...]]]:
    """Each form once, with the names of what was done."""
    asked = _asked(messages)
    began = () if asked == messages else (UNASKED,)
    folded = _fold_system(asked)
    told: list[Messages] = []
    for form, names in (
        (asked, began),
        (folded, (*began, FOLDED)),
        (_join_turns(asked), (*began, JOINED)),
        (_join_turns(folded), (*began, FOLDED, JOINED)),
    ):
        if form not in told:
            told.append(form)
            yield form, names


def _asked(messages: Messages) -> Messages:
    """From the first turn on that is no answer, if any is left."""
    asked = next((i for i, m in enumerate(messages) if m.role != "assistant"), 0)
    return messages[asked:]


def _fold_system(messages: Messages) -> Messages:
    """As it is where no user turn could hold the system's text."""
    system = "\n\n".join(m.content for m in messages if m.role == "system")
    rest = [m for m in messages if m.role != "system"]
    for i, message in enumerate(rest):
        if system and message.role == "user":
            rest[i] = Message("user", f"{system}\n\n{message.content}", message.extra)
            break
    else:
        return tuple(rest) if not system.strip() and rest else messages
    return tuple(rest)


def _join_turns(messages: Messages) -> Messages:
    out: list[Message] = []
    for message in messages:
        alike = out and (out[-1].role, out[-1].trained) == (message.role, message.trained)
        extra = _both(out[-1], message) if alike else None
        if alike and message.role in ("user", "assistant") and extra is not None:
            said = [m.content for m in (out[-1], message) if m.content]
            out[-1] = Message(message.role, "\n\n".join(said), extra, message.trained)
        else:
            out.append(message)
    return tuple(out)


def _both(one: Message, two: Message) -> tuple[tuple[str, Any], ...] | None:
    """What two answers hold beside their text, calls after one another; None where it would not fit
    into one. What a question holds beside it are its own parts, which the joined text has."""
    if one.role != "assistant":
        return ()
    found = dict(one.extra)
    for key, value in two.extra:
        if key == "tool_calls":
            found[key] = [*found.get(key, []), *value]
        elif found.setdefault(key, value) != value:
            return None
    return tuple(found.items())


def unended(
    messages: Messages, answers: Sequence[int], stops: Sequence[str]
) -> tuple[Messages, int]:
    """Answers that end by a stop token, as in rows rendered before, without it; how many.

    Raises:
        RowProblem: a stop token before an answer's end, where chat would stop.
    """
    found = list(messages)
    count = 0
    for i in answers:
        said = messages[i].content
        while ended := next((s for s in stops if said.rstrip().endswith(s)), ""):
            said = said.rstrip().removesuffix(ended)
        inside = next((s for s in stops if s in said), None)
        if inside is not None:
            raise RowProblem(f"turn {i + 1}: {inside} before the answer's end")
        if said != messages[i].content:
            found[i] = replace(messages[i], content=said)
            count += 1
    return tuple(found), count
