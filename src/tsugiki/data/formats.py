"""Files of rows → conversations, each row by its own layout, with a reason for each one skipped.

Layouts: messages (OpenAI), ShareGPT and other lists of turns, alpaca, prompt/completion,
question/answer, text; any other by `--columns` or templates. Knows no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.data.columns import given_templates, propose
from tsugiki.data.files import NOT_UTF8, Note, Record, Skipped, read_records, reasons
from tsugiki.data.layouts import by_layout, detect, is_tree, shown
from tsugiki.data.named import data_files, folder_notes
from tsugiki.data.row import Row, RowProblem, column_names
from tsugiki.data.unreadable import to_utf8
from tsugiki.data.unused import Unused
from tsugiki.errors import DataError


@dataclass(frozen=True)
class Rows:
    """What a file or folder gave: rows, skipped ones, the layout seen."""

    rows: list[Row]
    skipped: list[Skipped]
    layout: str
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
    joined: dict[str, set[str]] = {}
    unused = Unused()
    unknown: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    given = given_templates(columns or {}, prompt_template, answer_template)
    notes = list(given.notes) if given is not None else []
    seen = 0
    for file in files:
        before, bad = seen, len(skipped)
        layout: str | None = None  # of the row before: says what one that has none lacks
        for record in _readable(file, alone=len(files) == 1):
            if isinstance(record, Note):
                notes.append(record.text)
                continue
            seen += 1
            if isinstance(record, Skipped):
                _skip(record, skipped, strict)
                continue
            record = _trimmed(record)
            first = first or record.value
            try:
                if given is not None:
                    layout, row = "columns", given.row(record)
                    used: Collection[str] = given.used(record.value)
                else:
                    layout = detect(record.value) or (None if is_tree(record.value) else layout)
                    if layout is None:
                        unknown = unknown or record.value
                        raise RowProblem(f"layout not known ({column_names(record.value)})")
                    row, used = by_layout(record, layout)
            except RowProblem as problem:
                _skip(Skipped(record.source, str(problem)), skipped, strict)
                continue
            rows.append(row)
            layouts[layout] += 1
            joined.setdefault(layout, set()).update(used)
            unused.see(record.value, tuple(used), layout)
        encoded = [skip for skip in skipped[bad:] if NOT_UTF8 in skip.reason]
        if 2 * len(encoded) > seen - before:
            if len(files) == 1:
                raise DataError(
                    f"{file}: most rows are {NOT_UTF8}",
                    got=f"{len(encoded)} of {seen - before}: {reasons(encoded)}",
                    fix=to_utf8(file),
                )
            notes.append(f"{file}: most rows are {NOT_UTF8}; {to_utf8(file)}")
    if not rows:
        if given is not None and first is not None:
            given.refuse_misspelt(path, first)
        _nothing(path, skipped, unknown)
    if path.is_dir():
        notes += folder_notes(path)
    notes += unused.notes()
    told = [(shown(name, joined[name]), count) for name, count in layouts.most_common()]
    said = told[0][0] if len(told) == 1 else ", ".join(f"{n:,} {name}" for name, n in told)
    return Rows(rows, skipped, said, seen, tuple(notes))


def _readable(file: Path, *, alone: bool) -> Iterator[Record | Skipped | Note]:
    """Its records; in a folder, a file that cannot be read as a whole is skipped like a row."""
    try:
        yield from read_records(file)
    except DataError as error:
        if alone:
            raise
        said = " ".join(str(error.problem).split()).removeprefix(str(file)).lstrip(": ")
        yield Skipped(str(file), said)


def _trimmed(record: Record) -> Record:
    """Columns by their names without blanks around them, which nobody sees."""
    names = {name: name.strip() for name in record.value}
    if len(set(names.values())) < len(names) or all(a == b for a, b in names.items()):
        return record
    return Record({names[name]: v for name, v in record.value.items()}, record.source)


def _skip(skip: Skipped, skipped: list[Skipped], strict: bool) -> None:
    if strict:
        raise DataError(f"{skip.source}: {skip.reason}", fix="mend the row, or leave --strict out")
    skipped.append(skip)


def _nothing(path: Path, skipped: list[Skipped], unknown: dict[str, Any] | None) -> None:
    if unknown is not None:
        flags = () if is_tree(unknown) else propose(unknown)
        fix = "make each row an object with a prompt and an answer, as texts"
        if sum(isinstance(held, str) for held in unknown.values()) > 1:
            named = "--prompt-template 'Q: {COLUMN}' --answer-template '{COLUMN}'"
            fix = f"say which columns are which: {named}; or {fix}"
        if is_tree(unknown):
            fix = "each row is one message: join it with its parents, by parent_id, as messages"
        elif "rejected" in unknown:
            fix += "; of pairs of answers there is no tuning here"
        raise DataError(
            f"{path}: the layout of these rows is not known",
            got=column_names(unknown),
            allowed="messages; conversations; conversation; dialogue; instruction/input/output; "
            "prompt/completion; question/answer; 指示/入力/回答; 質問/回答; text",
            fix=None if flags else fix,
            flags=flags,
        )
    raise DataError(
        f"{path}: no row can be used",
        got=reasons(skipped) or "no rows",
        fix="mend these rows, or give others",
    )
