"""Reads files of rows into plain records with their place: file:line. Knows no layouts.

JSONL, JSON, CSV, TSV, Parquet, plain text and folders of them. What is broken is skipped with a
reason, never raised: a bad line is the user's data, not an error of the program.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.data import aozora
from tsugiki.errors import DataError

LINE_LIMIT = 32 << 20  # bytes of one line or cell; longer ones are skipped unread
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")


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


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder, sorted.

    Raises:
        DataError: nothing there, no permission, or a kind that is not read.
    """
    if not path.exists():
        raise DataError(f"there is no file {path}", fix="check the path of the data")
    if path.is_dir():
        found = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
        )
        if not found:
            raise DataError(f"the folder {path} holds no data files", allowed=", ".join(SUFFIXES))
        return found
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: this kind of file is not read",
            got=path.suffix or "no suffix",
            allowed=", ".join(SUFFIXES),
            fix="rename it to what it holds",
        )
    return [path]


def read_records(path: Path) -> Iterator[Record | Skipped]:
    """Every row of one file, in order.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", fix="give a file with rows")
        suffix = path.suffix.lower()
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


def decode(raw: bytes) -> str:
    """UTF-8 with or without a byte order mark, UTF-16 with one; raises UnicodeDecodeError."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16")
    return raw.decode("utf-8-sig")


def parse(text: str) -> Any:
    """JSON without NaN or inf and without lone surrogates; raises ValueError with a reason."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half of a surrogate pair") from None
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) with CRLF and CR understood; None for a line beyond the limit."""
    with open(path, "rb") as stream:
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


def _jsonl(path: Path) -> Iterator[Record | Skipped]:
    wide = path.open("rb").read(2) in (b"\xff\xfe", b"\xfe\xff")
    lines: Iterator[tuple[int, bytes | None]] = (
        ((i, t.encode()) for i, t in enumerate(decode(path.read_bytes()).splitlines(), 1))
        if wide
        else _lines(path)
    )
    for number, raw in lines:
        source = f"{path}:{number}"
        if raw is None:
            yield Skipped(source, f"a line of more than {LINE_LIMIT >> 20} MB")
            continue
        try:
            text = decode(raw) if number == 1 else raw.decode()
        except UnicodeDecodeError as error:
            yield Skipped(source, f"not valid UTF-8 (byte {error.start + 1})")
            continue
        if not text.strip():
            continue
        try:
            value = parse(text)
        except ValueError as error:
            yield Skipped(source, str(error))
            continue
        yield _record(value, source)


def _record(value: Any, source: str) -> Record | Skipped:
    if isinstance(value, dict):
        return Record(value, source)
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return Record({"messages": value}, source)
    return Skipped(source, f"a row must be an object, this is {_kind(value)}")


def _json(path: Path) -> Iterator[Record | Skipped]:
    try:
        value = parse(decode(path.read_bytes()))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid UTF-8 (byte {error.start + 1})") from None
    except ValueError as error:
        lines = path.read_bytes().split(b"\n", 2)
        hint = (
            "it looks like one object a line: rename it to .jsonl"
            if len(lines) > 1 and lines[0].strip().endswith(b"}")
            else "check it with a JSON validator"
        )
        raise DataError(f"{path}: {error}", fix=hint) from None
    if isinstance(value, dict):
        holders = ("data", "rows", "train", "conversations")
        inner = next((value[key] for key in holders if isinstance(value.get(key), list)), None)
        value = [value] if inner is None or "messages" in value else inner
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list of rows", got=_kind(value))
    if value and all(isinstance(row, list) and not _is_dialogue(row) for row in value):
        raise DataError(
            f"{path} is a list of lists: the columns have no names",
            fix='make each row an object, e.g. {"prompt": …, "answer": …}',
        )
    for number, row in enumerate(value, 1):
        yield _record(row, f"{path}:{number}")


def _is_dialogue(row: list[Any]) -> bool:
    return bool(row) and all(isinstance(m, dict) for m in row)


def _table(path: Path, delimiter: str) -> Iterator[Record | Skipped]:
    try:
        text = decode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not valid UTF-8 (byte {error.start + 1})",
            fix=f"iconv -f cp932 -t utf-8 {path} > utf8{path.suffix}  (if it comes from Excel)",
        ) from None
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header or not any(name.strip() for name in header):
            raise DataError(f"{path} has no header line", fix="name the columns in the first line")
        names = [name.strip() for name in header]
        for cells in reader:
            source = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                yield Skipped(source, f"{len(cells)} cells under {len(names)} columns")
                continue
            yield Record(dict(zip(names, cells, strict=True)), source)
    except csv.Error as error:
        yield Skipped(f"{path}:{reader.line_num}", f"not readable as a table: {error}")


def _parquet(path: Path) -> Iterator[Record | Skipped]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{path}: Parquet needs pyarrow", fix="pip install 'tsugiki[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{path}:{number}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {str(error)[:200]}") from None
    except Exception as error:
        if type(error).__module__.startswith("pyarrow"):
            raise DataError(f"{path} is not a whole Parquet file: {str(error)[:200]}") from None
        raise


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
            fix="convert it: iconv -f cp932 -t utf-8 FILE > utf8.txt  (for Japanese text)",
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
