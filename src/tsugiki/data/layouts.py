"""Layouts of rows: which one a record has, and how it becomes a conversation or a text.

Knows one record at a time; no files, no templates and no tokenizer.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from tsugiki.data.files import Record, parse
from tsugiki.data.row import Message, Row, RowProblem, column_names, pair, raw_text, text_of
from tsugiki.data.turns import conversation, earlier, holds, is_turn, spoken, text_of_parts

PAIRS: dict[str, tuple[str, str]] = {
    "alpaca": ("instruction", "output"),
    "prompt/completion": ("prompt", "completion"),
    "prompt/response": ("prompt", "response"),
    "prompt/answer": ("prompt", "answer"),
    "question/answer": ("question", "answer"),
    "instruction/response": ("instruction", "response"),
    "input/output": ("input", "output"),
    "指示/回答": ("指示", "回答"),
    "指示/出力": ("指示", "出力"),
    "質問/回答": ("質問", "回答"),
    "text/output": ("text", "output"),
}
LISTS = {
    "messages": "messages", "sharegpt": "conversations", "conversation": "conversation",
    "dialogue": "dialogue", "dialog": "dialog", "contents": "contents", "data": "data",
}  # fmt: skip
OWN = ("messages", "sharegpt")  # a list of any kind under these names is meant as turns
VAGUE = ("contents", "data")  # names of much else: a text under them is none
MORE = ("input", "context", "入力", "文脈")  # columns that belong to the question and follow it
INPUTS = ("input", "入力")
INSTRUCTIONS = ("instruction", "指示")
SYSTEM = (
    "system", "system_prompt", "system_message", "systemInstruction", "system_instruction",
    "システム",
)  # fmt: skip
OBJECTS = re.compile(r"\s*\[\s*\{")  # a list of objects or of lists as JSON text
PAIRED = re.compile(r"\s*\[\s*\[")
PYTHON_LIMIT = 1 << 20  # characters of a list as Python writes it


def detect(value: Mapping[str, Any]) -> str | None:
    """The layout of one record by its columns, or None."""
    for name in OWN:
        held = value.get(LISTS[name])
        if isinstance(held, list) or (isinstance(held, str) and OBJECTS.match(held)):
            return name
    for name, (prompt, answer) in PAIRS.items():
        if prompt not in value or answer not in value:
            continue
        nested = isinstance(value[answer], list | dict)
        if name != "text/output" or not nested or _alternating(value[prompt], value[answer]):
            return name
    if "text" in value and not is_tree(value):
        return "text"
    for name, column in LISTS.items():
        held = value.get(column)
        if isinstance(held, str) and name not in VAGUE and OBJECTS.match(held):
            return name
        if isinstance(held, list) and (is_turn(next(iter(held), None)) or _alone(value, column)):
            return name
    return None


def _alone(value: Mapping[str, Any], column: str) -> bool:
    """Whether a list of texts in turn is all that a row holds but its number."""
    held = value[column]
    others = [
        k for k, v in value.items() if k != column and not k.lower().endswith("id") and holds(v)
    ]
    return not others and spoken(held) is not held


def is_tree(value: Mapping[str, Any]) -> bool:
    """Whether a row is one message that names its parent, as OpenAssistant's are."""
    return {"message_id", "parent_id", "role"} <= value.keys()


def by_layout(record: Record, layout: str) -> tuple[Row, tuple[str, ...]]:
    """The row, and the columns it is made of: prompt and what joins it first, then the answer.

    Raises:
        RowProblem: a column is missing, empty or of another kind.
    """
    value = record.value
    if layout in LISTS:
        return _listed(record, layout)
    if layout == "text":
        if not isinstance(value.get("text"), str | None):
            raise RowProblem("the column 'text' is not a text")
        return raw_text(text_of(value, "text"), record.source), ("text",)
    judged = value.get("label") if layout == "prompt/completion" else None  # as KTO's rows have it
    if judged is False or (isinstance(judged, str) and judged.lower() == "false"):
        raise RowProblem("'label' is false: the completion is not one to learn")
    row, used = _paired(record, *PAIRS[layout])
    return row, (*used, "label") if judged is True or judged in ("True", "true") else used


def shown(layout: str, used: set[str]) -> str:
    """The layout's name with the columns that joined it, e.g. question + context/answer."""
    prompt, answer = PAIRS.get(layout, ("", ""))
    own = {prompt, answer} | ({"input"} if layout == "alpaca" else set())
    joined = [name for name in (*MORE, "history") if name in used - own]
    if layout not in PAIRS or not joined:
        return layout
    if layout == "alpaca":
        return " + ".join((layout, *joined))
    return " + ".join((prompt, *joined)) + f"/{answer}"


