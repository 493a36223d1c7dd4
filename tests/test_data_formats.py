"""Rows as people have them: layouts, columns, bad rows of many kinds, encodings, and a fuzz."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.data import files
from tsugiki.data.files import Record, Skipped, read_records
from tsugiki.data.formats import Rows, read_rows
from tsugiki.data.named import SUFFIXES
from tsugiki.errors import DataError

GOOD = {"prompt": "two and two?", "completion": "four"}


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def told(rows: Rows) -> list[list[tuple[str, str]]]:
    return [[(m.role, m.content) for m in row.messages] for row in rows.rows]


LAYOUTS = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "two and two?"},
            {"role": "assistant", "content": "four"},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "two and two?"},
            {"from": "gpt", "value": "four"},
        ]
    },
    "alpaca": {
        "system": "Be brief.", "instruction": "two and two?", "input": "", "output": "four"
    },
    "prompt/completion": {"system": "Be brief.", **GOOD},
    "question/answer": {"system": "Be brief.", "question": "two and two?", "answer": "four"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_conversation(tmp_path: Path, layout: str) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines(LAYOUTS[layout])))
    assert rows.layout == layout
    assert told(rows) == [
        [("system", "Be brief."), ("user", "two and two?"), ("assistant", "four")]
    ]
    assert rows.rows[0].source.endswith("a.jsonl:1")


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    pairs = [{"question": f'q {i}, "a"\nb', "answer": f"a{i}"} for i in range(3)]
    write(tmp_path, "a.jsonl", lines(*pairs))
    write(tmp_path, "a.json", json.dumps(pairs))
    write(tmp_path, "b.json", json.dumps({"data": pairs}))
    write(tmp_path, "c.json", lines(*pairs))  # rows under the other name
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        cells = "".join('"{}"{}{}\n'.format(p["question"].replace('"', '""'), mark, p["answer"])
                        for p in pairs)  # fmt: skip
        write(tmp_path, name, f"question{mark}answer\n{cells}")
    write_table(Table.from_pylist(pairs), tmp_path / "a.parquet")
    wanted = [[("user", p["question"]), ("assistant", p["answer"])] for p in pairs]
    for path in sorted(tmp_path.iterdir()):
        assert told(read_rows(path)) == wanted, path.name
    whole = read_rows(tmp_path)
    assert len(whole.rows) == 3 * len(list(tmp_path.iterdir()))


def test_texts_are_whole_documents_and_left_out_beside_rows(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "one\r\ntwo\n")
    write(tmp_path, "a.txt", "zero")
    assert [row.text for row in read_rows(tmp_path).rows] == ["zero", "one\ntwo\n"]
    write(tmp_path, "rows.jsonl", lines(GOOD))
    rows = read_rows(tmp_path)
    assert rows.layout == "prompt/completion"
    assert rows.notes == ("2 text files beside the rows are not trained on",)


def test_runs_adapters_and_models_in_a_folder_are_not_rows(tmp_path: Path) -> None:
    write(tmp_path, "rows.jsonl", lines(GOOD))
    for mark, beside in (
        ("run/decisions.json", "run/samples.jsonl"),
        ("kept/a/adapter_config.json", "kept/a/tokenizer.json"),
        ("base/tokenizer_config.json", "base/notes.txt"),
    ):
        for name in (mark, beside, *(["run/config.yaml"] if mark.startswith("run") else [])):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            write(tmp_path, name, lines({"text": "not a row"}))
    rows = read_rows(tmp_path)
    assert (rows.seen, len(rows.rows)) == (1, 1)
    assert rows.notes == ("runs, adapters and models are not read as rows: base, kept/a, run",)
    assert read_rows(tmp_path / "run" / "samples.jsonl").seen == 1, "named, it is read"
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"got: .*base, kept/a, run"):
        read_rows(tmp_path)
    (tmp_path / "run" / "config.yaml").unlink()
    assert read_rows(tmp_path).seen == 2, "a name that other people use too is not enough"


def test_a_link_to_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"it is a link to gone\.jsonl, and nothing is there"):
        read_rows(tmp_path / "rows.jsonl")


def turns(*items: object) -> dict[str, object]:
    return {"messages": list(items)}


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
DEEP = "[" * 100_000 + "]" * 100_000
BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "cut off": ('{"prompt": "q", "comp', "not valid JSON"),
    "not JSON": ("hello", "not valid JSON"),
    "two objects": ('{"prompt":"q"} {"prompt":"q"}', "Extra data"),
    "trailing comma": ('{"prompt": "q", "completion": "a",}', "not valid JSON"),
    "single quotes": ("{'prompt': 'q'}", "not valid JSON"),
    "raw control character": ('{"prompt": "q\x01", "completion": "a"}', "Invalid control"),
    "number": ("5", "this is a number"),
    "text": ('"five"', "this is a text"),
    "null": ("null", "this is null"),
    "truth": ("true", "this is a truth"),
    "list": ("[1, 2]", "this is a list"),
    "empty list": ("[]", "this is a list"),
    "NaN": ('{"prompt": "q", "completion": NaN}', "NaN is not JSON"),
    "inf": ('{"prompt": "q", "completion": -Infinity}', "-Infinity is not JSON"),
    "too large": ('{"prompt": "q", "completion": 1e999}', "1e999 is too large"),
    "huge integer": ('{"prompt": "q", "completion": ' + "9" * 5000 + "}", "4,300 digits"),
    "half a surrogate": (r'{"prompt": "q\ud800", "completion": "a"}', "half of a surrogate"),
    "surrogate in a key": (r'{"prompt":"q","completion":"a","\udc00":1}', "half of a surrogate"),
    "deep": (DEEP, "nested too deeply"),
    "deep in a column": ('{"prompt": ' + DEEP + "}", "nested too deeply"),
    "not UTF-8": (b'{"prompt": "q\xff", "completion": "a"}', "not valid UTF-8 (byte 14)"),
    "cp932": ('{"prompt": "名前", "completion": "a"}'.encode("cp932"), "not valid UTF-8"),
    "cut in a character": ('{"prompt": "名'.encode()[:-1], "not valid UTF-8"),
    "UTF-16 line": ('{"prompt": "q"}'.encode("utf-16-le"), "not valid JSON"),
    "NUL": (b"\x00\x00", "not valid JSON"),
    "no columns": ("{}", "no column 'prompt'"),
    "no answer": ('{"prompt": "q"}', "no column 'completion'"),
    "answer null": ('{"prompt": "q", "completion": null}', "'completion' is null"),
    "answer empty": ('{"prompt": "q", "completion": ""}', "the answer is empty"),
    "answer blank": ('{"prompt": "q", "completion": " \\n\\t"}', "the answer is empty"),
    "answer a list": ('{"prompt": "q", "completion": ["a"]}', "is not a text"),
    "answer an object": ('{"prompt": "q", "completion": {"a": 1}}', "is not a text"),
    "answer a truth": ('{"prompt": "q", "completion": true}', "is not a text"),
    "prompt empty": ('{"prompt": "", "completion": "a"}', "the prompt is empty"),
    "prompt an object": ('{"prompt": {}, "completion": "a"}', "is not a text"),
}
BAD_TURNS: dict[str, tuple[object, str]] = {
    "not a list": ({"messages": "hello"}, "no list 'messages'"),
    "none": (turns(), "no turns"),
    "a text": (turns("hello"), "turn 1 is not an object"),
    "null": (turns(USER, None), "turn 2 is not an object"),
    "no role": (turns({"content": "q"}), "turn 1 has no role"),
    "unknown role": (turns({"role": "wizard", "content": "q"}), "unknown role 'wizard'"),
    "role a number": (turns({"role": 3, "content": "q"}), "unknown role '3'"),
    "no content": (turns({"role": "user"}), "turn 1 has no text"),
    "content a number": (turns({"role": "user", "content": 3}), "turn 1 has no text"),
    "content an image": (
        turns({"role": "user", "content": [{"type": "image"}]}), "only text parts"
    ),
    "answer empty": (turns(USER, {"role": "assistant", "content": ""}), "the answer is empty"),
    "tools numbers": ({"messages": [USER, ANSWER], "tools": [5]}, "'tools' is not a list of obj"),
    "calls a text": (
        turns(USER, {"role": "assistant", "content": "a", "tool_calls": "x"}), "'tool_calls' is not"
    ),
    "calls numbers": (
        turns(USER, {"role": "assistant", "content": None, "tool_calls": [5]}), "'tool_calls' is"
    ),
    "tools broken": ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_skipped_with_its_place_and_reason(tmp_path: Path, kind: str) -> None:
    content, reason = BAD_LINES[kind]
    raw = content.encode() if isinstance(content, str) else content
    good = lines(GOOD).encode()
    path = write(tmp_path, "a.jsonl", good + raw + b"\n" + good)
    rows = read_rows(path)
    assert len(rows.rows) == 2
    assert [s.source for s in rows.skipped] == [f"{path}:2"]
    assert reason in rows.skipped[0].reason
    assert rows.rows[1].source == f"{path}:3"
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        read_rows(path, strict=True)


@pytest.mark.parametrize("kind", BAD_TURNS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_bad_turns_are_skipped_in_lines_and_lists(tmp_path: Path, kind: str, suffix: str) -> None:
    row, reason = BAD_TURNS[kind]
    good = turns(USER, ANSWER)
    rows_in = [good, row, good]
    content = lines(*rows_in) if suffix == "jsonl" else json.dumps(rows_in)
    rows = read_rows(write(tmp_path, f"a.{suffix}", content))
    assert len(rows.rows) == 2
    assert [s.source[-2:] for s in rows.skipped] == [":2" if suffix == "jsonl" else " 2"]
    assert reason in rows.skipped[0].reason


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("few cells", b"only", "1 cells under 2"),
        ("many cells", b"q,a,x", "3 cells under 2"),
        ("not UTF-8", b"q\xff,a", "not valid UTF-8 (byte 2)"),
        ("no answer", b"q,", "the answer is empty"),
        ("no prompt", b",a", "the prompt is empty"),
        ("stray quote", b'"q"x,a', "not readable as a table"),
    ],
)
def test_bad_lines_of_a_table(tmp_path: Path, kind: str, line: bytes, reason: str) -> None:
    path = write(tmp_path, "a.csv", b"question,answer\nq,a\n" + line + b'\n"q\nr",a\nq,a\n')
    rows = read_rows(path)
    assert [(s.source, reason in s.reason) for s in rows.skipped] == [(f"{path}:3", True)]
    assert [r.source.rsplit(":", 1)[1] for r in rows.rows] == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.txt", b"", "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.jsonl", b"\n\n", "no row can be used"),
        ("a.txt", b" \n", "no row can be used"),
        ("a.json", b"[]", "no row can be used"),
        ("a.json", b"[[1, 2], [3]]", "list of lists"),
        ("a.json", b"3", "must hold a list of rows"),
        ("a.json", b"[{", "not valid JSON"),
        ("a.json", b'[{"text": "\xff"}]', "json:1 is not valid"),
        ("a.json", DEEP.encode(), "nested too deeply"),
        ("a.csv", b"question,question\nq,a\n", "each once"),
        ("a.csv", b"question,\nq,a\n", "must name every column"),
        ("a.csv", b"quest\xffion,answer\nq,a\n", "not valid UTF-8"),
        ("a.csv", b'"question,answer\nq,a\n', "a quote opens in this line"),
        ("a.csv", b"question,answer\n", "no row can be used"),
        ("a.txt", b"good\n\xff\n", "txt:2 is not valid"),
        ("a.parquet", b"PAR1 not really", "not a whole Parquet file"),
        ("a.xlsx", b"PK", "this kind of file is not read"),
        ("a.jsonl", b"[[1], [2]]\n", "no row can be used"),
        ("a.csv", b"PK\x03\x04\x00\xff", "is an Excel or ZIP file"),
        ("a.gz", b"\x1f\x8b\x08", "is a gzip file"),
        ("a.jsonl", b"PAR1", "name it .parquet"),
        ("a.txt", "plain".encode("utf-16-le"), "iconv -f utf-16le"),
        ("a.csv", "質問,回答\nこれは,はい\n".encode("cp932"), "iconv -f cp932"),
        ("a.csv", "質問,回答\nこれは,はい\n".encode("euc-jp"), "iconv -f euc-jp"),
        (
            "a.csv",
            "質問;回答\n".encode("cp932") + "問1;答\n".encode("cp932") * 25,
            "iconv -f cp932",
        ),
        ("a.csv", "質問;回答\n".encode("euc-jp") + "問1;答\n".encode("euc-jp"), "iconv -f euc-jp"),
        ("a.csv", "question,answer\ncafé,olé\n".encode("latin1"), "iconv -f latin1"),
        ("a.csv", "question,réponse\ngénéralité,é\n".encode("latin1"), "iconv -f latin1"),
        ("a.txt", "good".encode("utf-16") + b"\n", "save it anew as UTF-8"),
        ("a.jsonl", b'{"prompt": "\xff", "completion": "a"}\n', "iconv -f latin1"),
        ("a.json", b'{"question": ["q"], "answer": "a"}', "'question' is not a text"),
        (
            "a.json",
            b'[{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " "}]',
            r"a\.json row 1: the answer is empty \(and 1 more so\)",
        ),
    ],
)
def test_a_file_without_rows_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path, name, content))
    assert name in str(caught.value)


def test_in_a_folder_a_broken_file_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, "a.json", "[{")
    write(tmp_path, "b.jsonl", lines(GOOD))
    write(tmp_path, "c.jsonl", b"")
    rows = read_rows(tmp_path)
    assert len(rows.rows) == 1
    assert [Path(s.source).name for s in rows.skipped] == ["a.json", "c.jsonl"]
    with pytest.raises(DataError, match=r"a\.json"):
        read_rows(tmp_path, strict=True)


def test_a_file_that_is_not_there_and_what_was_meant(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", lines(GOOD))
    for name, said in (
        (tmp_path / "missing", "check the path of the data"),
        (tmp_path / "row.jsonl", f"did you mean {path}"),
        (str(path).replace("/", "\\"), f"did you mean {path}"),
        ("https://example.com/rows.jsonl", "download it first"),
    ):
        with pytest.raises(DataError, match="there is no file") as caught:
            read_rows(Path(name))
        assert said in str(caught.value.fix)


def test_a_line_beyond_the_limit_is_skipped_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT", 3 << 20)
    long = b'{"prompt": "' + b"x" * (9 << 20) + b'", "completion": "a"}\n'
    path = write(tmp_path, "a.jsonl", lines(GOOD).encode() + long + lines(GOOD).encode())
    import tracemalloc

    tracemalloc.start()
    rows = read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [r.source for r in rows.rows] == [f"{path}:1", f"{path}:3"]
    assert rows.skipped == [Skipped(f"{path}:2", "a line of more than 3 MB")]
    assert peak < 20 << 20
    table = write(tmp_path, "a.csv", b"question,answer\nq,a\n" + b"x" * (9 << 20) + b",a\nq,a\n")
    found = read_rows(table)
    assert [s.source for s in found.skipped] == [f"{table}:3"]
    assert len(found.rows) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, name: str) -> None:
    pairs = [{"question": f"質問{i}", "answer": f"答え{i}"} for i in range(3)]
    content = {
        "a.jsonl": lines(*pairs),
        "a.json": json.dumps(pairs, indent=1, ensure_ascii=False),
        "a.csv": "question,answer\n" + "".join(
            f'"{p["question"]}\nx",{p["answer"]}\n' for p in pairs
        ),
        "a.txt": "".join(p["question"] + "\n" for p in pairs),
    }[name]  # fmt: skip
    variants = {
        "plain": content.encode(),
        "mark": b"\xef\xbb\xbf" + content.encode(),
        "CRLF": content.replace("\n", "\r\n").encode(),
        "CR": content.replace("\n", "\r").encode(),
        "mark and CRLF": b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode(),
        "UTF-16": content.encode("utf-16"),
    }
    seen = set()
    for variant, raw in variants.items():
        rows = read_rows(write(tmp_path, name, raw))
        assert not rows.skipped, variant
        seen.add((str(told(rows)), str([r.text for r in rows.rows])))
    assert len(seen) == 1


PIECES = st.sampled_from(
    [b'{"prompt": "q", "completion": "a"}', b"\n", b"\r\n", b"\r", b",", b'"', b"\\", b"{", b"}",
     b"[", b"]", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\\ud800", b"null", b"1e999",
     b'{"messages": [{"role": "user", "content": ', b'"text": ', b"question,answer", b"PAR1",
     "［＃改ページ］《るび》\n底本：".encode("cp932"), b"-" * 30 + b"\n", "吾輩".encode()]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(PIECES, st.binary(max_size=12)), max_size=12),
    st.sampled_from(SUFFIXES),
)
def test_no_file_makes_a_traceback(pieces: list[bytes], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), f"a{suffix}", b"".join(pieces))
        try:
            rows = read_rows(path)
        except DataError:
            return
        assert rows.rows
        for row in rows.rows:
            (row.text or "".join(m.content for m in row.messages)).encode()


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["messages", "role", "content", "text", "prompt", "completion", "from",
                             "value", "instruction", "output", "input", "tools", "conversations"]),
            inner, max_size=4),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON_VALUES, max_size=5))
def test_no_value_makes_a_traceback(values: list[object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "a.jsonl", "".join(json.dumps(v) + "\n" for v in values))
        if len(values) == 1 and isinstance(values[0], list):
            values = [*values, None]  # one list alone may be the rows themselves
            path.write_text("".join(json.dumps(v) + "\n" for v in values))
        records = list(read_records(path)) if values else []
        assert len([r for r in records if isinstance(r, Record | Skipped)]) == len(values)
        try:
            rows = read_rows(path)
        except DataError:
            return
        assert len(rows.rows) + len(rows.skipped) == rows.seen == len(values)


def test_a_broken_line_of_utf_16_is_lost_alone(tmp_path: Path) -> None:
    good = '{"prompt": "q", "completion": "a"}\n'.encode("utf-16-le")
    half = good[:20] + b"\x00\xd8" + good[20:]  # half of a pair
    path = write(tmp_path, "a.jsonl", b"\xff\xfe" + good + half + good + b"\x0a")
    rows = read_rows(path)
    assert told(rows) == [[("user", "q"), ("assistant", "a")]] * 2
    assert [s.source for s in rows.skipped] == [f"{path}:2", f"{path}:4"]
    assert all("not valid UTF-8" in s.reason for s in rows.skipped)
