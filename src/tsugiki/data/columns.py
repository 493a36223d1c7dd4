"""Rows of any layout: by named columns, by templates, and the flags to propose for them.

Knows one row at a time; no files and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.data.files import Record
from tsugiki.data.layouts import INPUTS, SYSTEM
from tsugiki.data.row import Row, RowProblem, column_names, pair, raw_text, text_of
from tsugiki.errors import DataError, did_you_mean

ASKING = (
    "question", "prompt", "instruction", "query", "input", "problem", "source", "document",
    "質問", "指示", "問題", "設問", "入力", "原文",
)  # fmt: skip
PLAINLY = ASKING[:5]  # words that say it by themselves: a column of that very name is the one
ANSWERING = (
    "answer", "response", "completion", "output", "reply", "target", "summary", "sql", "code",
    "translation", "chosen", "assistant",
    "回答", "解答", "正解", "答え", "応答", "返答", "出力", "要約", "訳",
)  # fmt: skip
PLAINLY_ANSWERING = ANSWERING[:5]
CLASSES = ("label", "class", "category")  # what texts are sorted by
RATINGS = ("score", "rating")  # answers only where nothing else can be one
THOUGHTS = {
    "reasoning", "thought", "thoughts", "thinking", "cot", "rationale", "solution", "思考", "推論",
}  # fmt: skip
PREFERRED = ("chosen", "rejected")  # pairs of answers, one better than the other
CONTEXT = ("context", "passage", "premise", "文脈")  # what a question is about: never the answer
NUMBERING = re.compile(
    r"(.*[_\- ])?(id|ids|uuid|guid|idx|index|no|number)|q_?id|番号|.*[a-z]Id", re.I
)
BESIDE = re.compile(r"url|date|timestamp|lang|language|model|split|license", re.I)  # of no text
MOST_ASKED = 3  # columns of one prompt that flags are proposed for
FIELD = re.compile(r"\{([^{}\[\]]+)((?:\[[^\[\]]+\])*)\}")
INDEX = re.compile(r"\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Given:
    """Templates of what a row becomes: prompt and answer (and system), or raw text.

    notes: what was read otherwise than it was typed.
    """

    prompt: str = ""
    answer: str = ""
    system: str = ""
    text: str = ""
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> str:
        """All templates, one after the other."""
        return self.prompt + self.answer + self.system + self.text

    def row(self, record: Record) -> Row:
        """Fill the templates; raises RowProblem."""
        value = record.value
        if self.text:
            return raw_text(fill(self.text, value), record.source)
        silent = any(value.get(n.strip(), "") is None for n, _ in FIELD.findall(self.system))
        system = fill(self.system, value) if self.system and not silent else None
        return pair(fill(self.prompt, value), fill(self.answer, value), system, record.source)

    def used(self, value: Mapping[str, Any]) -> set[str]:
        """The columns that the templates read, with those that an index may choose among."""
        found: set[str] = set()
        for name, indices in FIELD.findall(self.whole):
            found |= {name.strip(), (name + indices).strip()}
            found |= {index.strip() for index in INDEX.findall(indices)}
            if indices and name.strip() not in value:
                found |= {str(key) for key in value if str(key).startswith(name.strip())}
        return found

    def refuse_misspelt(self, path: Path, value: Mapping[str, Any]) -> None:
        """Raises DataError: a column that is named here, and the rows do not have."""
        for name, indices in FIELD.findall(self.whole):
            if not indices and name.strip() not in value:
                near = did_you_mean(name.strip(), [str(key) for key in value])
                raise DataError(
                    f"{path}: the rows have no column {name.strip()!r}",
                    got=column_names(value),
                    fix=f"did you mean {near!r}?" if near else "name a column that is there",
                )


def given_templates(
    columns: Mapping[str, str], prompt: str | None, answer: str | None
) -> Given | None:
    """What --columns and the templates ask for; None where nothing was.

    Raises:
        DataError: a prompt without an answer, or the other way round; a template that names no
            column (a prompt may be the same for every row).
    """
    templates = {role: "{" + column + "}" for role, column in columns.items()}
    templates |= {k: v for k, v in (("prompt", prompt), ("answer", answer)) if v is not None}
    if not templates:
        return None
    notes = []
    for role, template in templates.items():  # as a shell hands it over
        if "\\n" in template and "\n" not in template:
            templates[role] = template.replace("\\n", "\n")
            notes.append(f"the two characters \\n in the {role} template are read as a new line")
    if "text" in templates and len(templates) > 1:
        raise DataError(
            "raw text has no prompt, answer or system",
            got=", ".join(f"{role} {template!r}" for role, template in templates.items()),
            fix="--columns text=story",
        )
    if "text" not in templates and not {"prompt", "answer"} <= templates.keys():
        half = {"prompt": "question", "answer": "answer"}
        lacking = [
            f"--{role}-template '{{{half[role]}}}'" for role in half if role not in templates
        ]
        raise DataError(
            "columns or templates must name both the prompt and the answer",
            got=", ".join(f"{role} {templates.get(role)!r}" for role in half),
            fix=f"{lacking[0]} too, with the rows' own columns"
            if len(lacking) == 1 and (prompt or answer)
            else "--columns prompt=question,answer=answer",
        )
    for role, template in templates.items():
        if not FIELD.search(template) and (role == "answer" or set("{}") & set(template)):
            raise DataError(
                f"the {role} template names no column",
                got=template,
                fix=f"put the name of a column in braces: --{role}-template '{{question}}'",
            )
    return Given(**templates, notes=tuple(notes))


def fill(template: str, value: Mapping[str, Any]) -> str:
    """A text with {column} and {list[index]} replaced; the index may be a number or a column.

    Indices follow one another, as in {answers[text][0]}. Where there is no column `list`, `list` +
    index names the column: with choice0 … choice4 and label, `{choice[label]}` is the right choice.

    Raises:
        RowProblem: a column that is not there, an index outside.
    """

    def one(match: re.Match[str]) -> str:
        name, indices = match.group(1).strip(), INDEX.findall(match.group(2))
        whole = match.group(0)[1:-1].strip()
        if not indices or whole in value:
            return text_of(value, whole)
        keys = [value.get(index.strip(), index.strip()) for index in indices]
        if name not in value and len(keys) == 1:
            return text_of(value, f"{name}{keys[0]}")
        found, said = value.get(name), name
        for key in keys:
            said = f"{said}[{key}]"
            try:
                found = _by_label(found, key)
                found = found[key] if isinstance(found, dict) else found[int(key)]
            except (KeyError, IndexError, ValueError, TypeError):
                raise RowProblem(f"{said} is not there") from None
        return text_of({name: found}, name)

    return FIELD.sub(one, template)


def propose(value: Mapping[str, Any]) -> tuple[str, ...]:
    """Flags that read a row of unknown layout, by what its columns are called.

    (): none. No flags are better than some that leave out a part of the question, or learn a wrong
    answer.
    """
    named = {str(k): v for k, v in value.items() if not is_numbering(str(k))}
    named = {k: v for k, v in named.items() if not BESIDE.fullmatch(k)}
    if set(PREFERRED) <= named.keys():
        if not isinstance(named["chosen"], str) or not any(_near([k], PLAINLY) for k in named):
            return ()
        named = {k: v for k, v in named.items() if k == "chosen" or not _near([k], PREFERRED)}
    texts = [k for k, v in named.items() if isinstance(v, str)]
    if len(named) == 1 and texts and not set("{},=") & set(texts[0]):
        return "--columns", f"text={texts[0]}"
    system = next((k for k in SYSTEM if k in texts and len(texts) > 2), "")
    thought = next((k for k in texts if is_thought(k)), "")
    texts = [k for k in texts if k not in (system, thought)]
    asked, answer = _roles({k: v for k, v in named.items() if k not in (system, thought)}, texts)
    if thought and not answer:
        thought, answer = "", thought
    if not answer or not 1 <= len(asked) <= MOST_ASKED:
        return ()
    asked += [k for k in texts if answer.startswith(f"{_stem(k)}[")]  # the choices, to choose from
    return _flags(asked, [thought, answer] if thought else [answer], system)


def _roles(named: Mapping[str, Any], texts: list[str]) -> tuple[list[str], str]:
    """The columns of the question and the one of the answer; '' where none is plainly that."""
    first = _named(texts, PLAINLY) or _near(texts, ASKING)
    plain = [k for k, v in named.items() if type(v) in (str, int, float) and k != first]
    others = [k for k in plain if not _near([k], CONTEXT)]  # of which one may be the answer
    rest = [k for k in others if k in texts]
    more = [k for k in texts if k != first and _near([k], (*CONTEXT, *INPUTS))]
    sources = [k for k in texts if k != first and not _near([k], (*CLASSES, *RATINGS))]
    start = [first] if first else []
    answer = (
        _indexed(named, others)
        or _named(rest, PLAINLY_ANSWERING)
        or _near(rest, ANSWERING)
        or _near(_held(named), ANSWERING)
    )
    if answer:
        asked = [k for k in ([*start, *more] if first else sources) if k != answer]
        several = any(_siblings(k, texts) for k in (answer, *start))  # as q1, a1, q2, a2
        bodies = {_stem(k) for k in asked if k not in more and "title" not in k.lower()}
        return ([] if several or (not first and len(bodies) > 1) else asked), answer
    label = _near(rest, CLASSES) or _near(others, CLASSES)
    if not label and len({_stem(k) for k in (*start, *sources)}) == 1:
        label = _near(others, RATINGS)
    if label:
        return [*start, *sources], label
    if first:
        left = [k for k in sources if k not in more]
        return [first, *more], left[0] if len(left) == 1 else ""
    nested = any(isinstance(v, list | dict) for v in named.values())
    if len(sources) != 2 or nested or _siblings(sources[0], texts) or set(SYSTEM) & set(sources):
        return [], ""
    return sources[:1], sources[1]


def _flags(asked: list[str], answered: list[str], system: str) -> tuple[str, ...]:
    """Flags that name these columns; () where a name cannot stand in them."""
    told = f"system={system}" if system else ""
    names = "".join((*asked, *answered))
    if len(asked) == len(answered) == 1 and not set("{},=") & set(names):
        roles = f"prompt={asked[0]},answer={answered[0]}"
        return "--columns", f"{roles},{told}" if told else roles
    if set("{}") & set(names):
        return ()
    templates = ["\\n".join(f"{{{name}}}" for name in part) for part in (asked, answered)]
    flags = "--prompt-template", templates[0], "--answer-template", templates[1]
    return (*flags, "--columns", told) if told else flags


def _by_label(choices: Any, key: Any) -> Any:
    """Choices kept as {label: [A, B], text: [x, y]} (CommonsenseQA, ARC), by label if it is one."""
    if not isinstance(choices, dict) or set(choices) != {"label", "text"} or key in choices:
        return choices
    labels, texts = choices["label"], choices["text"]
    paired = isinstance(labels, list) and isinstance(texts, list)
    return dict(zip(labels, texts, strict=False)) if paired else choices


def is_numbering(name: str) -> bool:
    """Whether a column's name says that it numbers the rows."""
    return NUMBERING.fullmatch(name) is not None


