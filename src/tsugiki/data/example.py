"""One example: the tokens that the model sees, and which of them are trained.

Knows no template and no lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

from tsugiki.data.row import Row

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
