"""Whether a chat template writes what a conversation holds: system and tool turns, calls, tools.

Asked once for conversations alike, by rendering them with marks. Knows no template's text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tsugiki.data.files import parse
from tsugiki.data.row import Message, RowProblem

MARKER = "zxqj"
LEFT_OUT = "the chat template leaves out"
BESIDE = f"{LEFT_OUT} the text beside a tool call"
UNREADABLE = "the chat template writes the arguments of tool calls otherwise than as JSON"

Render = Callable[[Sequence[Message], bool, Sequence[Any] | None], str]


class Written:
    """One template's habits.

    Args:
        render: (messages, whether an answer comes next, tools) → text; raises RowProblem.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._known: dict[object, bool] = {}
        self._lost: dict[object, str | None] = {}

    def lost(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> str | None:
        """What it does not print, for people: a turn that is no answer, what is said beside a call,
        or a call's arguments; None where all is there. A template that refuses the marks is
        believed.
        """
        if all(m.role in ("user", "assistant") and not m.calls for m in messages):
            return None
        kinds = tuple(
            (m.role, bool(m.content.strip()), _kinds(m), tuple(key for key, _ in m.extra))
            for m in messages
        )
        known = (kinds, bool(tools))
        if known not in self._lost:
            self._lost[known] = self._find_lost(messages, tools)
        return self._lost[known]

    def _find_lost(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> str | None:
        marks: dict[str, str] = {}  # mark → what is lost without it
        marked = []
        for i, message in enumerate(messages):
            ours = message.role in ("user", "assistant") and not message.calls
            if message.content.strip() and not ours:
                mark = f"{MARKER}{i}x"
                marks[mark] = BESIDE if message.calls else f"{LEFT_OUT} the {message.role} turn"
                message = replace(message, content=mark)
            marked.append(message.with_calls([_marked(call) for call in message.calls]))
        try:
            text = self._render(marked, marked[-1].role != "assistant", tools).lower()
        except RowProblem:
            return None  # it reads what the turn says; then it will print it too
        if f"'{MARKER}'" in text or f'\\"{MARKER}' in text:
            return UNREADABLE
        return next((what for mark, what in marks.items() if mark not in text), None)

    def calls(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> bool:
        """Whether it prints the tool calls of the last of these turns."""
        last = messages[-1]
        if not last.calls:
            return True
        known = ("calls", bool(last.content.strip()), bool(tools))
        if known not in self._known:
            marked = last.with_calls([_renamed(call) for call in last.calls])
            try:
                text = self._render([*messages[:-1], marked], False, tools)
            except RowProblem:
                return True
            self._known[known] = MARKER in text.lower()
        return self._known[known]

    def tools(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> bool:
        """Whether a prompt differs by the tools."""
        if not tools:
            return True
        if "tools" not in self._known:
            try:
                with_them = self._render(messages, True, tools)
                self._known["tools"] = with_them != self._render(messages, True, None)
            except RowProblem:
                return True
        return self._known["tools"]


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a function that is called MARKER."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": {**inner, "name": MARKER}}
    return {**call, "name": MARKER}


def _marked(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose only argument is called MARKER, as object or text as before."""
    inner = call.get("function")
    kind = _kind(inner)
    if not isinstance(inner, dict) or kind not in ("dict", "str"):
        return call
    held = {MARKER: 1}
    return {
        **call,
        "function": {**inner, "arguments": held if kind == "dict" else json.dumps(held)},
    }


def _kinds(message: Message) -> tuple[str, ...]:
    """How each call holds its arguments."""
    return tuple(_kind(call.get("function")) for call in message.calls)


def _kind(function: Any) -> str:
    """dict, or str where a text holds an object as JSON; else none."""
    held = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(held, str):
        try:
            return "str" if isinstance(parse(held), dict) else "none"
        except ValueError:
            return "none"
    return "dict" if isinstance(held, dict) and held else "none"