def turns_of(value: Mapping[str, Any], layout: str) -> list[Any]:
    """The list of turns of a record, given as such or as JSON text; raises RowProblem."""
    key = LISTS[layout]
    found = _parsed(value, key, OBJECTS)
    if not isinstance(found, list):
        raise RowProblem(f"no list {key!r}, as the rows before it have ({column_names(value)})")
    return spoken(found)


def _paired(record: Record, prompt: str, answer: str) -> tuple[Row, tuple[str, ...]]:
    value = record.value
    asked, answered = value.get(prompt), value.get(answer)
    turns = _alternating(asked, answered)
    if not turns and isinstance(asked, list) and all(isinstance(turn, dict) for turn in asked):
        if not isinstance(answered, list):
            raise RowProblem("the prompt is a list of turns and the answer is not")
        turns = [*asked, *answered]
    if turns:
        messages, system = _led(conversation(turns), value)
        return Row(messages, None, record.source), (prompt, answer, *system)
    more = _more(value, prompt)
    history = _history(value)
    system_column, system_prompt = _system(value)
    row = pair(
        text_of(value, prompt),
        text_of(value, answer),
        system_prompt,
        record.source,
        more="\n".join(text_of(value, name) for name in more),
        history=history,
        instruction=prompt in INSTRUCTIONS,
    )
    optional = (system_column, "history" if history else "")
    return row, (prompt, *more, answer, *filter(None, optional))


def _listed(record: Record, layout: str) -> tuple[Row, tuple[str, ...]]:
    value = record.value
    messages, system = _led(conversation(turns_of(value, layout)), value)
    name = "tools" if holds(value.get("tools")) else "functions"  # OpenAI's older column
    used = (LISTS[layout], "tools", *([name] if name in value else []), *system)
    tools = _parsed(value, name, re.compile(r"\s*\S"))  # as text in some data sets
    if not isinstance(tools, list):
        return Row(messages, None, record.source), used
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowProblem(f"the column {name!r} is not a list of objects")
    return Row(messages, None, record.source, tuple(_as_tool(tool) for tool in tools)), used


def _as_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chat templates read it: {type: function, function: {name, …}}."""
    bare = "name" in tool and tool.keys().isdisjoint(("type", "function"))
    return {"type": "function", "function": tool} if bare else tool


def _led(
    messages: tuple[Message, ...], value: Mapping[str, Any]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The turns, after a column's system prompt where they have none, and that column."""
    name, text = _system(value)
    if not name or any(turn.role == "system" for turn in messages):
        return messages, ()
    return (Message("system", text), *messages), (name,)


def _system(value: Mapping[str, Any]) -> tuple[str, str]:
    """The column that holds a system prompt and its text; '' twice where none does."""
    for name in SYSTEM:
        held = value.get(name)
        text = held if isinstance(held, str) else text_of_parts(held)
        if text:
            return name, text
    return "", ""


def _alternating(asked: Any, answered: Any) -> list[Any]:
    """Turns of a list of questions and one of as many answers; [] where they are not that."""
    both = isinstance(asked, list) and isinstance(answered, list) and len(asked) == len(answered)
    texts = [text for pair in zip(asked, answered, strict=True) for text in pair] if both else []
    turns = spoken(texts)
    return turns if turns is not texts else []


def _parsed(value: Mapping[str, Any], name: str, like: re.Pattern[str]) -> Any:
    """A column, read as JSON where it is a text that looks `like` it; raises RowProblem."""
    found = value.get(name)
    if not isinstance(found, str) or not like.match(found):
        return found
    try:
        return parse(found)
    except ValueError as error:
        try:
            return _as_python_writes(found)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise RowProblem(f"the column {name!r} is {error}") from None


def _as_python_writes(text: str) -> Any:
    """A value as pandas writes it into a table: Python's literals, of what JSON has too."""
    if len(text) > PYTHON_LIMIT:
        raise ValueError("too long")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in texts
        return parse(json.dumps(ast.literal_eval(text)))


def _more(value: Mapping[str, Any], prompt: str) -> list[str]:
    """Columns that join the question. A context that is no text, as a list, is left out."""
    plain = (str, int, float)
    return [
        name
        for name in MORE
        if name != prompt
        and holds(value.get(name))
        and (name in INPUTS or type(value[name]) in plain)
    ]


def _history(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """Earlier turns as LLaMA-Factory's pairs or as objects; () where the column is neither."""
    found = _parsed(value, "history", PAIRED)
    if not isinstance(found, list) or not found:
        return ()
    if all(isinstance(turn, dict) for turn in found):
        return conversation(found)
    return earlier(found) if any(isinstance(turn, list) for turn in found) else ()
