"""From records to conversations: detects how people wrote their rows, and makes them uniform.

Layouts: messages (OpenAI), ShareGPT, alpaca, prompt/completion, question/answer, text; any other by
`--columns` or templates. Knows no tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.data.files import ROW_SUFFIXES, Record, Skipped, data_files, parse, read_records
from tsugiki.errors import DataError, did_you_mean
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
ASKING = ("question", "prompt", "instruction", "query", "input", "source", "document", "title")
ANSWERING = (
    "answer", "response", "completion", "output", "reply", "target", "summary", "sql", "code",
    "translation",
)  # fmt: skip
FIELD = re.compile(r"\{([^{}\[\]]+)(?:\[([^\[\]]+)\])?\}")


@dataclass(frozen=True)
class Message:
    """One turn; `extra` keeps tool calls and the like for the template."""

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


@dataclass(frozen=True)
class Row:
    """One row made uniform: a conversation, or raw text (then messages is empty)."""

    messages: tuple[Message, ...]
    text: str | None
    source: str
    tools: tuple[Any, ...] | None = None
    instruction: bool = False  # came as instruction(/input)/output: a fallback template may use it


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


class RowProblem(Exception):
    """Why one row cannot be used; becomes a `Skipped`, never a traceback."""


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
    given = _given(columns or {}, prompt_template, answer_template)
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
                rows.append(
                    _by_columns(record, given) if given is not None else _by_layout(record, name)
                )
                layouts[name] += 1
            except RowProblem as problem:
                _skip(Skipped(record.source, str(problem)), skipped, strict)
    if not rows:
        if given is not None and first is not None:
            _refuse_misspelt(path, "".join(filter(None, given)), first)
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
        yield Skipped(str(file), " ".join(str(error.problem).removeprefix(str(file)).split()))


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
            raise RowProblem(f"no list {key!r}, as the rows before it have ({_columns(value)})")
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
        return Row(messages, None, record.source, tuple(tools) if isinstance(tools, list) else None)
    if layout == "alpaca":
        prompt = _text_of(value, "instruction")
        extra = value.get("input")
        if extra not in (None, "") and not isinstance(extra, str):
            raise RowProblem("the column 'input' is not a text")
        system = value.get("system")
        parts = [Message("user", f"{prompt}\n{extra}" if extra else prompt)]
        if isinstance(system, str) and system:
            parts.insert(0, Message("system", system))
        answer = Message("assistant", _answer(_text_of(value, "output")))
        kept = (("instruction", prompt), ("input", extra or ""))
        parts[-1] = Message("user", parts[-1].content, kept)
        return Row((*parts, answer), None, record.source, instruction=True)
    if layout == "text":
        if not isinstance(value.get("text"), str | None):
            raise RowProblem("the column 'text' is not a text")
        text = _text_of(value, "text")
        if not text.strip():
            raise RowProblem("the text is empty")
        return Row((), text, record.source)
    prompt_key, answer_key = PAIRS[layout]
    if isinstance(value.get(prompt_key), list):  # prompts and completions given as turns
        both = [*value[prompt_key], *_as_list(value.get(answer_key))]
        return Row(tuple(_message(m, i) for i, m in enumerate(both, 1)), None, record.source)
    return _pair(
        _text_of(value, prompt_key), _text_of(value, answer_key), value.get("system"), record.source
    )


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem("the prompt is a list of turns and the answer is not")
    return value


def _pair(prompt: str, answer: str, system: Any, source: str) -> Row:
    messages = [Message("user", prompt), Message("assistant", _answer(answer))]
    if isinstance(system, str) and system:
        messages.insert(0, Message("system", system))
    if not prompt.strip():
        raise RowProblem("the prompt is empty")
    return Row(tuple(messages), None, source)


def _answer(text: str) -> str:
    if not text.strip():
        raise RowProblem("the answer is empty")
    return text


def _message(item: Any, number: int) -> Message:
    if not isinstance(item, dict):
        raise RowProblem(f"turn {number} is not an object")
    role = item.get("role", item.get("from"))
    if role is None:
        raise RowProblem(f"turn {number} has no role ({_columns(item)})")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowProblem(f"turn {number}: unknown role {str(role)[:40]!r}")
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # OpenAI's text parts
        kinds = {p.get("type") if isinstance(p, dict) else None for p in content}
        if kinds != {"text"}:
            raise RowProblem(f"turn {number}: only text parts are supported")
        content = "".join(str(p.get("text", "")) for p in content)
    extra = tuple((k, item[k]) for k in ("tool_calls", "name", "tool_call_id") if item.get(k))
    if content is None and extra:
        content = ""
    if not isinstance(content, str):
        raise RowProblem(f"turn {number} has no text")
    if ROLES[role.lower()] == "assistant" and not content.strip() and not extra:
        raise RowProblem(f"turn {number}: the answer is empty")
    return Message(ROLES[role.lower()], content, extra)


def _text_of(value: Mapping[str, Any], name: str) -> str:
    found = value.get(name)
    if found is None:
        why = f"the column {name!r} is null" if name in value else f"no column {name!r}"
        raise RowProblem(f"{why} ({_columns(value)})")
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise RowProblem(f"the column {name!r} is not a text")
    return str(found)


def _given(
    columns: Mapping[str, str], prompt: str | None, answer: str | None
) -> tuple[str, str, str | None] | None:
    if not columns and prompt is None and answer is None:
        return None

    def as_template(text: str) -> str:
        return "{" + text + "}"

    if prompt is None and "prompt" in columns:
        prompt = as_template(columns["prompt"])
    if answer is None and "answer" in columns:
        answer = as_template(columns["answer"])
    if prompt is None or answer is None:
        raise DataError(
            "columns or templates must name both the prompt and the answer",
            got=f"prompt {prompt!r}, answer {answer!r}",
            fix="--columns prompt=question,answer=answer",
        )
    return prompt, answer, as_template(columns["system"]) if "system" in columns else None


def _by_columns(record: Record, given: tuple[str, str, str | None]) -> Row:
    prompt, answer, system = given
    return _pair(
        fill(prompt, record.value),
        fill(answer, record.value),
        fill(system, record.value) if system else None,
        record.source,
    )


def fill(template: str, value: Mapping[str, Any]) -> str:
    """A text with {column} and {list[index]} replaced; the index may be a number or a column.

    Where there is no column `list`, `list` + index names the column: with choice0 … choice4 and
    label, `{choice[label]}` is the right choice.

    Raises:
        RowProblem: a column that is not there, an index outside.
    """

    def one(match: re.Match[str]) -> str:
        name, index = match.group(1).strip(), match.group(2)
        if index is None:
            return _text_of(value, name)
        key = value.get(index.strip(), index.strip())
        if name in value:
            holder = value[name]
            try:
                found = holder[key] if isinstance(holder, dict) else holder[int(key)]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RowProblem(f"{name}[{key}] is not there") from None
            return _text_of({name: found}, name)
        return _text_of(value, f"{name}{key}")

    return FIELD.sub(one, template)


def _columns(value: Mapping[str, Any]) -> str:
    return "columns: " + (", ".join(str(k)[:40] for k in list(value)[:12]) or "none")


def _unknown(value: Mapping[str, Any]) -> str:
    return f"layout not known ({_columns(value)})"


def _skip(skip: Skipped, skipped: list[Skipped], strict: bool) -> None:
    if strict:
        raise DataError(f"{skip.source}: {skip.reason}", fix="mend the row, or leave --strict out")
    skipped.append(skip)


def _refuse_misspelt(path: Path, templates: str, value: Mapping[str, Any]) -> None:
    """Raises DataError: a column that --columns or a template names, and the rows do not have."""
    for name, index in FIELD.findall(templates):
        if not index and name.strip() not in value:
            near = did_you_mean(name.strip(), [str(key) for key in value])
            raise DataError(
                f"{path}: the rows have no column {name.strip()!r}",
                got=_columns(value),
                fix=f"did you mean {near!r}?" if near else "name a column that is there",
            )


def _nothing(path: Path, skipped: list[Skipped], unknown: dict[str, Any] | None) -> None:
    if unknown is not None:
        prompt, answer = _guess(unknown)
        raise DataError(
            f"{path}: the layout of these rows is not known",
            got=_columns(unknown),
            allowed="messages; conversations; instruction/input/output; prompt/completion; "
            "question/answer; text",
            fix=f"tsugiki train {path} --columns 'prompt={prompt},answer={answer}'",
        )
    first_reason = f"{skipped[0].source}: {skipped[0].reason}" if skipped else "no rows"
    raise DataError(
        f"{path}: no row can be used",
        got=f"{len(skipped)} skipped; first: {first_reason}",
        fix=f"tsugiki data check {path}",
    )


def _guess(value: Mapping[str, Any]) -> tuple[str, str]:
    """The columns most likely meant as prompt and answer, for the command that is proposed."""
    plain = [str(k) for k, v in value.items() if isinstance(v, str | int | float)]
    texts = [k for k in plain if isinstance(value.get(k), str)]
    prompt = _near(texts, ASKING) or next(iter(texts or plain), "PROMPT")
    index = _near([k for k in plain if k != prompt], ("label", "answer_idx", "answerkey", "gold"))
    if index is not None:
        for name in value:
            stem = str(name).rstrip("0123456789")
            indexed = isinstance(value[name], list | dict) or f"{stem}{value[index]}" in value
            if indexed and stem not in ("", index):
                return prompt, f"{stem}[{index}]"
    rest = [k for k in texts if k != prompt]
    return prompt, _near(rest, ANSWERING) or (rest[-1] if rest else "ANSWER")


def _near(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((n for w in wanted for n in names if w in n.lower()), None)
