"""A vocabulary on its way into GGUF: id → text, type and score. Knows no tokenizer's arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import TokenType

from tsugiki.errors import ModelError

SPACE = "▁"
SHOWN = 4


@dataclass(frozen=True)
class Piece:
    """One entry of tokenizer.model."""

    text: str
    score: float
    kind: TokenType


@dataclass
class Vocabulary:
    """id → text, type and score, as they are collected."""

    texts: list[str]
    kinds: list[int]
    scores: list[float]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int) -> Vocabulary:
        """Every row of the embedding, not yet named."""
        texts = [f"[PAD{i}]" for i in range(rows)]
        return cls(texts, [int(TokenType.UNUSED)] * rows, [-10000.0] * rows)

    def put(self, index: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Name one id."""
        self.texts[index], self.kinds[index], self.scores[index] = text, int(kind), score

    def add(self, added: Sequence[Mapping[str, Any]]) -> None:
        """Lay added tokens over the vocabulary; those without a row the model cannot read."""
        without = []
        for token in added:
            index, text = int(token["id"]), str(token["content"])
            if index >= len(self.texts):
                without.append(text)
                continue
            control = bool(token["special"]) or _looks_special(text)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            self.put(index, text if control else text.replace(SPACE, " "), kind, -1000.0)
        if without:
            self.notes.append(
                f"the embedding has no row for {len(without)} added tokens, which are left out: "
                + ", ".join(without[:SHOWN])
            )

    def of_kind(self, *kinds: TokenType) -> dict[str, int]:
        """Text → id of the tokens of some types."""
        return {
            text: i
            for i, (text, kind) in enumerate(zip(self.texts, self.kinds, strict=True))
            if kind in kinds
        }

    def check_unique(self) -> None:
        """Raises ModelError: two equal texts; llama.cpp stops the whole process at such a file."""
        seen: dict[str, int] = {}
        for index, text in enumerate(self.texts):
            if text in seen:
                raise ModelError(
                    "two tokens have one text, which llama.cpp cannot load",
                    got=f"{text!r} is {seen[text]} and {index}",
                )
            seen[text] = index


def _looks_special(text: str) -> bool:
    """Marks that some models forgot to call special; printing them would spoil answers."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two halves of a merge, in either of the forms that tokenizer.json has had."""
    if isinstance(merge, str):
        left, _, right = merge.partition(" ")
        return left, right
    return merge[0], merge[1]
