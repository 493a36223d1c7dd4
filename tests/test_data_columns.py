"""Rows of any other layout: columns, templates, the flags proposed for them, odd writers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_formats import lines, told, write

from tsugiki.data.formats import read_rows
from tsugiki.errors import DataError
from tsugiki.spellings import columns


def test_columns_templates_and_an_index(tmp_path: Path) -> None:
    row = {"q": "which?", "choice0": "a", "choice1": "b", "list": ["x", "y"],
           "by": {"u": "v"}, "label": 1, "key": "u"}  # fmt: skip
    path = write(tmp_path, "a.jsonl", lines(row))
    by_columns = read_rows(path, columns={"prompt": "q", "answer": "choice[label]"})
    assert told(by_columns) == [[("user", "which?"), ("assistant", "b")]]
    templated = read_rows(
        path, prompt_template="Q: {q} {choice0}|{choice1}", answer_template="{list[label]}{by[key]}"
    )
    assert told(templated) == [[("user", "Q: which? a|b"), ("assistant", "yv")]]
    with pytest.raises(DataError, match="both the prompt and the answer"):
        read_rows(path, columns={"prompt": "q"})
    for wrong in ("{nowhere}", "{list[7]}", "{list[q]}", "{by[q]}", "{choice[q]}"):
        with pytest.raises(DataError, match=r"a\.jsonl(:1)?: .*(no column|is not there)"):
            read_rows(path, prompt_template="{q}", answer_template=wrong)


def test_templates_that_name_no_column_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"q": "x", "a": "y"}))
    for prompt, answer in (("{q}", "fine"), ("{q", "{a}"), ("q}", "{a}"), ("{q}", "{a")):
        with pytest.raises(DataError, match="template names no column"):
            read_rows(path, prompt_template=prompt, answer_template=answer)
    same = read_rows(path, prompt_template="Go on:", answer_template="{a}")
    assert told(same) == [[("user", "Go on:"), ("assistant", "y")]]


UNKNOWN: dict[str, tuple[dict[str, object], list[object]]] = {
    "a label": (
        {"q_id": 0, "question": "which?", "choice0": "a", "choice1": "b", "label": 1},
        [("user", "which?\na\nb"), ("assistant", "b")],
    ),
    "Japanese": (
        {"番号": 1, "出した指示": "訳せ", "その入力": "犬", "正しい回答": "yes", "出典": "x"},
        [("user", "訳せ\n犬"), ("assistant", "yes")],
    ),
    "an answer and what explains it": (
        {"問題": "首都は?", "正解": "東京", "解説": "明治から"},
        [("user", "首都は?"), ("assistant", "東京")],
    ),
    "chosen": (
        {"prompt": "q", "chosen": "a", "rejected": "b"}, [("user", "q"), ("assistant", "a")]
    ),
    "commas": ({"Q, please": "q", "A = b": "a"}, [("user", "q"), ("assistant", "a")]),
    "brackets": ({"q": "q", "answer[en]": "a"}, [("user", "q"), ("assistant", "a")]),
    "a class": ({"sentence": "nice", "class": 3}, [("user", "nice"), ("assistant", "3")]),
    "two sentences and the number of a class": (
        {"sentence_pair_id": "0", "sentence1": "s", "sentence2": "t", "label": 1},
        [("user", "s\nt"), ("assistant", "1")],
    ),
    "two sentences and how alike": (
        {"sentence1": "s", "sentence2": "t", "score": 2.4}, [("user", "s\nt"), ("assistant", "2.4")]
    ),
    "two sentences and a class": (
        {"premise": "s", "hypothesis": "t", "label": "entailment"},
        [("user", "s\nt"), ("assistant", "entailment")],
    ),
    "a class by its name": (
        {"sentence": "s", "label": 0, "label_text": "bad"}, [("user", "s"), ("assistant", "bad")]
    ),
    "a title and a text": (
        {"url": "u", "title": "s", "article": "t", "summary": "a"},
        [("user", "s\nt"), ("assistant", "a")],
    ),
    "a thought": (
        {"Question": "q", "Complex_CoT": "so", "Response": "a"},
        [("user", "q"), ("assistant", "so\na")],
    ),
    "a premise": (
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "q", "label": 2},
        [("user", "q\np\na\nb"), ("assistant", "b")],
    ),
    "a solution and its answer": (
        {"problem": "q", "generated_solution": "so", "expected_answer": "a"},
        [("user", "q"), ("assistant", "so\na")],
    ),
    "a thought alone": ({"query": "q", "rationale": "a"}, [("user", "q"), ("assistant", "a")]),
    "two languages": ({"en": "q", "ja": "a", "score": 0.8}, [("user", "q"), ("assistant", "a")]),
    "a list": ({"question": "q", "answers": ["a", "b"]}, [("user", "q"), ("assistant", "a")]),
    "SQuAD": (
        {"id": "0", "title": "t", "context": "c", "question": "q",
         "answers": {"text": ["a"], "answer_start": [0]}},
        [("user", "q\nc"), ("assistant", "a")],
    ),
    "a system prompt": (
        {"id": "0", "system_prompt": "s", "question": "q", "response": "a"},
        [("system", "s"), ("user", "q"), ("assistant", "a")],
    ),
    "a system prompt and a context": (
        {"system": "s", "query": "q", "passage": "c", "reply": "a"},
        [("system", "s"), ("user", "q\nc"), ("assistant", "a")],
    ),
    "one name that is another's part": (
        {"original_question": "o", "query": "q", "response": "a"},
        [("user", "q"), ("assistant", "a")],
    ),
    "no name that says it alone": (
        {"title": "t", "question_text": "q", "answer_text": "a"},
        [("user", "q"), ("assistant", "a")],
    ),
    "a system prompt that is the prompt": (
        {"system_prompt": "s", "response": "a"}, [("user", "s"), ("assistant", "a")]
    ),
    "a rated pair": (
        {"source": "x", "prompt": "q", "chosen": "a", "rejected": "b", "chosen_model": "m"},
        [("user", "q"), ("assistant", "a")],
    ),
    "CommonsenseQA": (
        {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        [("user", "q"), ("assistant", "y")],
    ),
    "a numbered text": ({"id": "0", "story": "once"}, ["once"]),
    "one column": ({"story": "once"}, ["once"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_layout_shows_the_columns_and_flags_that_work(tmp_path: Path, kind: str) -> None:
    row, wanted = UNKNOWN[kind]
    path = write(tmp_path, "a.jsonl", lines(row))
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert ", ".join(row) in str(caught.value)
    flags = dict(zip(caught.value.flags[::2], caught.value.flags[1::2], strict=True))
    named = columns(flags["--columns"]) if "--columns" in flags else {}
    (found,) = read_rows(
        path,
        columns=named,
        prompt_template=flags.get("--prompt-template"),
        answer_template=flags.get("--answer-template"),
    ).rows
    assert ([(m.role, m.content) for m in found.messages] or [found.text]) == wanted


def test_blanks_around_a_columns_name_are_not_part_of_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"instruction ": "q", "\u3000output": "a"}))
    (found,) = read_rows(path).rows
    assert [m.content for m in found.messages] == ["q", "a"]
    path = write(tmp_path, "b.csv", "asks , tells\nq,a\n")
    (found,) = read_rows(path, columns={"prompt": "asks", "answer": "tells"}).rows
    assert [m.content for m in found.messages] == ["q", "a"]
    path = write(tmp_path, "c.jsonl", lines({"text": "one", "text ": "two"}))
    assert [row.text for row in read_rows(path).rows] == ["one"], "both names stay where they clash"


def test_an_odd_choice_costs_its_row_and_a_null_system_prompt_nothing(tmp_path: Path) -> None:
    choices = {"label": ["A"], "text": ["x"]}
    path = write(tmp_path, "a.jsonl", lines(
        {"q": "1", "s": None, "choices": choices, "key": "A"},
        {"q": "2", "s": "s", "choices": choices, "key": ["A"]},
        {"q": "3", "s": "s", "choices": choices | {"label": [["A"]]}, "key": "A"},
        {"q": "4", "s": "s", "choices": choices | {"label": None}, "key": "A"},
    ))  # fmt: skip
    rows = read_rows(path, columns={"prompt": "q", "answer": "choices[key]", "system": "s"})
    assert told(rows) == [[("user", "1"), ("assistant", "x")]]
    assert len(rows.skipped) == 3
    assert all("is not there" in skip.reason for skip in rows.skipped)


def test_a_backslash_n_from_a_shell_is_a_new_line_and_told(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"q": "x", "a": "y"}))
    typed = read_rows(path, prompt_template=r"{q}\nA or B?", answer_template="{a}")
    assert told(typed) == [[("user", "x\nA or B?"), ("assistant", "y")]]
    assert typed.notes == (r"the two characters \n in the prompt template are read as a new line",)
    real = read_rows(path, prompt_template="{q}\n\\n", answer_template="{a}")  # LaTeX stays
    assert (told(real)[0][0], real.notes) == (("user", "x\n\\n"), ())


@pytest.mark.parametrize(
    "row",
    [
        {"data": {"question": "q"}},
        {"title": "t", "paragraphs": [{}]},
        {"{": "q", "}": "a"},
        {"question": "q", "context": "c", "answers": []},
        {"id": "7", "turns": [5, "a"], "x": "q"},
        {"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"},
        {"source": "evol", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [{}], "rejected": [{}], "score_chosen": 1.0, "chosen-model": "m"},
        {"q1": "q", "a1": "a", "q2": "r", "a2": "b"},
        {"question1": "q", "answer1": "a", "question2": "r", "answer2": "b"},
        {"system": "s", "chat": "USER: q ASSISTANT: a"},
        {"name": "m", "talk": [{}], "turn": 1, "tone": "mild"},
        {"question": "q", "choices": ["a", "b"]},
        {"sentence1": "s", "sentence2": "t"},
        {"puzzle": "q", "hint": "h", "reply": "a"},
        {"question": "q", "hint": "h", "remark": "r"},
        {"name": "a", "city": "b", "job": "c", "age": "d", "label": 1},
    ],
)
def test_no_flags_are_proposed_that_would_not_work(tmp_path: Path, row: dict[str, object]) -> None:
    with pytest.raises(DataError, match="make each row an object with a prompt and") as caught:
        read_rows(write(tmp_path, "a.jsonl", lines(row)))
    assert caught.value.flags == ()
    texts = sum(isinstance(held, str) for held in row.values())
    assert ("--prompt-template" in str(caught.value.fix)) == (texts > 1)


def test_rows_as_programs_write_them(tmp_path: Path) -> None:
    pairs = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    wanted = [[("user", p["question"]), ("assistant", p["answer"])] for p in pairs]
    table = "".join(f"{p['question']};{p['answer']}\n" for p in pairs)
    for name, content in (
        ("semicolons.csv", "question;answer\n" + table),
        ("tabs.csv", "question\tanswer\n" + table.replace(";", "\t")),
        ("pandas.csv", ",question,answer\n" + "".join(
            f"{i},{p['question']},{p['answer']}\n" for i, p in enumerate(pairs))),
        ("one_line.jsonl", json.dumps(pairs)),
        ("indented.jsonl", json.dumps(pairs, indent=1)),
    ):  # fmt: skip
        rows = read_rows(write(tmp_path, name, content))
        assert (told(rows), rows.skipped) == (wanted, []), name
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert len(read_rows(write(tmp_path, "turns.jsonl", lines(dialogue, dialogue))).rows) == 2
    assert len(read_rows(write(tmp_path, "turn.jsonl", json.dumps(dialogue))).rows) == 1


def test_nan_is_null_in_parquet(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    table = Table.from_pylist([{"question": "q", "answer": v} for v in (1.5, float("nan"))])
    write_table(table, tmp_path / "a.parquet")
    rows = read_rows(tmp_path / "a.parquet")
    assert told(rows) == [[("user", "q"), ("assistant", "1.5")]]
    assert "'answer' is null" in rows.skipped[0].reason
