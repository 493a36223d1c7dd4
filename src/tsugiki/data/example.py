"""One example: the tokens that the model sees, and which of them are trained.

Knows no template and no lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from tsugiki.data.row import Row, RowProblem

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """What the model sees: ids, and labels of the same length (-100 = not trained).

    key: rows with one key stay on one side of a split. row: what it was made of, for windowing.
    raw: plain text, which may be split. single: one answer of several, `row` ends with it.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    source: str
    key: str = ""
    row: Row | None = None
    raw: bool = False
    single: bool = False

    @property
    def labelled(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


def make_example(
    ids: list[int],
    spans: list[tuple[int, int]],
    row: Row,
    key: str,
    everything: int | None,
    unlearnt: list[tuple[list[int], int]],
) -> Example:
    """An example whose answers are trained, or all of it.

    Args:
        spans: where each answer begins and ends.
        everything: from this token on all is trained, not the answers alone.
        unlearnt: answers of weight 0, each with all that comes before it, and where it begins.

    Raises:
        RowProblem: one of these is not where it should be.
    """
    labels = [IGNORED] * len(ids)
    for begin, end in spans if everything is None else [(everything, len(ids))]:
        labels[begin:end] = ids[begin:end]
    for answer, begin in unlearnt:
        if ids[: len(answer)] != answer:
            raise RowProblem("an answer of weight 0 cannot be located")
        labels[begin : len(answer)] = [IGNORED] * (len(answer) - begin)
    return Example(tuple(ids), tuple(labels), row.source, key, row)
