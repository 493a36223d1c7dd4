"""SQuAD's own files (JSQuAD's too): articles of paragraphs of questions → one row a question.

Knows one article at a time, read already; no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def is_article(row: Any) -> bool:
    """Whether a row of a JSON list is an article with questions in its paragraphs."""
    paragraphs = row.get("paragraphs") if isinstance(row, dict) else None
    return (
        isinstance(paragraphs, list)
        and bool(paragraphs)
        and all(isinstance(p, dict) and isinstance(p.get("qas"), list) for p in paragraphs)
    )


def questions(article: dict[str, Any]) -> Iterator[Any]:
    """Rows of question, context and answer: its first, None where there is none."""
    for paragraph in article["paragraphs"]:
        for asked in paragraph["qas"]:
            if not isinstance(asked, dict):
                yield asked
                continue
            yield {
                "question": asked.get("question"),
                "context": paragraph.get("context"),
                "answer": _first(asked.get("answers", asked.get("answer"))),
            }


def _first(answers: Any) -> Any:
    """The first of several, as a text or within an object; None where there is none."""
    while isinstance(answers, list | dict):
        if isinstance(answers, dict):
            answers = answers.get("text")
        else:
            answers = answers[0] if answers else None
    return answers
