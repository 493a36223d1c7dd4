"""One turn of a conversation as people store it → a message, and which answers are trained.

OpenAI's, ShareGPT's and Google's keys, LLaMA-Factory's function calls. Knows no rows and no
tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tsugiki.data.files import parse
from tsugiki.data.row import CALLS, THOUGHTS, Message, RowProblem, answer_of, column_names

CALLING = "function_call"  # LLaMA-Factory's role of a turn whose text is the call as JSON
ROLES = {
    "system": "system", "developer": "system", "システム": "system",
    "user": "user", "human": "user", "prompter": "user", "ユーザー": "user", "人": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "ai": "assistant", "アシスタント": "assistant", CALLING: "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
KEPT = (CALLS, "name", "tool_call_id", *THOUGHTS)  # for the chat template
SPEAKERS = ("role", "from", "speaker")  # the first that a turn has
WORDS = ("content", "value", "text", "parts")


def conversation(items: list[Any]) -> tuple[Message, ...]:
    """All turns; what follows the last trained answer is left out where an answer there is not.

    Raises:
        RowProblem: no turns, one that cannot be read, or no answer that is trained.
    """
    messages = tuple(message(item, number) for number, item in enumerate(items, 1))
    if not messages:
        raise RowProblem("no turns")
    answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
    trained = [i for i in answers if messages[i].trained]
    if answers and not trained:
        raise RowProblem("every answer has weight 0: nothing to train on")
    return messages[: trained[-1] + 1] if trained[-1:] != answers[-1:] else messages


def message(item: Any, number: int) -> Message:
    """One turn; raises RowProblem that names it by its number."""
    if not isinstance(item, dict):
        raise RowProblem(f"turn {number} is not an object")
    said = item.get(_first(item, SPEAKERS))
    if said is None:
        raise RowProblem(f"turn {number} has no role ({column_names(item)})")
    name = said.strip().lower() if isinstance(said, str) else ""
    if name not in ROLES:
        raise RowProblem(f"turn {number}: unknown role {str(said)[:40]!r}")
    role = ROLES[name]
    content = item.get(_first(item, WORDS))
    extra = {key: item[key] for key in KEPT if item.get(key)}
    if name == CALLING:
        extra[CALLS], content = _calls(content, number), ""
    elif item.get(CALLING) and not extra.get(CALLS):  # OpenAI's older key
        extra[CALLS] = _calls(item[CALLING], number)
    if isinstance(content, list | dict):
        told = text_of_parts(content) if isinstance(content, list) else None
        if told is None and role == "tool":
            told = json.dumps(content, ensure_ascii=False)
        if told is None:
            raise RowProblem(f"turn {number}: only text parts are supported")
        content = told
    calls = extra.get(CALLS)
    if calls:
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowProblem(f"turn {number}: {CALLS!r} is not a list of objects")
        extra[CALLS] = [_wrapped(call) for call in calls]
    for key in THOUGHTS:
        if not isinstance(extra.get(key, ""), str):
            raise RowProblem(f"turn {number}: {key!r} is not a text")
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise RowProblem(f"turn {number} has no text")
    if role == "assistant" and not content.strip() and not calls:
        raise RowProblem(f"turn {number}: the answer is empty")
    weighs = role == "assistant" and item.get("weight") is not None
    if weighs and item["weight"] not in (0, 1):
        raise RowProblem(f"turn {number}: weight {str(item['weight'])[:40]!r} is neither 0 nor 1")
    return Message(role, content, tuple(extra.items()), not weighs or item["weight"] == 1)


def unread_keys(items: list[Any]) -> list[str]:
    """Keys of turns that hold something and are not read."""
    return [
        str(key)
        for item in items
        if isinstance(item, dict)
        for key, held in item.items()
        if key not in (_first(item, SPEAKERS), _first(item, WORDS), "weight", CALLING, *KEPT)
        and holds(held)
    ]


def is_turn(item: Any) -> bool:
    """Whether it says who speaks, in a word known here, or holds a question and its answer."""
    said = item.get(_first(item, SPEAKERS)) if isinstance(item, dict) else None
    return _is_round(item) or (isinstance(said, str) and said.strip().lower() in ROLES)


def text_of_parts(parts: Any) -> str | None:
    """The text of parts as OpenAI, Google and Amazon have them; None where they are not texts."""
    if isinstance(parts, dict):
        parts = parts.get("parts")
    if not isinstance(parts, list) or not parts or not all(_is_text(part) for part in parts):
        return None
    return "".join(part.get("text", "") for part in parts)


def holds(value: Any) -> bool:
    """Whether a column or key says anything."""
    return value is not None and value not in ("", [], {}, ())


def earlier(pairs: list[Any]) -> tuple[Message, ...]:
    """LLaMA-Factory's history, a list of [question, answer]; raises RowProblem."""
    found = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(t) is str for t in pair)):
            raise RowProblem("the column 'history' is not a list of [question, answer]")
        found += [Message("user", pair[0]), Message("assistant", answer_of(pair[1]))]
    return tuple(found)


def spoken(items: list[Any]) -> list[Any]:
    """Texts alone, as LIMA has them, as a user's and an assistant's in turn, and rounds of input
    and output, as Capybara has them, as two turns each; others as they are."""
    if items and all(_is_round(item) for item in items):
        return [turn for item in items for turn in _round(item)]
    if len(items) < 2 or not all(isinstance(item, str) for item in items):
        return items
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(items)]


def _wrapped(call: dict[str, Any]) -> dict[str, Any]:
    """A call as chat templates read it: {function: {name, arguments}}, the arguments an object.

    OpenAI's files hold them as JSON in a text, which a template would write as a text within JSON.
    """
    if "function" not in call and "name" in call:
        named = {key: call[key] for key in ("name", "arguments") if key in call}
        rest = {key: held for key, held in call.items() if key not in named}
        call = {"type": "function", **rest, "function": named}
    inner = call.get("function")
    if not isinstance(inner, dict) or not isinstance(inner.get("arguments"), str):
        return call
    try:
        held = parse(inner["arguments"])
    except ValueError:
        return call  # no JSON: the template is given the text
    return {**call, "function": {**inner, "arguments": held}} if isinstance(held, dict) else call


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return next((key for key in keys if item.get(key) is not None), keys[0])


def _is_round(item: Any) -> bool:
    keys = item.keys() if isinstance(item, dict) else set()
    return {"input", "output"} <= keys and keys.isdisjoint(SPEAKERS)


def _round(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    asked = {"role": "user", "content": item["input"]}
    answered = {"role": "assistant", "content": item["output"]}
    system = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    return [*system, asked, answered]


def _is_text(part: Any) -> bool:
    """Whether a part is of type text, or has no type and nothing but a text."""
    if not isinstance(part, dict) or not isinstance(part.get("text", ""), str):
        return False
    if part.get("type") is not None:
        return bool(part["type"] == "text")
    return "text" in part and all(key == "text" or not holds(part[key]) for key in part)


def _calls(text: Any, number: int) -> list[dict[str, Any]]:
    """The call, or list of calls, that a turn's text holds, as OpenAI writes them."""
    try:
        held = parse(text) if isinstance(text, str) else text
        return [_call(call) for call in (held if isinstance(held, list) else [held])]
    except ValueError as error:
        raise RowProblem(f"turn {number}: the function call is {error}") from None


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise ValueError("without a name")
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("without an object of arguments")
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