def is_thought(name: str) -> bool:
    """Whether a column's name says that it holds what is thought before an answer."""
    return not THOUGHTS.isdisjoint(_words(name))


def answers(name: str) -> bool:
    """Whether a column's name says that it answers the others, as a word of its own."""
    words = _words(name)
    return not {*RATINGS, "code"} & set(words) and any(
        word in (*ANSWERING, *CLASSES) for word in words
    )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower()) if name.isascii() else [name]


def _stem(name: str) -> str:
    return name.rstrip("0123456789")


def _siblings(name: str, names: list[str]) -> bool:
    """Whether a numbered column is one of several, as answer1 beside answer2."""
    return _stem(name) != name and any(k != name and _stem(k) == _stem(name) for k in names)


def _held(value: Mapping[str, Any]) -> list[str]:
    """Texts inside of columns: list[0], object[text], object[text][0]."""
    found = []
    for name, column in value.items():
        inner = {f"{name}[{key}]": v for key, v in column.items()} if type(column) is dict else {}
        for place, held in (inner or {name: column}).items():
            if isinstance(held, list) and held and type(held[0]) is str:
                found.append(f"{place}[0]")
            elif inner and type(held) is str:
                found.append(place)
    return found


def _indexed(value: Mapping[str, Any], plain: list[str]) -> str | None:
    """`choice[label]`, where a column says which of several is the answer."""
    index = _near(plain, ("label", "answer_idx", "answerkey", "gold"))
    if index is None:
        return None
    for name in value:
        stem = _stem(name)
        indexed = isinstance(value[name], list | dict) or f"{stem}{value[index]}" in value
        asking = any(isinstance(v, str) and _stem(k) not in (stem, index) for k, v in value.items())
        if indexed and asking and stem not in ("", index):
            return f"{stem}[{index}]"
    return None


def _named(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((n for w in wanted for n in names if w == n.lower()), None)


def _near(names: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((n for w in wanted for n in names if w in n.lower()), None)
