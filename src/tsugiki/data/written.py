"""Whether a chat template writes what a conversation holds: system turns, tool calls, tools.

Asked once for conversations alike, by rendering them with marks. Knows no template's text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tsugiki.data.row import Message, RowProblem

MARKER = "zxqj"

Render = Callable[[Sequence[Message], bool, Sequence[Any] | None], str]


class Written:
    """One template's habits.

    Args:
        render: (messages, whether an answer comes next, tools) → text; raises RowProblem.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._known: dict[object, bool] = {}

    def system(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> bool:
        """Whether it prints every system turn; a template that refuses the marks is believed."""
        roles = tuple((m.role, bool(m.content.strip())) for m in messages)
        if ("system", True) not in roles:
            return True
        marks = {i: f"{MARKER}{i}x" for i, role in enumerate(roles) if role == ("system", True)}
        marked = [replace(m, content=marks[i]) if i in marks else m for i, m in enumerate(messages)]
        return self._holds((roles, bool(tools)), marked, tools, tuple(marks.values()))

    def calls(self, messages: tuple[Message, ...], tools: Sequence[Any] | None) -> bool:
        """Whether it prints the tool calls of the last of these turns."""
        last = messages[-1]
        called = dict(last.extra).get("tool_calls")
        if not called:
            return True
        marked = [_renamed(call) for call in called]
        extra = tuple((k, marked if k == "tool_calls" else v) for k, v in last.extra)
        known = ("calls", bool(last.content.strip()), bool(tools))
        return self._holds(known, [*messages[:-1], replace(last, extra=extra)], tools, (MARKER,))

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

    def _holds(
        self, known: object, marked: Sequence[Message], tools: Sequence[Any] | None,
        marks: tuple[str, ...],
    ) -> bool:  # fmt: skip
        if known not in self._known:
            try:
                text = self._render(marked, marked[-1].role != "assistant", tools).lower()
            except RowProblem:
                return True  # it reads what the turn says; then it will print it too
            self._known[known] = all(mark in text for mark in marks)
        return self._known[known]


def _renamed(call: Any) -> Any:
    """A call of a function that is called MARKER."""
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": {**inner, "name": MARKER}}
    return {**call, "name": MARKER}
