"""SentencePiece's two kinds as llama.cpp runs them, to compare their ids with a tokenizer's own.

BPE joins the neighbours whose result has the highest score, the leftmost first, and falls back to
bytes; unigram takes the pieces whose scores sum highest (Kudo 2018), and knows only <unk> besides.
Slow and small: for probes, not for texts. Knows no special tokens.
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


def unigram_ids(
    text: str, vocabulary: Mapping[str, int], scores: Sequence[float], unknown: int
) -> list[int]:
    """Ids of a text that is normalised already, blanks written as ▁.

    Args:
        vocabulary: piece → id, without control tokens. scores: by id. unknown: the id for the rest.
    """
    longest = max(map(len, vocabulary))
    penalty = min(scores[index] for index in vocabulary.values()) - 10
    best: list[tuple[float, int, int]] = [(0.0, 0, unknown)]  # score, where it begins, id
    best += [(float("-inf"), 0, unknown)] * len(text)
    for begin in range(len(text)):
        total = best[begin][0]
        for end in range(begin + 1, min(len(text), begin + longest) + 1):
            index = vocabulary.get(text[begin:end])
            if index is not None and total + scores[index] > best[end][0]:
                best[end] = (total + scores[index], begin, index)
        if text[begin] not in vocabulary and total + penalty > best[begin + 1][0]:
            best[begin + 1] = (total + penalty, begin, unknown)
    found: list[int] = []
    at = len(text)
    while at > 0:
        _, begin, index = best[at]
        if not (found and found[-1] == index == unknown):
            found.append(index)
        at = begin
    return found[::-1]
