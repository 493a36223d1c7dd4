"""A conversation in forms that more chat templates take, the least changed first, each named.

Knows no template: which form one takes is found by rendering (`chat.py`).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from tsugiki.data.row import CALLS, Message, RowProblem
from tsugiki.data.written import BESIDE, LEFT_OUT, UNREADABLE

FOLDED = "system turn put into a user turn"
TOLD = "tool turn put as a user turn"
ALONE = "text beside a tool call left out"
AS_TEXT = "arguments of tool calls put as text"
NUMBERED = "tool calls numbered"
JOINED = "turns of one role joined"
ENDED = "stop token that an answer ended with taken off"
UNASKED = "opening answer that nothing asked for left out"
REMEDIES: dict[str | None, str] = {
    f"{LEFT_OUT} the system turn": FOLDED,
    f"{LEFT_OUT} the tool turn": TOLD,
    BESIDE: ALONE,
    UNREADABLE: AS_TEXT,
}

Messages = tuple[Message, ...]


def forms(
    messages: Messages, likely: Sequence[str] = ()
) -> Generator[tuple[Messages, tuple[str, ...]], str | None, None]:
    """Each form once, the fewest changes first, with the names of what was done.

    It may be sent what was wrong with a form (`written.py`): then only what helps is added to that.

    Args:
        likely: names of what helped in a conversation of which this is the beginning.
    """
    asked = _asked(messages)
    began = () if asked == messages else (UNASKED,)
    steps = dict([FOLDING, *(step for step in OF_CALLS if step[1](asked) != asked), *LAST])
    waiting = deque([(), tuple(name for name in steps if name in likely)])
    told: list[Messages] = []
    while waiting:
        chosen = waiting.popleft()
        form, names = asked, list(began)
        for name in chosen:
            before, form = form, steps[name](form)
            names += [name] if form != before else []
        if form in told:
            continue
        told.append(form)
        lost = yield form, tuple(dict.fromkeys(names))
        helps = [REMEDIES[lost]] if lost in REMEDIES else steps
        for name in helps:
            if name in steps and name not in chosen:
                waiting.append(tuple(n for n in steps if n == name or n in chosen))


def _asked(messages: Messages) -> Messages:
    """From the first turn on that is no answer, if any is left."""
    asked = next((i for i, m in enumerate(messages) if m.role != "assistant"), 0)
    return messages[asked:]


def _fold_system(messages: Messages) -> Messages:
    """Each into the user turn that follows, the last into the one before; as it is without any."""
    systems = [i for i, m in enumerate(messages) if m.role == "system" and m.content.strip()]
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    if systems and not users:
        return messages
    said = {i: [messages[i].content] for i in users}
    for i in reversed(systems):
        follows = next((user for user in users if user > i), None)
        if follows is None:
            said[users[-1]].insert(1, messages[i].content)
        else:
            said[follows].insert(0, messages[i].content)
    rest = tuple(
        replace(m, content="\n\n".join(said[i])) if i in said else m
        for i, m in enumerate(messages)
        if m.role != "system"
    )
    return rest or messages


def _tell_results(messages: Messages) -> Messages:
    return tuple(Message("user", m.content) if m.role == "tool" else m for m in messages)


def _calls_alone(messages: Messages) -> Messages:
    return tuple(replace(m, content="") if m.calls and m.content else m for m in messages)


def _arguments_as_text(messages: Messages) -> Messages:
    def put(call: dict[str, Any]) -> dict[str, Any]:
        inner = call.get("function")
        held = inner.get("arguments") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(held, dict):
            return call
        text = json.dumps(held, ensure_ascii=False)
        return {**call, "function": {**inner, "arguments": text}}

    return tuple(m.with_calls([put(c) for c in m.calls]) if m.calls else m for m in messages)


def _number_calls(messages: Messages) -> Messages:
    """Ids of nine letters and digits, as Mistral's templates want them; results name them."""
    out: list[Message] = []
    waiting: list[tuple[str, str]] = []  # ids of calls without a result, as they were and as now
    for i, message in enumerate(messages):
        extra = dict(message.extra)
        if message.calls:
            ids = [f"call{i % 1000:03}{k % 100:02}" for k in range(len(message.calls))]
            waiting = [(str(c.get("id")), new) for c, new in zip(message.calls, ids, strict=True)]
            message = message.with_calls(
                [{**c, "id": new} for c, new in zip(message.calls, ids, strict=True)]
            )
        elif message.role == "tool" and waiting:
            own = str(extra.get("tool_call_id"))
            place = next((n for n, (old, _) in enumerate(waiting) if old == own), 0)
            extra["tool_call_id"] = waiting.pop(place)[1]
            message = replace(message, extra=tuple(extra.items()))
        out.append(message)
    return tuple(out)


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
        if key == CALLS:
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


def up_to_each(
    original: Messages, answers: Sequence[int], stops: Sequence[str]
) -> dict[int, Messages]:
    """Each of these answers of a changed conversation → what the original has up to it.

    Nothing where answers were joined or left out, so that they are not the original's own.
    """
    own = [i for i, m in enumerate(original) if m.role == "assistant"]
    if len(own) != len(answers):
        return {}
    messages, _ = unended(original, own, stops)
    return {i: messages[: n + 1] for i, n in zip(answers, own, strict=True)}


Step = tuple[str, Callable[[Messages], Messages]]
FOLDING: Step = (FOLDED, _fold_system)
OF_CALLS: tuple[Step, ...] = (
    (TOLD, _tell_results),
    (ALONE, _calls_alone),
    (AS_TEXT, _arguments_as_text),
    (NUMBERED, _number_calls),
)
LAST: tuple[Step, ...] = ((UNASKED, _asked), (JOINED, _join_turns))
