"""From records to conversations: detects how people wrote their rows, and makes them uniform.

Layouts: messages (OpenAI), ShareGPT, alpaca, prompt/completion, question/answer, text; any other by
`--columns` or templates. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.data.columns import given_templates, propose
from tsugiki.data.files import (
    NOT_UTF8,
    Record,
    Skipped,
    parse,
    read_records,
    reasons,
)
from tsugiki.data.named import ROW_SUFFIXES, data_files
from tsugiki.data.row import (
    Message,
    Row,
    RowProblem,
    answer_of,
    column_names,
    pair,
    raw_text,
    text_of,
)
from tsugiki.data.unreadable import to_utf8
from tsugiki.errors import DataError
from tsugiki.files import sha256_file

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip

PAIRS: dict[str, tuple[str, str]] = {
    "prompt/completion": ("prompt", "completion"),
    "prompt/response": ("prompt", "response"),
    "prompt/answer": ("prompt", "answer"),
    "question/answer": ("question", "answer"),
    "instruction/response": ("instruction", "response"),
    "input/output": ("input", "output"),
}


@dataclass(frozen=True)
class Rows:
    """What a file or folder gave: rows, skipped ones, the layout seen, the files' digest."""

    rows: list[Row]
    skipped: list[Skipped]
    layout: str
    files: tuple[str, ...]
    fingerprint: str
    seen: int = field(default=0)
    notes: tuple[str, ...] = ()


def read_rows(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    answer_template: str | None = None,
    strict: bool = False,
) -> Rows:
    """Read every row of a file or folder.

    Args:
        columns: {'prompt': 'question', 'answer': 'choice[label]'}.
        prompt_template, answer_template: texts with {column} or {choice[label]} in them.
        strict: the first row that would be skipped is an error.

    Raises:
        DataError: nothing readable; a layout that is not known (columns seen and a command are
            told); with `strict`, the first bad row.
    """
    files = data_files(path)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    layouts: Counter[str] = Counter()
    unknown: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    layout: str | None = None
    given = given_templates(columns or {}, prompt_template, answer_template)
    seen = 0
    for file in files:
        layout = None
        for record in _readable(file, alone=len(files) == 1):
            seen += 1
            if isinstance(record, Skipped):
                _skip(record, skipped, strict)
                continue
            first = first or record.value
            if given is None and layout is None:
                layout = detect(record.value)
                if layout is None:
                    unknown = unknown or record.value
                    _skip(Skipped(record.source, _unknown(record.value)), skipped, strict)
                    continue
            name = "columns" if given is not None else (layout or "")
            try:
                rows.append(given.row(record) if given is not None else _by_layout(record, name))
                layouts[name] += 1
            except RowProblem as problem:
                _skip(Skipped(record.source, str(problem)), skipped, strict)
    if not rows:
        if given is not None and first is not None:
            given.refuse_misspelt(path, first)
        _nothing(path, skipped, unknown)
    notes = []
    if path.is_dir() and files[0].suffix.lower() in ROW_SUFFIXES:
        texts = sum(1 for p in path.rglob("*") if p.suffix.lower() in (".txt", ".md"))
        if texts:
            notes.append(f"{texts} text files beside the rows are not trained on")
    digest = hashlib.sha256("".join(sha256_file(f) for f in files).encode()).hexdigest()
    shown = " + ".join(name for name, _ in layouts.most_common())
    return Rows(rows, skipped, shown, tuple(str(f) for f in files), digest, seen, tuple(notes))


def _readable(file: Path, *, alone: bool) -> Iterator[Record | Skipped]:
    """Its records; in a folder, a file that cannot be read as a whole is skipped like a row."""
    try:
        yield from read_records(file)
    except DataError as error:
        if alone:
            raise
        said = " ".join(str(error.problem).split()).removeprefix(str(file)).lstrip(": ")
        yield Skipped(str(file), said)


def detect(value: Mapping[str, Any]) -> str | None:
    """The layout of one record by its columns, or None."""
    if isinstance(value.get("messages"), list):
        return "messages"
    if isinstance(value.get("conversations"), list):
        return "sharegpt"
    if "instruction" in value and "output" in value:
        return "alpaca"
    for name, (prompt, answer) in PAIRS.items():
        if prompt in value and answer in value:
            return name
    return "text" if "text" in value else None


