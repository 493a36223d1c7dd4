"""Tokens to text while they come: no character is split, no stop string leaks.

Knows tokenizers by `decode` alone; knows no model and no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

BROKEN = "\ufffd"
LONGEST_RUN = 16  # replacement characters in a row that no unfinished character explains


class Decodes(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        """Ids to text."""
        ...


class TextStream:
    """Gives text as soon as its characters are whole.

    A window of ids is decoded again with each token: it begins at the last but one border between
    characters, since a token may read differently after another one (SentencePiece drops the space
    before the first). Text that ends in U+FFFD may be a character whose bytes are still to come:
    it is held back until it is whole or the stream ends.

    Args:
        tokenizer: decodes ids.
        context: ids that stand before the first token, when the text goes on from them.
    """

    def __init__(self, tokenizer: Decodes, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)[-8:]
        self._border = len(self._window)  # ids before it read as whole characters
        self._sent = len(self._decode(self._window))

    def push(self, token: int) -> str:
        """Text that became certain with this token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(BROKEN)
        if len(text) - len(whole) > LONGEST_RUN:
            whole = text[:-3]
        piece = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(whole) == len(text):
            self._window = self._window[self._border :]
            self._border = len(self._window)
            self._sent = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back; U+FFFD where the stream ended inside a character."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece

    def _decode(self, ids: Sequence[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class StopStrings:
    """Ends a text before the first of some strings, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that is certainly before any stop string; sets `found` when one came."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back as the possible beginning of a stop string."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of the text that begins the stop string."""
        for size in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
