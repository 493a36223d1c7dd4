"""Reads files of rows into plain records with their place: file:line. Knows no layouts.

JSONL, JSON, CSV, TSV, Parquet, plain text and folders of them. What is broken is skipped with a
reason, never raised: a bad line is the user's data, not an error of the program.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.data import aozora, tables
from tsugiki.data.articles import is_article, questions
from tsugiki.data.unreadable import refuse_packed, to_utf8
from tsugiki.errors import DataError

NOT_UTF8 = "not valid UTF-8"
SHOWN_REASONS = 3
WHOLE_LIMIT = 1 << 30  # bytes of a file that is read as one value under the name of lines
LINE_LIMIT = 32 << 20  # bytes of one line or cell; longer ones are skipped unread
HOLDERS = ("data", "rows", "train", "conversations")  # names of the list of rows in one object
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Record:
    """One row as stored: a mapping, or a whole text."""

    value: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Skipped:
    """A row that is not trained on: where it stands, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Note:
    """What a user should know of the file as a whole."""

    text: str


def read_records(path: Path) -> Iterator[Record | Skipped | Note]:
    """Every row of one file, in order.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", fix="give a file with rows")
        suffix = path.suffix.lower()
        refuse_packed(path, suffix)
        if suffix in (".jsonl", ".ndjson"):
            yield from _jsonl(path)
        elif suffix == ".json":
            yield from _json(path)
        elif suffix in (".csv", ".tsv"):
            yield from _table(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            yield from _text(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid {error.encoding} (byte {error.start + 1})", fix=to_utf8(path)
        ) from None


def decode(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark, UTF-16 with one; raises UnicodeDecodeError."""
    if raw.startswith(UTF16_MARKS):
        return raw.decode("utf-16")
    return raw.decode("utf-8-sig")


def parse(text: str) -> Any:
    """JSON without NaN, inf, half surrogates; raises ValueError with a reason."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column" if "\n" in text.strip() else "column"
        what = error.msg.removesuffix(" at")
        raise ValueError(f"not valid JSON ({what} at {where} {error.colno})") from None
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("holds a number of more than 4,300 digits") from None
        raise
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) with CRLF and CR understood; None for a line beyond the limit."""
    with open(path, "rb") as stream:
        if stream.read(2) in UTF16_MARKS:
            lost = b""
            try:
                text = decode(path.read_bytes())
            except UnicodeDecodeError:  # those lines alone are lost: no UTF-8 either
                text, lost = path.read_bytes().decode("utf-16", errors="replace"), b"\xff"
            lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
            for number, line in enumerate(lines, 1):
                yield number, line.encode() + (lost if "\ufffd" in line else b"")
            return
        stream.seek(0)
        number, rest = 0, b""
        overlong = False
        while True:
            chunk = stream.read(1 << 20)
            if not chunk:
                break
            rest += chunk
            if rest.endswith(b"\r"):  # may be the first half of CRLF
                more = stream.read(1)
                rest += more
            parts = rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
            rest = parts.pop()
            for part in parts:
                number += 1
                yield number, None if overlong else part
                overlong = False
            if len(rest) > LINE_LIMIT:
                overlong, rest = True, b""
        if rest or overlong:
            yield number + 1, None if overlong else rest


def _jsonl(path: Path) -> Iterator[Record | Skipped | Note]:
    if _is_one_list(path):  # one JSON value under the other name
        yield from _json(path)
        return
    for number, raw in _lines(path):
        source = f"{path}:{number}"
        if raw is None:
            yield Skipped(source, f"a line of more than {LINE_LIMIT >> 20} MB")
            continue
        try:
            text = decode(raw) if number == 1 else raw.decode()
        except UnicodeDecodeError as error:
            yield Skipped(source, f"{NOT_UTF8} (byte {error.start + 1})")
            continue
        if not text.strip():
            continue
        try:
            value = parse(text)
        except ValueError as error:
            yield Skipped(source, str(error))
            continue
        yield _record(value, source)


def _is_one_list(path: Path) -> bool:
    """Whether the whole file is one list of rows; a list of turns in a line is a row."""
    with open(path, "rb") as stream:
        if not stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return False
    if path.stat().st_size > WHOLE_LIMIT:
        return False
    try:
        value = parse(decode(path.read_bytes()))
    except ValueError:  # UnicodeDecodeError is one
        return False
    rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    return bool(rows) and not _is_dialogue(value)


def _record(value: Any, source: str) -> Record | Skipped:
    if isinstance(value, dict):
        return Record(value, source)
    if isinstance(value, list) and _is_dialogue(value):
        return Record({"messages": value}, source)
    return Skipped(source, f"a row must be an object, this is {_kind(value)}")


def _json(path: Path) -> Iterator[Record | Skipped | Note]:
    raw = path.read_bytes()
    try:
        value = parse(decode(raw))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line} is not valid {error.encoding}", fix=to_utf8(path)) from None
    except ValueError as error:
        if _is_object(raw.strip().split(b"\n", 1)[0]):  # rows, one a line, under the other name
            yield from _jsonl(path)
            return
        raise DataError(f"{path}: {error}", fix="mend the file: it is read as one value") from None
    if isinstance(value, dict):
        holder = next((key for key in HOLDERS if isinstance(value.get(key), list)), None)
        table = tables.rows_of_columns(value)
        if table:
            value = table
        elif holder is None or "messages" in value or _is_dialogue(value[holder]):
            value = [value]
        else:
            yield from _other_lists(path, value, holder)
            value = value[holder]
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list of rows", got=_kind(value))
    if value and all(isinstance(row, list) and not _is_dialogue(row) for row in value):
        raise DataError(
            f"{path} is a list of lists: the columns have no names",
            fix='make each row an object, e.g. {"prompt": …, "answer": …}',
        )
    for number, row in enumerate(value, 1):
        source = f"{path} row {number}"
        if is_article(row):
            for place, asked in enumerate(questions(row), 1):
                yield _record(asked, f"{source} question {place}")
        else:
            yield _record(row, source)