def _by_layout(record: Record, layout: str) -> Row:
    value = record.value
    if layout in ("messages", "sharegpt"):
        key = "messages" if layout == "messages" else "conversations"
        if not isinstance(value.get(key), list):
            raise RowProblem(f"no list {key!r}, as the rows before it have ({column_names(value)})")
        messages = tuple(_message(item, i) for i, item in enumerate(value[key], 1))
        if not messages:
            raise RowProblem("no turns")
        if layout == "sharegpt" and isinstance(value.get("system"), str) and value["system"]:
            messages = (Message("system", value["system"]), *messages)
        tools = value.get("tools")
        if isinstance(tools, str) and tools.strip():  # as some data sets store them
            try:
                tools = parse(tools)
            except ValueError as error:
                raise RowProblem(f"the column 'tools' is {error}") from None
        if isinstance(tools, list) and not all(isinstance(tool, dict) for tool in tools):
            raise RowProblem("the column 'tools' is not a list of objects")
        return Row(messages, None, record.source, tuple(tools) if isinstance(tools, list) else None)
    if layout == "alpaca":
        prompt = text_of(value, "instruction")
        extra = value.get("input")
        if extra not in (None, "") and not isinstance(extra, str):
            raise RowProblem("the column 'input' is not a text")
        system = value.get("system")
        parts = [Message("user", f"{prompt}\n{extra}" if extra else prompt)]
        if isinstance(system, str) and system:
            parts.insert(0, Message("system", system))
        answer = Message("assistant", answer_of(text_of(value, "output")))
        kept = (("instruction", prompt), ("input", extra or ""))
        parts[-1] = Message("user", parts[-1].content, kept)
        return Row((*parts, answer), None, record.source, instruction=True)
    if layout == "text":
        if not isinstance(value.get("text"), str | None):
            raise RowProblem("the column 'text' is not a text")
        return raw_text(text_of(value, "text"), record.source)
    prompt_key, answer_key = PAIRS[layout]
    turns = value.get(prompt_key)
    if isinstance(turns, list) and all(
        isinstance(turn, dict) for turn in turns
    ):  # prompts and completions given as turns
        both = [*turns, *_as_list(value.get(answer_key))]
        return Row(tuple(_message(m, i) for i, m in enumerate(both, 1)), None, record.source)
    return pair(
        text_of(value, prompt_key), text_of(value, answer_key), value.get("system"), record.source
    )


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem("the prompt is a list of turns and the answer is not")
    return value


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(f"turn {number} is not an object")
    role = item.get("role", item.get("from"))
    if role is None:
        raise RowProblem(f"turn {number} has no role ({column_names(item)})")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowProblem(f"turn {number}: unknown role {str(role)[:40]!r}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # OpenAI's text parts
        kinds = {p.get("type") if isinstance(p, dict) else None for p in content}
        if kinds != {"text"}:
            raise RowProblem(f"turn {number}: only text parts are supported")
        content = "".join(str(p.get("text", "")) for p in content)
    calls = item.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowProblem(f"turn {number}: 'tool_calls' is not a list of objects")
    extra = tuple((k, item[k]) for k in ("tool_calls", "name", "tool_call_id") if item.get(k))
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise RowProblem(f"turn {number} has no text")
    if ROLES[role.lower()] == "assistant" and not content.strip() and not extra:
        raise RowProblem(f"turn {number}: the answer is empty")
    return Message(ROLES[role.lower()], content, extra)


def _unknown(value: Mapping[str, Any]) -> str:
    return f"layout not known ({column_names(value)})"


def _skip(skip: Skipped, skipped: list[Skipped], strict: bool) -> None:
    if strict:
        raise DataError(f"{skip.source}: {skip.reason}", fix="mend the row, or leave --strict out")
    skipped.append(skip)


def _nothing(path: Path, skipped: list[Skipped], unknown: dict[str, Any] | None) -> None:
    if unknown is not None:
        flags = propose(unknown)
        raise DataError(
            f"{path}: the layout of these rows is not known",
            got=column_names(unknown),
            allowed="messages; conversations; instruction/input/output; prompt/completion; "
            "question/answer; text",
            fix=None if flags else "make each row an object with a prompt and an answer, as texts",
            flags=flags,
        )
    alike = bool(skipped) and all(NOT_UTF8 in skip.reason for skip in skipped)
    raise DataError(
        f"{path}: no row can be used",
        got=reasons(skipped) or "no rows",
        fix=to_utf8(path) if alike and path.is_file() else "mend these rows, or give others",
    )
