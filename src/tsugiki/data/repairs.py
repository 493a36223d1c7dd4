"""A conversation in forms that more chat templates take, the least changed first, each named.

Knows no template: which form one takes is found by rendering (`chat.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from tsugiki.data.row import Message

FOLDED = "system turn put into the first user turn"
JOINED = "turns of one role joined"
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
        if alike and message.role in ("user", "assistant"):
            joined = f"{out[-1].content}\n\n{message.content}"
            out[-1] = Message(message.role, joined, trained=message.trained)
        else:
            out.append(message)
    return tuple(out)
