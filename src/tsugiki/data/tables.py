"""Lines of a table → its records, going on after a quote that is not closed.

The csv module reads such a quote up to the next one, or to the end of the file. Here the line where
it opens is given up alone, and the lines after it are read again. Between tabs, where many programs
write no quotes around cells, it is a character like others. Knows no files and no rows.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

UNCLOSED = "a quote opens in this line and is not closed"
REST = "a quote without its other half, after a line that could not be read"
# Names of a list of rows, not of a column.
PARTS = {"train", "test", "validation", "valid", "dev", "data", "rows", "columns", "index",
         "messages", "conversations"}  # fmt: skip
MOST_AGAIN = 20_000_000  # lines read again in one table; only a hostile one comes near


class QuotesNeverPair(Exception):
    """More lines were to be read again than any honest table needs."""


@dataclass(frozen=True)
class Cells:
    """One record: its first and last line, its cells, and why it cannot be used."""

    begin: int
    end: int
    cells: list[str]
    problem: str | None = None


def split(lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[Cells]:
    """Every record of numbered lines, which end in a newline; the first tells how many cells.

    Raises:
        QuotesNeverPair: the quotes make most lines be read again and again.
    """
    again: deque[tuple[int, str]] = deque()
    width: int | None = None
    broken = False  # the record before this one could not be read
    count = 0
    while True:
        taken: list[tuple[int, str]] = []
        reader = csv.reader(_feed(lines, again, taken), delimiter=delimiter, strict=True)
        problem = None
        try:
            cells = next(reader, None)
        except csv.Error as error:
            cells = []
            unclosed = len(taken) > 1 or "unexpected end" in str(error)
            problem = UNCLOSED if unclosed else f"not readable as a table: {error}"
        if cells is None:
            return
        reread = problem is not None
        if problem is None and any(cell.strip() for cell in cells):
            if len(cells) != (width or len(cells)):
                problem = f"{len(cells)} cells under {width} columns"
                reread = len(taken) > 1 and _is_record(taken[1][1], delimiter, width)
                problem = UNCLOSED if reread else problem
            elif broken and sum(text.count('"') for _, text in taken) % 2:
                problem = REST
        if reread:
            again.extendleft(reversed(taken[1:]))
            count += len(taken) - 1
            if count > MOST_AGAIN:
                raise QuotesNeverPair
            del taken[1:]
        if problem not in (None, REST) and delimiter == "\t":
            plain = taken[0][1].rstrip("\r\n").split("\t")
            if len(taken) == 1 and len(plain) == width:
                cells, problem = plain, None
        if any(cell.strip() for cell in cells):
            width = width or len(cells)
        broken = problem is not None and sum(text.count('"') for _, text in taken) % 2 == 1
        yield Cells(taken[0][0], taken[-1][0], cells, problem)


def rows_of_columns(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an object of equally long columns, as tables are kept as JSON; [] of others."""
    columns = list(table.values())
    if not PARTS.isdisjoint(table):
        return []
    if len(columns) < 2 or not all(isinstance(column, list) for column in columns):
        return []
    objects = any(isinstance(cell, dict) for column in columns for cell in column)
    if objects or len({len(column) for column in columns}) > 1:
        return []
    return [dict(zip(table, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _feed(
    lines: Iterator[tuple[int, str]], again: deque[tuple[int, str]], taken: list[tuple[int, str]]
) -> Iterator[str]:
    while True:
        numbered = again.popleft() if again else next(lines, None)
        if numbered is None:
            return
        taken.append(numbered)
        yield numbered[1]


def _is_record(line: str, delimiter: str, width: int | None) -> bool:
    """Whether a line alone is a record of the table."""
    try:
        return len(next(csv.reader([line], delimiter=delimiter, strict=True))) == width and (
            line.count('"') % 2 == 0
        )
    except (csv.Error, StopIteration):
        return False
