"""One row made uniform, what may be wrong with it, and how its columns are read as text.

Knows no files, no layouts and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

CALLS = "tool_calls"  # OpenAI's name, and that of chat templates
THOUGHTS = ("reasoning_content", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn; `extra` keeps tool calls and the like for the template.

    trained: false for an answer of weight 0, which is shown and not learnt.
    """

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()
    trained: bool = True

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tools that an answer calls."""
        return list(dict(self.extra).get(CALLS) or [])

    def with_calls(self, calls: list[dict[str, Any]]) -> Message:
        """The same turn with these in their stead."""
        return replace(self, extra=tuple((k, calls if k == CALLS else v) for k, v in self.extra))


@dataclass(frozen=True)
class Row:
    """One row made uniform: a conversation, or raw text (then messages is empty)."""

    messages: tuple[Message, ...]
    text: str | None
    source: str
    tools: tuple[Any, ...] | None = None
    instruction: bool = False  # came as instruction(/input)/output: a fallback template may use it


class RowProblem(Exception):
    """Why one row cannot be used; becomes a `Skipped`, never a traceback."""


def raw_text(text: str, source: str) -> Row:
    """A row of raw text; raises RowProblem where it is empty."""
    if not text.strip():
        raise RowProblem("the text is empty")
    return Row((), text, source)


def pair(
    prompt: str,
    answer: str,
    system: Any,
    source: str,
    *,
    more: str = "",
    history: tuple[Message, ...] = (),
    instruction: bool = False,
) -> Row:
    """One question and its answer; raises RowProblem where either is empty.

    Args:
        more: what the question is about; follows it, and is kept apart for templates and windows.
        history: earlier turns.
    """
    asked = f"{prompt}\n{more}" if more else prompt
    if not asked.strip():
        raise RowProblem("the prompt is empty")
    kept = (("instruction", prompt), ("input", more)) if more or instruction else ()
    first = (Message("system", system),) if isinstance(system, str) and system else ()
    messages = (Message("user", asked, kept), Message("assistant", answer_of(answer)))
    return Row((*first, *history, *messages), None, source, instruction=instruction)


def answer_of(text: str) -> str:
    """The text; raises RowProblem where it is empty."""
    if not text.strip():
        raise RowProblem("the answer is empty")
    return text


def text_of(value: Mapping[str, Any], name: str) -> str:
    """A column's text or number; raises RowProblem where it is missing, null or something else."""
    found = value.get(name)
    if found is None:
        why = f"the column {name!r} is null" if name in value else f"no column {name!r}"
        raise RowProblem(f"{why} ({column_names(value)})")
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise RowProblem(f"the column {name!r} is not a text")
    return str(found)


def column_names(value: Mapping[str, Any]) -> str:
    """The columns of a row, as messages name them."""
    return "columns: " + (", ".join(str(k)[:40] for k in list(value)[:12]) or "none")


def first_question(messages: tuple[Message, ...]) -> str:
    """What the model is asked first: everything before the first answer.

    Two conversations that share any prompt share this one.
    """
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    return "\x1e".join(f"{m.role}\x1f{m.content}" for m in messages[:first])
