"""SentencePiece tokenizers as GGUF metadata: BPE ("llama" there) and unigram ("t5").

llama.cpp's own arithmetic is run over hard texts beside the tokenizer's; what it reads otherwise is
told, and a tokenizer that it reads otherwise altogether is refused. Knows no files.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gguf.constants import TokenType
from tokenizers import Tokenizer, normalizers

from tsugiki.errors import ModelError
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_pre import PROBES
from tsugiki.formats.gguf_vocabulary import SHOWN, SPACE, Piece, Vocabulary, pair
from tsugiki.formats.spm import spm_ids, unigram_ids

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def sentencepiece_metadata(
    backend: Tokenizer, state: Mapping[str, Any], rows: int, pieces: Sequence[Piece] | None
) -> tuple[Metadata, Vocabulary]:
    """SentencePiece BPE: its keys, and its vocabulary."""
    vocabulary = Vocabulary.empty(rows)
    for index, piece in enumerate(pieces if pieces is not None else _pieces_of(backend, state)):
        if index < rows:
            vocabulary.put(index, piece.text, piece.kind, piece.score)
    vocabulary.add(state["added_tokens"])
    prefix = (_normalised(backend, "a") + _first_piece(backend, "a")).startswith(SPACE)
    known = {text: i for i, text in enumerate(vocabulary.texts)}
    whole = list(vocabulary.of_kind(TokenType.USER_DEFINED))
    _compare(
        vocabulary, backend, lambda text: spm_ids(text, known, vocabulary.scores, prefix, whole)
    )
    found: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return found, vocabulary


def unigram_metadata(
    backend: Tokenizer, state: Mapping[str, Any], rows: int
) -> tuple[Metadata, Vocabulary]:
    """SentencePiece unigram: its keys, and its vocabulary."""
    vocabulary = Vocabulary.empty(rows)
    unknown = int(state["model"]["unk_id"])
    for index, (text, score) in enumerate(state["model"]["vocab"][:rows]):
        kind = TokenType.BYTE if BYTE.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if index == unknown else kind
        vocabulary.put(index, text, kind, float(score))
    vocabulary.add(state["added_tokens"])
    # A special <unk> is a control token above; as such llama.cpp would not fall back to it.
    vocabulary.put(unknown, vocabulary.texts[unknown], TokenType.UNKNOWN)
    charsmap = next(iter(_charsmaps(state["normalizer"])), b"")
    prefix = backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
    joins = _ids(backend, "a   b") == _ids(backend, "a b")
    pieces = vocabulary.of_kind(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)

    def ids(text: str) -> list[int]:
        if charsmap:
            text = str(normalizers.Precompiled(charsmap).normalize_str(text))
        if joins:
            text = " ".join(part for part in text.split(" ") if part)
        spaced = (" " if prefix and text[:1] not in ("", " ") else "") + text
        return unigram_ids(spaced.replace(" ", SPACE), pieces, vocabulary.scores, unknown)

    _compare(vocabulary, backend, ids)
    found: Metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": joins,
    }
    if charsmap:
        found["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return found, vocabulary


def _pieces_of(backend: Tokenizer, state: Mapping[str, Any]) -> list[Piece]:
    """What tokenizer.model would say, from merges: a piece made earlier has the higher score.

    SentencePiece joins the pair whose result scores highest, the `tokenizers` library the pair
    that comes first in its list; the list was made from the scores.
    """
    rank: dict[str, int] = {}
    for merge in state["model"]["merges"]:
        rank.setdefault("".join(pair(merge)), len(rank))
    unknown = state["model"].get("unk_token")
    found = []
    vocabulary = backend.get_vocab(with_added_tokens=False)
    by_id = {index: text for text, index in vocabulary.items()}
    for index in range(max(by_id, default=-1) + 1):
        text = by_id.get(index)
        if text is None:
            found.append(Piece(f"[PAD{index}]", -10000.0, TokenType.UNUSED))
        elif text == unknown:
            found.append(Piece(text, 0.0, TokenType.UNKNOWN))
        elif BYTE.fullmatch(text):
            found.append(Piece(text, 0.0, TokenType.BYTE))
        else:
            found.append(Piece(text, -float(rank.get(text, len(rank))), TokenType.NORMAL))
    return found


def _charsmaps(normalizer: Mapping[str, Any] | None) -> Iterator[bytes]:
    """SentencePiece's compiled rules for characters, wherever they stand."""
    for part in (normalizer or {}).get("normalizers", [normalizer or {}]):
        if part.get("precompiled_charsmap"):
            yield base64.b64decode(part["precompiled_charsmap"])


def _compare(vocabulary: Vocabulary, backend: Tokenizer, ids: Callable[[str], list[int]]) -> None:
    """Tell the hard texts that llama.cpp reads otherwise.

    Raises:
        ModelError: most of them: another tokenizer.
    """
    wrong = [text for text in PROBES if ids(text) != _ids(backend, text)]
    if len(wrong) > len(PROBES) // 2:
        raise ModelError(
            "llama.cpp would read most texts otherwise than this tokenizer",
            got=f"{len(wrong)} of {len(PROBES)} hard texts, such as {wrong[0][:30]!r}",
            fix="use the merged Hugging Face folder (tsugiki merge)",
        )
    if wrong:
        shown = ", ".join(repr(text[:16]) for text in wrong[:SHOWN])
        vocabulary.notes.append(
            f"llama.cpp reads {len(wrong)} of {len(PROBES)} hard texts otherwise than this "
            f"tokenizer: {shown}"
        )


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _normalised(backend: Tokenizer, text: str) -> str:
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def _first_piece(backend: Tokenizer, text: str) -> str:
    if backend.pre_tokenizer is None:
        return ""
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return str(pieces[0][0]) if pieces else ""
