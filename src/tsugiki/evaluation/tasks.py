"""Scores answers on held-out rows: exact matches, how many end by themselves, and baselines.

Each row is asked as chat would ask it: the last turn is the answer, the turns before it the
prompt. Baselines that need no training stand beside it: the answer of the most similar training
row, and the base with examples in its prompt. Knows no training loop and no terminal.
"""

from __future__ import annotations

import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message, Row
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import DataError


@dataclass(frozen=True)
class Answer:
    """One row asked and answered. expected: what the row says."""

    question: str
    expected: str
    text: str
    stopped: bool
    source: str

    @property
    def exact(self) -> bool:
        """Equal after NFC and with runs of white space as one space, none at the ends."""
        return _plain(self.text) == _plain(self.expected)


@dataclass(frozen=True)
class Score:
    """Answers of one way of answering."""

    answers: tuple[Answer, ...]

    @property
    def exact(self) -> float:
        """Share of answers that are exactly right, 0 to 1."""
        return sum(a.exact for a in self.answers) / len(self.answers)

    @property
    def stopped(self) -> float:
        """Share of answers that ended by the stop token, 0 to 1."""
        return sum(a.stopped for a in self.answers) / len(self.answers)


def score_answers(
    engine: Engine,
    chat: ChatFormat,
    rows: Sequence[Row],
    *,
    adapter: int = -1,
    max_tokens: int = 128,
    examples: Sequence[Row] = (),
) -> Score:
    """Ask every row, greedily, many at once.

    Args:
        rows: each ends with an assistant turn; raw text is refused.
        adapter: index in the engine's pool; -1 is the base (or the model as it is).
        examples: rows put before each question as turns of the same chat (few-shot).

    Raises:
        DataError: no rows, a row without an answer at its end.
        UsageError: a prompt that does not fit the context.
    """
    if not rows:
        raise DataError("there are no rows to score")
    pairs = [question_and_answer(row) for row in rows]
    requests = [
        Request(
            tuple(chat.prompt_ids(few_shot(before, examples))),
            adapter=adapter,
            sampling=Sampling(max_tokens=max_tokens),
            stop_ids=(*chat.stop_ids, *engine.base.stop_ids),
        )
        for before, _ in pairs
    ]
    done = engine.complete(requests)
    return Score(
        tuple(
            Answer(before[-1].content, expected, got.text, got.finish == "stop", row.source)
            for (before, expected), got, row in zip(pairs, done, rows, strict=True)
        )
    )


def question_and_answer(row: Row) -> tuple[tuple[Message, ...], str]:
    """The turns before a row's last answer, and that answer.

    Raises:
        DataError: the row does not end with an answer to something.
    """
    if len(row.messages) < 2 or row.messages[-1].role != "assistant":
        raise DataError(
            f"{row.source}: no question and answer to score",
            allowed="a row that ends with an assistant turn",
        )
    return row.messages[:-1], row.messages[-1].content


def few_shot(prompt: Sequence[Message], examples: Sequence[Row]) -> list[Message]:
    """A prompt with examples before it, as earlier turns of one chat.

    The prompt's own system turn stays first; the examples' are left out.
    """
    system = [m for m in prompt if m.role == "system"]
    shown = [m for row in examples for m in row.messages if m.role != "system"]
    return [*system, *shown, *(m for m in prompt if m.role != "system")]


def nearest_answers(train: Sequence[Row], rows: Sequence[Row]) -> Score:
    """What copying gives: each row answered with the answer of the most similar training row.

    Similarity is the cosine of character 3-gram counts, which works for Japanese as for English.

    Raises:
        DataError: no rows to copy from or to score, a row without an answer.
    """
    if not train or not rows:
        raise DataError("there are no rows to compare")
    known = [question_and_answer(row) for row in train]
    index: dict[str, list[tuple[int, float]]] = {}
    for number, (before, _) in enumerate(known):
        for gram, weight in _grams(before[-1].content).items():
            index.setdefault(gram, []).append((number, weight))
    answers = []
    for row in rows:
        before, expected = question_and_answer(row)
        likeness = [0.0] * len(known)
        for gram, weight in _grams(before[-1].content).items():
            for number, other in index.get(gram, ()):
                likeness[number] += weight * other
        best = max(range(len(known)), key=likeness.__getitem__)
        answers.append(Answer(before[-1].content, expected, known[best][1], True, row.source))
    return Score(tuple(answers))


def shuffled_answers(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with their last answers dealt to other rows: a control that teaches only the form.

    No row keeps its own answer where there are two or more rows.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    giver = dict(zip(order, order[-1:] + order[:-1], strict=True))  # one cycle: nobody is left out
    return [_with_answer(row, question_and_answer(rows[giver[i]])[1]) for i, row in enumerate(rows)]


def group_scores(score: Score, group: Callable[[Answer], str]) -> dict[str, Score]:
    """Scores of the answers apart by group, in the order in which the groups appear."""
    groups: dict[str, list[Answer]] = {}
    for answer in score.answers:
        groups.setdefault(group(answer), []).append(answer)
    return {name: Score(tuple(answers)) for name, answers in groups.items()}


def _with_answer(row: Row, answer: str) -> Row:
    return replace(row, messages=(*row.messages[:-1], Message("assistant", answer)))


def _grams(text: str) -> dict[str, float]:
    padded = f"  {_plain(text)}  "
    counts = Counter(padded[i : i + 3] for i in range(len(padded) - 2))
    norm = sum(n * n for n in counts.values()) ** 0.5
    return {gram: n / norm for gram, n in counts.items()}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