def _other_lists(path: Path, value: dict[str, Any], holder: str) -> Iterator[Note]:
    """Names lists of rows that stand beside the one that is read."""
    others = [
        key
        for key, held in value.items()
        if key != holder and isinstance(held, list) and held and isinstance(held[0], dict)
    ]
    if others:
        named = ", ".join(repr(key[:40]) for key in others[:4])
        yield Note(
            f"{path}: only {holder!r} is read, not {named}; "
            "save held-out rows as a file of their own and give it with --eval-data"
        )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse(decode(line)), dict)
    except ValueError:  # UnicodeDecodeError is one
        return False


def reasons(skipped: Sequence[Skipped]) -> str:
    """Why rows were left out: each reason with its first place and how often, most often first."""
    first = {skip.reason: skip.source for skip in reversed(skipped)}
    counts = Counter(skip.reason for skip in skipped).most_common(SHOWN_REASONS)
    told = [
        f"{first[reason]}: {reason}" + (f" (and {n - 1} more so)" if n > 1 else "")
        for reason, n in counts
    ]
    more = len(first) - len(counts)
    return "; ".join([*told, *([f"… {more} more reasons"] if more > 0 else [])])


def _is_dialogue(row: list[Any]) -> bool:
    """Whether a list without a name holds turns, not rows."""
    return bool(row) and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in row)


def _table(path: Path, delimiter: str) -> Iterator[Record | Skipped]:
    bad: dict[int, str] = {}  # line → why it cannot be read
    csv.field_size_limit(LINE_LIMIT)
    lines = _table_lines(path, bad)
    first, head = next(lines, (1, ""))
    told = re.fullmatch(r'sep=([^\w\s"]|\t| )\s*', head)  # what Excel asks for a delimiter with
    if told:
        delimiter, (first, head) = told[1], next(lines, (1, ""))
    elif delimiter not in head:  # as Excel writes it where the comma is the decimal point
        delimiter = next((mark for mark in ";\t," if mark in head), delimiter)
    names: list[str] | None = None
    try:
        for record in tables.split(itertools.chain([(first, head)], lines), delimiter):
            source = f"{path}:{record.begin}"
            unread = (bad[n] for n in range(record.begin, record.end + 1) if n in bad)
            reason = next(unread, record.problem)
            blank = not any(cell.strip() for cell in record.cells)
            if names is None and (reason or not blank):
                names = _column_names(record.cells, reason, source, path)
            elif reason:
                yield Skipped(source, reason)
            elif names is not None and not blank:
                yield Record(dict(zip(names, record.cells, strict=True)), source)
    except tables.QuotesNeverPair:
        raise DataError(f"{path}: its quotes do not pair", fix="write it anew as CSV") from None


def _column_names(cells: list[str], problem: str | None, source: str, path: Path) -> list[str]:
    """The names in the first line; raises DataError where it cannot name the columns."""
    if problem is not None:
        fix = to_utf8(path) if NOT_UTF8 in problem else "mend the first line"
        raise DataError(f"{source}: {problem}", fix=fix)
    names = [name.strip() for name in cells]
    if len(names) > 1 and not names[0]:  # as pandas writes the numbers of the rows
        names[0] = "index"
    if not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"{source}: the first line must name every column, each once",
            got=", ".join(name[:40] or "(empty)" for name in names[:12]) or "nothing",
            fix="name the columns in the first line",
        )
    return names


def _table_lines(path: Path, bad: dict[int, str]) -> Iterator[tuple[int, str]]:
    """Numbered lines of a table; one that cannot be read becomes empty and is noted in `bad`."""
    for number, raw in _lines(path):
        text = ""
        if raw is None:
            bad[number] = f"a line of more than {LINE_LIMIT >> 20} MB"
        else:
            try:
                text = decode(raw) if number == 1 else raw.decode()
            except UnicodeDecodeError as error:
                bad[number] = f"{NOT_UTF8} (byte {error.start + 1})"
        yield number, text + "\n"


def _parquet(path: Path) -> Iterator[Record | Skipped]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record({k: _held(v) for k, v in row.items()}, f"{path} row {number}")
    except Exception as error:
        if isinstance(error, OSError | ValueError) or type(error).__module__.startswith("pyarrow"):
            raise DataError(
                f"{path} is not a whole Parquet file: {str(error)[:200]}",
                fix="copy it again from where it was made",
            ) from None
        raise


def _held(value: Any) -> Any:
    """Without what stands for null in tables of numbers, and what pads objects to equal keys."""
    if isinstance(value, dict):
        return {key: _held(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_held(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(path: Path) -> Iterator[Record | Skipped]:
    raw = path.read_bytes()
    if aozora.looks_like_aozora(raw):
        yield Record({"text": aozora.clean(raw)}, f"{path}:1")
        return
    try:
        text = decode(raw)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line} is not valid UTF-8",
            fix=to_utf8(path),
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.strip():
        yield Record({"text": text}, f"{path}:1")
    else:
        yield Skipped(f"{path}:1", "no text")


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "a truth"}
    return names.get(type(value), "a number")
