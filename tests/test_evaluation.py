"""Scores on a model whose answers are known, and baselines by hand."""

from __future__ import annotations

import pytest
from engine_tiny import byte_tokenizer, tiny_base

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message, Row
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import DataError
from tsugiki.evaluation.tasks import (
    Answer,
    Score,
    few_shot,
    group_scores,
    nearest_answers,
    question_and_answer,
    score_answers,
    shuffled_answers,
)


def row(question: str, answer: str, number: int = 0) -> Row:
    messages = (Message("user", question), Message("assistant", answer))
    return Row(messages, None, f"rows.jsonl:{number}")


def test_exact_is_up_to_white_space_and_composition() -> None:
    def answer(expected: str, text: str) -> bool:
        return Answer("q", expected, text, True, "s").exact

    assert answer("a b", " a  b\n")
    assert answer("が", "か\u3099")
    assert not answer("a b", "ab")
    assert not answer("A", "a")


def test_rows_are_asked_as_chat_asks_them() -> None:
    base = tiny_base("llama")
    engine, chat = Engine(base), ChatFormat.of(byte_tokenizer(), "plain")
    questions = ["hello", "東京", "what?"]
    told = []
    for question in questions:
        ids = tuple(chat.prompt_ids([Message("user", question)]))
        request = Request(ids, sampling=Sampling(max_tokens=6), stop_ids=chat.stop_ids)
        told.append(engine.complete([request])[0])
    rows = [row(q, t.text or "?", i) for i, (q, t) in enumerate(zip(questions, told, strict=True))]
    rows.append(row("hello", "never this", 3))
    score = score_answers(engine, chat, rows, max_tokens=6)
    assert [a.exact for a in score.answers] == [True, True, True, False]
    assert score.exact == 0.75
    assert [a.stopped for a in score.answers[:3]] == [t.finish == "stop" for t in told]
    shown = score_answers(engine, chat, rows[:1], max_tokens=6, examples=rows[1:3])
    assert shown.answers[0].text != score.answers[0].text, "the examples were not seen"


def test_few_shot_keeps_the_system_turn_first() -> None:
    prompt = [Message("system", "rules"), Message("user", "q")]
    turns = few_shot(prompt, [row("a", "1"), row("b", "2")])
    assert [m.content for m in turns] == ["rules", "a", "1", "b", "2", "q"]


def test_the_nearest_row_answers() -> None:
    train = [
        row("turn on the lamp", "lamp on"),
        row("電気を消して", "消灯"),
        row("play music", "♪"),
    ]
    score = nearest_answers(train, [row("turn on the lamps", "lamp on"), row("電気を消す", "x")])
    assert [a.text for a in score.answers] == ["lamp on", "消灯"]
    assert score.exact == 0.5


def test_shuffled_answers_keep_the_answers_but_not_the_pairs() -> None:
    rows = [row(f"q{i}", f"a{i}", i) for i in range(9)]
    dealt = shuffled_answers(rows, seed=3)
    pairs = [(r.messages[0].content, r.messages[1].content) for r in dealt]
    assert [q for q, _ in pairs] == [f"q{i}" for i in range(9)]
    assert sorted(a for _, a in pairs) == [f"a{i}" for i in range(9)]
    assert all(q[1:] != a[1:] for q, a in pairs)
    assert shuffled_answers(rows, seed=3) == dealt
    assert rows[0].messages[1].content == "a0"


def test_groups() -> None:
    score = Score(
        tuple(Answer("q", "x", text, True, source) for text, source in ["xa", "xb", "yb"])
    )
    groups = group_scores(score, lambda a: a.source)
    assert {name: len(s.answers) for name, s in groups.items()} == {"a": 1, "b": 2}
    assert groups["b"].exact == 0.5


def test_refusals() -> None:
    engine, chat = Engine(tiny_base("llama")), ChatFormat.of(byte_tokenizer(), "plain")
    with pytest.raises(DataError, match="no rows"):
        score_answers(engine, chat, [])
    with pytest.raises(DataError, match=r"rows\.jsonl:7"):
        question_and_answer(Row((Message("user", "q"),), None, "rows.jsonl:7"))
