"""What belongs to a row: columns that join the prompt, weights, thoughts, calls, and what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_formats import ANSWER, GOOD, USER, lines, told, turns, write

from tsugiki.data.formats import read_rows
from tsugiki.data.layouts import detect
from tsugiki.errors import DataError

JOINED: dict[str, tuple[dict[str, object], str]] = {
    "instruction + input/response": ({"instruction": "q", "input": "m", "response": "a"}, "q\nm"),
    "instruction + context/response": (
        {"instruction": "q", "context": "m", "response": "a"}, "q\nm"
    ),
    "question + context/answer": ({"question": "q", "context": "m", "answer": "a"}, "q\nm"),
    "prompt + input + context/completion": (
        {"context": "c", "prompt": "q", "input": 5, "completion": "a"}, "q\n5\nc"
    ),
    "input + context/output": ({"input": "q", "context": "m", "output": "a"}, "q\nm"),
    "alpaca + context": ({"instruction": "q", "context": "m", "output": "a"}, "q\nm"),
    "alpaca": ({"instruction": "q", "input": 0.5, "context": "", "output": "a"}, "q\n0.5"),
    "question/answer": ({"question": "q", "context": "", "answer": "a"}, "q"),
    "text/output": ({"text": "q", "output": "a"}, "q"),
}  # fmt: skip


@pytest.mark.parametrize("layout", JOINED)
def test_columns_of_the_prompt_join_it(tmp_path: Path, layout: str) -> None:
    row, asked = JOINED[layout]
    rows = read_rows(write(tmp_path, "a.jsonl", lines(row)))
    assert rows.layout == layout
    assert told(rows) == [[("user", asked), ("assistant", "a")]]
    assert rows.notes == ()


def test_squads_own_files_are_a_row_a_question(tmp_path: Path) -> None:
    asked = [
        {
            "id": "1",
            "question": "q1",
            "answers": [{"text": "a1", "answer_start": 0}, {"text": "b"}],
        },
        {"id": "2", "question": "q2", "answers": [], "is_impossible": True},
        {"id": "3", "question": "q3", "answers": {"text": ["a3"], "answer_start": [0]}},
        "not one",
    ]
    articles = [
        {"title": "t", "paragraphs": [{"context": "c", "qas": asked}, {"context": "d", "qas": []}]},
        {"title": "u", "paragraphs": [{"context": "e", "qas": asked[:1]}]},
    ]
    path = write(tmp_path, "train-v1.1.json", json.dumps({"version": "1.1", "data": articles}))
    rows = read_rows(path)
    assert rows.layout == "question + context/answer"
    assert told(rows) == [
        [("user", "q1\nc"), ("assistant", "a1")], [("user", "q3\nc"), ("assistant", "a3")],
        [("user", "q1\ne"), ("assistant", "a1")],
    ]  # fmt: skip
    assert [skip.source.removeprefix(f"{path} ") for skip in rows.skipped] == [
        "row 1 question 2", "row 1 question 4"
    ]  # fmt: skip
    assert "'answer' is null" in rows.skipped[0].reason


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LISTED: dict[str, dict[str, object]] = {
    "conversation": {"conversation": TALK, "model": "m", "language": "Japanese"},
    "dialogue": {"dialogue": TALK},
    "dialog": {"dialog": ["q", "a"]},
    "data": {"id": "0", "data": ["q", "a"]},
    "input and output": {"conversation": [{"input": "q", "output": "a"}]},
    "JSON text": {"conversation": json.dumps(TALK)},
    "as Python writes": {"messages": "[{'role': 'user', 'content': 'q'},\n"
                                     " {'role': \"assistant\", 'content': 'a', 'weight': None}]"},
    "speaker and text": {"conversations": [
        {"speaker": "人", "text": "q"}, {"speaker": "AI", "text": "a"}]},
    "role and text": {"messages": [
        {"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}]},
    "Japanese roles": {"messages": [
        {"role": "ユーザー", "content": "q"}, {"role": "アシスタント", "content": "a"}]},
    "null beside the key": {"messages": [
        {"role": None, "from": "human", "content": None, "value": "q"},
        {"role": None, "from": "ai", "content": None, "value": "a"}]},
    "parts without a type": {"messages": [
        {"role": "user", "content": [{"text": "q"}]},
        {"role": "assistant", "content": [{"text": "a", "image": None}]}]},
    "parts": {"contents": [
        {"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
    "text/output": {"ID": "0", "text": ["q"], "output": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTED)
def test_lists_of_turns_under_the_names_and_keys_people_use(tmp_path: Path, kind: str) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines(LISTED[kind])))
    assert told(rows) == [[("user", "q"), ("assistant", "a")]]


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"role": "user", "content": [{"text": "q", "image": "x.png"}]}, "only text parts are"),
        ({"role": "user", "content": [{"type": [], "text": "q"}]}, "only text parts are"),
        ({"role": "user", "content": []}, "only text parts are"),
        ({"text": "q"}, "has no role"),
        ({"speaker": "Bob", "text": "q"}, "unknown role 'Bob'"),
    ],
)
def test_turns_that_are_not_understood_cost_their_row(
    tmp_path: Path, turn: object, why: str
) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines(turns(turn, ANSWER), turns(USER, ANSWER))))
    assert len(rows.rows) == 1
    assert why in rows.skipped[0].reason


@pytest.mark.parametrize("name", ["conversation", "dialogue", "dialog", "contents", "data"])
def test_other_lists_under_these_names_leave_the_layout(tmp_path: Path, name: str) -> None:
    row = {"question": "q", "answer": "a", name: ["x", "y"]}
    other = {"text": "once", name: [1, 2]}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(row, other)))
    assert rows.layout == "1 question/answer, 1 text"


@pytest.mark.parametrize("system", [[{"text": "s"}], {"role": "system", "parts": [{"text": "s"}]}])
def test_a_system_prompt_in_parts(tmp_path: Path, system: object) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines({"system": system} | turns(USER, ANSWER))))
    assert told(rows) == [[("system", "s"), ("user", "q"), ("assistant", "a")]]


def test_a_list_of_questions_and_one_of_as_many_answers_are_turns(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines(
        {"text": ["q", "r"], "output": ["a", "b"], "system": "s"},
        {"text": ["q", "r"], "output": ["a", ""]}, {"prompt": ["q"], "response": ["a", "b"]},
    )))  # fmt: skip
    assert rows.layout == "text/output"
    wanted = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert told(rows) == [[("system", "s"), *wanted]]
    reasons = [skip.reason for skip in rows.skipped]
    assert reasons == ["turn 4: the answer is empty", "the column 'prompt' is not a text"]


@pytest.mark.parametrize(
    "held", ["[{'role': print('x')}]", "[{'role': b'user'}]", "[{'role': 1e999}]", "[{'a': '\\d'"]
)
def test_only_values_that_json_has_are_taken_from_python(tmp_path: Path, held: str) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines({"messages": held}, GOOD)))
    assert "the column 'messages' is not valid JSON" in rows.skipped[0].reason


def test_texts_alone_are_turns_one_after_the_other(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines(
        {"conversations": ["q", "a", "r", "b"]}, {"conversations": ["q"]},
        {"conversations": ["q", {"from": "gpt", "value": "a"}]}, {"conversations": ["q", ""]},
    )))  # fmt: skip
    assert told(rows) == [[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]]
    assert [skip.reason for skip in rows.skipped[:2]] == ["turn 1 is not an object"] * 2
    assert "the answer is empty" in rows.skipped[2].reason


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "システム"])
@pytest.mark.parametrize(
    "row",
    [
        turns(USER, ANSWER),
        {"conversations": [USER, ANSWER]},
        {"prompt": "q", "response": "a"},
        {"指示": "q", "回答": "a"},
    ],
)
def test_a_column_with_a_system_prompt_is_the_system_turn(
    tmp_path: Path, row: dict[str, object], name: str
) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines({name: "s"} | row, {name: None} | row)))
    asked = [("user", "q"), ("assistant", "a")]
    assert told(rows) == [[("system", "s"), *asked], asked]
    assert rows.notes == ()


def test_a_system_turn_is_kept_and_the_column_beside_it_named(tmp_path: Path) -> None:
    own = turns({"role": "system", "content": "own"}, USER, ANSWER) | {"system": "s"}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(own)))
    assert told(rows) == [[("system", "own"), ("user", "q"), ("assistant", "a")]]
    assert rows.notes == ("columns not used: system",)


@pytest.mark.parametrize("listed", [False, True])
def test_completions_labelled_false_are_not_learnt(tmp_path: Path, listed: bool) -> None:
    row = {"prompt": [USER], "completion": [ANSWER]} if listed else GOOD
    path = write(tmp_path, "a.jsonl", lines(row | {"label": True}, row | {"label": False}))
    rows = read_rows(path)
    assert (len(rows.rows), rows.notes) == (1, ())
    (skip,) = rows.skipped
    assert skip.source == f"{path}:2"
    assert skip.reason == "'label' is false: the completion is not one to learn"
    other = read_rows(write(tmp_path, "b.jsonl", lines(row | {"label": 0})))
    assert (len(other.rows), other.skipped) == (1, [])


def test_messages_of_a_tree_are_not_texts(tmp_path: Path) -> None:
    row = {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "a reply"}
    with pytest.raises(DataError, match="join it with its parents, by parent_id") as caught:
        read_rows(write(tmp_path, "a.jsonl", lines(row)))
    assert caught.value.flags == ()
    mixed = read_rows(write(tmp_path, "c.jsonl", lines({"text": "t"}, row)))
    assert [one.text for one in mixed.rows] == ["t"]
    asked = read_rows(write(tmp_path, "b.jsonl", lines(row)), columns={"text": "text"})
    assert [one.text for one in asked.rows] == ["a reply"]


def test_a_label_beside_a_text_is_offered(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "a.jsonl", lines({"text": "nice", "label": 1, "date": "x"})))
    assert rows.layout == "text"
    flags = "--columns prompt=text,answer=label"
    assert rows.notes == (f"columns not used: label, date (to use one: {flags})",)
    for odd in ("language_score", "source_code", "answer, final", "label{x}", "subclass"):
        rows = read_rows(write(tmp_path, "b.jsonl", lines({"text": "nice", odd: "1"})))
        assert rows.notes == (f"columns not used: {odd}",)
    listed = read_rows(write(tmp_path, "c.jsonl", lines({"text": "nice", "output": ["a"]})))
    assert (listed.layout, listed.rows[0].text) == ("text", "nice")


def test_history_is_earlier_turns(tmp_path: Path) -> None:
    row = {"instruction": "q", "input": "", "output": "a", "system": "s"}
    pairs = [["q1", "a1"], ["q2", "a2"]]
    wanted = [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"),
              ("assistant", "a2"), ("user", "q"), ("assistant", "a")]  # fmt: skip
    as_turns = [USER, ANSWER]
    path = write(tmp_path, "a.jsonl", lines(
        row | {"history": pairs}, row | {"history": json.dumps(pairs)},
        row | {"history": as_turns}, row | {"history": []}, row | {"history": [["q1"]]},
    ))  # fmt: skip
    rows = read_rows(path)
    assert rows.layout == "alpaca + history"
    assert told(rows)[:2] == [wanted, wanted]
    assert [len(talk) for talk in told(rows)] == [7, 7, 5, 3]
    assert "not a list of [question, answer]" in rows.skipped[0].reason


def test_columns_that_are_not_used_are_named_once_with_how_to_use_one(tmp_path: Path) -> None:
    row = {"id": 1, "question": "q", "context": "c", "answer": "a", "level": "hard", "none": None}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(row, row)))
    flags = "--prompt-template '{question}\\n{context}\\n{level}' --answer-template '{answer}'"
    assert rows.notes == (f"columns not used: id, level (to use one: {flags})",)
    rows = read_rows(
        tmp_path / "a.jsonl",
        prompt_template=r"{question}\n{context}\n{level}",
        answer_template="{answer}",
    )
    assert told(rows)[0] == [("user", "q\nc\nhard"), ("assistant", "a")]
    assert rows.notes[1:] == ("columns not used: id",)
    many = {f"c{i}": i for i in range(9)} | turns(USER, ANSWER)
    found = read_rows(write(tmp_path, "b.jsonl", lines(many)))
    assert found.notes == ("columns not used: c0, c1, c2, c3, c4, c5, … 3 more",)


def test_a_thought_that_is_not_used_is_offered_before_the_answer(tmp_path: Path) -> None:
    row = {"question": "q", "reasoning": "so", "answer": "a"}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(row)))
    flags = "--prompt-template '{question}' --answer-template '{reasoning}\\n{answer}'"
    assert rows.notes == (f"columns not used: reasoning (to use one: {flags})",)


def test_an_index_uses_the_columns_that_it_chooses_among(tmp_path: Path) -> None:
    row = {"q": "which?", "choice0": "a", "choice1": "b", "label": 1, "from": "x"}
    path = write(tmp_path, "a.jsonl", lines(row))
    rows = read_rows(path, columns={"prompt": "q", "answer": "choice[label]"})
    assert rows.notes == ("columns not used: from",)


def test_thoughts_are_kept_and_unknown_keys_named(tmp_path: Path) -> None:
    answer = ANSWER | {"reasoning_content": "so", "thinking": "thus", "loss": 1, "audio": None}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(turns(USER, answer), turns(USER, answer))))
    extra = dict(rows.rows[0].messages[1].extra)
    assert extra == {"reasoning_content": "so", "thinking": "thus"}
    assert rows.notes == ("keys of turns not used: loss",)
    bad = read_rows(write(tmp_path, "b.jsonl", lines(
        turns(USER, ANSWER), turns(USER, ANSWER | {"thinking": [1]}),
        turns(USER, {"role": "assistant", "content": "", "reasoning_content": "so"}),
    )))  # fmt: skip
    assert [s.reason for s in bad.skipped] == [
        "turn 2: 'thinking' is not a text", "turn 2: the answer is empty"
    ]  # fmt: skip


def test_weight_0_keeps_an_answer_untrained(tmp_path: Path) -> None:
    off = ANSWER | {"weight": 0}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(
        turns(USER, off, USER, ANSWER | {"weight": 1}),
        turns(USER, ANSWER, USER, off),
        turns(USER, off, USER, off),
        turns(USER, ANSWER | {"weight": 0.5}),
    )))  # fmt: skip
    assert [[m.trained for m in row.messages] for row in rows.rows] == [
        [True, False, True, True], [True, True]
    ]  # fmt: skip
    assert [s.reason for s in rows.skipped] == [
        "every answer has weight 0: nothing to train on",
        "turn 2: weight '0.5' is neither 0 nor 1",
    ]


def test_each_row_is_read_by_its_own_layout(tmp_path: Path) -> None:
    asked = {"question": "q", "answer": "a"}
    path = write(tmp_path, "a.jsonl", lines(
        {"odd": 1}, {"text": "once"}, asked, turns(USER, ANSWER), asked, GOOD, {"question": "q"}
    ))  # fmt: skip
    rows = read_rows(path)
    assert rows.layout == "2 question/answer, 1 text, 1 messages, 1 prompt/completion"
    assert [(s.source.rsplit(":")[-1], s.reason) for s in rows.skipped] == [
        ("1", "layout not known (columns: odd)"),
        ("7", "no column 'prompt' (columns: question)"),
    ]
    given = read_rows(path, columns={"prompt": "question", "answer": "answer"})
    assert (given.layout, len(given.rows)) == ("columns", 2)


def test_lists_of_turns_as_json_text(tmp_path: Path) -> None:
    held = json.dumps([USER, ANSWER])
    cell = held.replace('"', '""')
    path = write(tmp_path, "a.csv", f'id,messages\n0,"{cell}"\n1,"{cell[:-1]}"\n')
    rows = read_rows(path)
    assert told(rows) == [[("user", "q"), ("assistant", "a")]]
    assert "the column 'messages' is not valid JSON" in rows.skipped[0].reason
    row = {"conversations": held}
    assert read_rows(write(tmp_path, "b.jsonl", lines(row))).layout == "sharegpt"


def called(value: object) -> dict[str, object]:
    return {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": value},
        {"from": "observation", "value": "sun"}, {"from": " Gpt ", "value": "a"},
    ]}  # fmt: skip


def test_llama_factorys_function_calls(tmp_path: Path) -> None:
    good = {"name": "w", "arguments": {"at": 1}}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(
        called(json.dumps(good)),
        called(json.dumps([good | {"arguments": '{"at": 1}'}])),
        called("w(1)"), called('{"arguments": {}}'), called('{"name": "w", "arguments": 5}'),
    )))  # fmt: skip
    wanted = [("user", "q"), ("assistant", ""), ("tool", "sun"), ("assistant", "a")]
    assert told(rows) == [wanted, wanted]
    for row in rows.rows:
        assert row.messages[1].extra == (("tool_calls", [{"type": "function", "function": good}]),)
    assert [s.reason.split(" is ")[1][:14] for s in rows.skipped] == [
        "not valid JSON", "without a name", "without an obj"
    ]  # fmt: skip


def test_other_lists_of_one_object_are_named(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a"}
    path = write(tmp_path, "a.json", json.dumps({"train": [row], "test": [row], "version": "1"}))
    (note,) = read_rows(path).notes
    assert "only 'train' is read, not 'test'" in note
    assert "--eval-data" in note
    single = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert len(read_rows(write(tmp_path, "b.json", json.dumps(single))).rows) == 1


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_mostly_another_encoding_is_one_error_with_the_fix(tmp_path: Path, name: str) -> None:
    pairs = [("what?", "this"), *((f"これは{i}", "はい") for i in range(3))]
    made = {
        "a.csv": "question,answer\n" + "".join(f"{q},{a}\n" for q, a in pairs),
        "a.jsonl": lines(*({"question": q, "answer": a} for q, a in pairs)),
    }[name]
    path = write(tmp_path, name, made.encode("cp932"))
    with pytest.raises(DataError, match="most rows are not valid UTF-8") as caught:
        read_rows(path)
    assert "iconv -f cp932" in str(caught.value.fix)
    assert "3 of 4" in str(caught.value.got)
    write(tmp_path, "b.jsonl", lines(GOOD))
    assert any("iconv -f cp932" in note for note in read_rows(tmp_path).notes)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"text": "a long text", "data": ["a", "b"]}, "text"),
        ({"question": "q", "answer": "a", "dialogue": [{"speaker": "Amy", "text": "hi"}]},
         "question/answer"),
        ({"prompt": "p", "completion": "c", "contents": [{"role": "user"}]}, "prompt/completion"),
        ({"dialogue": ["hi", "ho"], "summary": "they greet"}, None),
        ({"dialogue": [{"speaker": "Amy", "text": "hi"}], "summary": "s"}, None),
    ],
)  # fmt: skip
def test_lists_under_other_names_stand_behind_what_is_plain(
    row: dict[str, object], layout: str | None
) -> None:
    assert detect(row) == layout
