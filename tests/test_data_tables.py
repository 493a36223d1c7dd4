"""Tables whose quotes do not pair: one line is given up, the rest is read, counts are exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_formats import told, write

from tsugiki.data import tables
from tsugiki.data.formats import read_rows
from tsugiki.errors import DataError


def rest(count: int) -> str:
    return "".join(f"q{i},a{i}\n" for i in range(count))


@pytest.mark.parametrize(
    ("kind", "line", "after"),
    [
        ("never closed", 'q,"a', rest(4)),
        ("closed by a later cell", 'q,"a', rest(2) + 'q,"a, b"\n' + rest(1)),
        ("closed by a later end", 'q,"a', rest(2) + 'q","a"\n' + rest(1)),
        ("before lines in one cell", 'q,"a', 'q,"a\nb"\n' + rest(3)),
        ("the last line", 'q,"a', ""),
    ],
)
def test_an_unclosed_quote_costs_one_line(tmp_path: Path, kind: str, line: str, after: str) -> None:
    path = write(tmp_path, "a.csv", f'question,answer\n"q\nr",a\n{line}\n{after}')
    rows = read_rows(path)
    first = rows.skipped[0]
    assert (first.source, first.reason) == (f"{path}:4", tables.UNCLOSED)
    assert len(rows.skipped) == 1
    assert len(rows.rows) + len(rows.skipped) == rows.seen == 2 + {"the last line": 0}.get(kind, 4)
    assert told(rows)[0][0] == ("user", "q\nr")
    if kind == "before lines in one cell":
        assert told(rows)[1][1] == ("assistant", "a\nb")


def test_the_end_of_a_broken_cell_is_not_taken_for_a_row(tmp_path: Path) -> None:
    broken = '"say "x" here\nand there",a\n'
    path = write(tmp_path, "a.csv", f'question,answer\n{broken}q,a\nq,5" wide\n')
    rows = read_rows(path)
    assert [talk[1][1] for talk in told(rows)] == ["a", '5" wide']
    assert [s.source for s in rows.skipped] == [f"{path}:2", f"{path}:3"]
    assert rows.skipped[1].reason == tables.REST


def test_a_long_record_with_too_many_cells_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'question,answer\n"q\nr",a,x\nq,a\n')
    rows = read_rows(path)
    assert [s.reason for s in rows.skipped] == ["3 cells under 2 columns"]
    assert rows.seen == 2


def test_blank_lines_before_the_names_of_columns_are_passed_over(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.csv", "\n,\nquestion,answer\nq,a\n"))
    assert told(rows) == [[("user", "q"), ("assistant", "a")]]


def test_an_object_of_equally_long_columns_is_a_table(tmp_path: Path) -> None:
    table = {"instruction": ["q", "r"], "input": ["", "m"], "output": ["a", "b"]}
    rows = read_rows(write(tmp_path, "a.json", json.dumps(table)))
    wanted = [[("user", "q"), ("assistant", "a")], [("user", "r\nm"), ("assistant", "b")]]
    assert (rows.layout, told(rows)) == ("alpaca", wanted)
    uneven = table | {"output": ["a"]}
    with pytest.raises(DataError, match="'instruction' is not a text"):
        read_rows(write(tmp_path, "b.json", json.dumps(uneven)))


def test_quotes_that_make_every_line_be_read_again_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_AGAIN", 5_000)
    path = write(tmp_path, "a.csv", "x,y,z,v\n" + 'a",""",x\n' * 200)
    with pytest.raises(DataError, match="its quotes do not pair"):
        read_rows(path)


def test_between_tabs_a_quote_may_be_a_character(tmp_path: Path) -> None:
    lines = ['"Hello" he said\ta', 'He said "no\ta', '"Open only\ta', 'q\t"x" and "y', '"q\nr"\ta']
    path = write(tmp_path, "a.tsv", "question\tanswer\n" + "\n".join(lines) + "\n")
    rows = read_rows(path)
    assert not rows.skipped
    asked = [talk[0][1] for talk in told(rows)]
    assert asked == ['"Hello" he said', 'He said "no', '"Open only', "q", "q\nr"]
    assert told(rows)[3][1] == ("assistant", '"x" and "y')


def test_between_tabs_the_end_of_a_broken_cell_is_no_row_either(tmp_path: Path) -> None:
    broken = '"say "x" here\nand there"\ta\n'
    rows = read_rows(write(tmp_path, "a.tsv", f"question\tanswer\n{broken}q\ta\n"))
    assert told(rows) == [[("user", "q"), ("assistant", "a")]]
    assert len(rows.skipped) == 2


@pytest.mark.parametrize("mark", [",", ";", "|", "\t"])
def test_a_first_line_may_tell_the_delimiter(tmp_path: Path, mark: str) -> None:
    text = f'sep={mark}\nquestion{mark}answer\n"q, r; s"{mark}a\n'
    path = write(tmp_path, "a.csv", text)
    rows = read_rows(path)
    assert told(rows) == [[("user", "q, r; s"), ("assistant", "a")]]
    assert rows.rows[0].source == f"{path}:3"


@pytest.mark.parametrize("head", ["sep=", 'sep="'])
def test_a_delimiter_that_is_none_is_not_taken(tmp_path: Path, head: str) -> None:
    with pytest.raises(DataError):
        read_rows(write(tmp_path, "a.csv", f"{head}\nquestion,answer\nq,a\n"))


def test_a_quote_after_a_line_that_broke_otherwise_costs_nothing(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.tsv", 'question\tanswer\nx\n5" pipe\ta\nq\ta\n'))
    assert [talk[0][1] for talk in told(rows)] == ['5" pipe', "q"]
    assert [s.reason for s in rows.skipped] == ["1 cells under 2 columns"]
