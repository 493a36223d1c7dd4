"""SentencePiece's BPE as llama.cpp runs it, to compare its ids with a tokenizer's own.

Joins the neighbours whose result has the highest score, the leftmost first; what is no token falls
back to bytes. Slow and small: for probes, not for texts. Knows no special tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

SPACE = "▁"


def spm_ids(
    text: str,
    vocabulary: Mapping[str, int],
    scores: Sequence[float],
    prefix: bool,
    whole: Sequence[str] = (),
) -> list[int]:
    """Ids of a text, as llama.cpp gives them.

    Args:
        vocabulary: token → id. scores: by id.
        prefix: whether a space is put before the text, and after each token of `whole`.
        whole: user-defined tokens, cut out first, the longest before the others.
    """
    parts: list[tuple[bool, str]] = [(False, text)]
    for token in sorted((t for t in whole if t and t in text), key=lambda t: -len(t.encode())):
        cut: list[tuple[bool, str]] = []
        for done, part in parts:
            pieces = [part] if done else part.split(token)
            for i, piece in enumerate(pieces):
                cut += [(True, token)] if i else []
                cut += [(done, piece)] if piece else []
        parts = cut
    found: list[int] = []
    for done, part in parts:
        if done:
            found.append(vocabulary[part])
        else:
            spaced = (" " if prefix else "") + part
            found += _joined(spaced.replace(" ", SPACE), vocabulary, scores)
    return found


def _joined(text: str, vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    symbols: list[str] = list(text)
    before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
    queue: list[tuple[float, int, int, str]] = []

    def consider(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = symbols[left] + symbols[right]
            index = vocabulary.get(joined)
            if index is not None:
                heapq.heappush(queue, (-scores[index], left, right, joined))

    for i in range(1, len(symbols)):
        consider(i - 1, i)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        consider(before[left], left)
        consider(left, after[left])
    found: list[int] = []
    for symbol in symbols:
        if symbol in vocabulary:
            found.append(vocabulary[symbol])
        elif symbol:
            found += [vocabulary.get(f"<0x{byte:02X}>", -1) for byte in symbol.encode()]
    return found
