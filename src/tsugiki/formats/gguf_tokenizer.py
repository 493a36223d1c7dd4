"""A tokenizer as GGUF metadata: tokens, types, scores, merges, special ids, template.

Takes the tokenizer as the `tokenizers` library runs it, which is what training saw, and where there
is one the pieces of tokenizer.model. Two kinds are written: byte-level BPE ("gpt2" in GGUF) and
SentencePiece BPE ("llama"); what llama.cpp would read otherwise is told. Knows no files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import TokenType
from tokenizers import Tokenizer

from tsugiki.errors import ModelError
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_pre import KNOWN, PROBES, pre_tokenizer_of
from tsugiki.formats.spm import spm_ids

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Names of special ids in transformers and in GGUF (whose spelling this is).
SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding",
    "cls": "cls", "mask": "mask",
}  # fmt: skip
# Tokens that end an answer in llama.cpp whatever the metadata says.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "</s>",
    "<|end_of_text|>", "<EOT>", "<eos>", "<end_of_utterance>", "<|return|>", "<|call|>",
)  # fmt: skip
SHOWN = 4


@dataclass(frozen=True)
class Piece:
    """One entry of tokenizer.model."""

    text: str
    score: float
    kind: TokenType


@dataclass(frozen=True)
class Speech:
    """What a model says and hears beside its vocabulary.

    special: "bos", "eos", … → id. stops: ids that end an answer, the chat format's first.
    templates: name → Jinja text; "default" is the one in use.
    """

    special: Mapping[str, int]
    stops: Sequence[int] = ()
    templates: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Vocabulary:
    """id → text, type and score, as they are collected."""

    texts: list[str]
    kinds: list[int]
    scores: list[float]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def empty(cls, rows: int) -> _Vocabulary:
        """Every row of the embedding, not yet named."""
        texts = [f"[PAD{i}]" for i in range(rows)]
        return cls(texts, [int(TokenType.UNUSED)] * rows, [-10000.0] * rows)

    def put(self, index: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Name one id."""
        self.texts[index], self.kinds[index], self.scores[index] = text, int(kind), score


def tokenizer_metadata(
    backend: Tokenizer, rows: int, speech: Speech, pieces: Sequence[Piece] | None = None
) -> tuple[Metadata, list[str]]:
    """The keys under `tokenizer.`, and notes on what llama.cpp will read otherwise.

    Args:
        rows: tokens that the embedding has.
        pieces: those of tokenizer.model, whose scores are SentencePiece's own.

    Raises:
        ModelError: a kind of tokenizer that llama.cpp does not have, an unknown pre-tokenizer, two
            ids with one text.
    """
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] == "BPE" and (pieces is not None or model.get("byte_fallback")):
        found, vocabulary = _sentencepiece(backend, state, rows, pieces)
    elif model["type"] == "BPE":
        found, vocabulary = _byte_level(backend, state, rows)
    else:
        raise ModelError(
            f"a tokenizer of kind {model['type']} cannot be written as GGUF",
            allowed="byte-level BPE, SentencePiece BPE",
            fix="use the merged Hugging Face folder (tsugiki merge)",
        )
    _check_unique(vocabulary.texts)
    found |= {"tokenizer.ggml.tokens": vocabulary.texts}
    if found["tokenizer.ggml.model"] == "llama":
        found["tokenizer.ggml.scores"] = vocabulary.scores
    found["tokenizer.ggml.token_type"] = vocabulary.kinds
    for name, index in speech.special.items():
        if index < rows:
            found[f"tokenizer.ggml.{SPECIAL[name]}_token_id"] = index
    found |= _ends(speech, vocabulary)
    found |= _edges(backend, speech)
    found |= _templates(speech.templates)
    return found, vocabulary.notes


def _byte_level(
    backend: Tokenizer, state: Mapping[str, Any], rows: int
) -> tuple[Metadata, _Vocabulary]:
    vocabulary = _Vocabulary.empty(rows)
    _fill(vocabulary, backend, rows)
    _add(vocabulary, state["added_tokens"], rows)
    ignore = bool(state["model"].get("ignore_merges"))
    name = pre_tokenizer_of(backend, ignore)
    if name is None:
        raise ModelError(
            "this tokenizer splits text as none of llama.cpp's pre-tokenizers does, so that the "
            "file would read other tokens than the model was trained on",
            allowed=", ".join(KNOWN),
            fix="use the merged Hugging Face folder (tsugiki merge)",
        )
    changed = [text for text in PROBES if _normal(backend, text) != text]
    if changed:
        vocabulary.notes.append(
            f"llama.cpp does not normalise text as this tokenizer does "
            f"({_kinds(state['normalizer'])}): such text gets other ids, for instance "
            f"{changed[0][:20]!r}"
        )
    merges = [
        " ".join(part.replace(" ", "\u0120") for part in _pair(merge))
        for merge in state["model"]["merges"]
    ]
    found: Metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    if merges:
        found["tokenizer.ggml.merges"] = merges
    return found, vocabulary


def _sentencepiece(
    backend: Tokenizer, state: Mapping[str, Any], rows: int, pieces: Sequence[Piece] | None
) -> tuple[Metadata, _Vocabulary]:
    vocabulary = _Vocabulary.empty(rows)
    for index, piece in enumerate(pieces if pieces is not None else _pieces_of(backend, state)):
        if index < rows:
            vocabulary.put(index, piece.text, piece.kind, piece.score)
    _add(vocabulary, state["added_tokens"], rows)
    prefix = (_normal(backend, "a") + _first_piece(backend, "a")).startswith(SPACE)
    known = {text: i for i, text in enumerate(vocabulary.texts)}
    whole = [
        text
        for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True)
        if kind == TokenType.USER_DEFINED
    ]
    wrong = [
        text
        for text in PROBES
        if spm_ids(text, known, vocabulary.scores, prefix, whole)
        != backend.encode(text, add_special_tokens=False).ids
    ]
    if wrong:
        shown = ", ".join(repr(text[:16]) for text in wrong[:SHOWN])
        vocabulary.notes.append(
            f"llama.cpp reads {len(wrong)} of {len(PROBES)} hard texts otherwise than this "
            f"tokenizer: {shown}"
        )
    found: Metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return found, vocabulary


def _pieces_of(backend: Tokenizer, state: Mapping[str, Any]) -> list[Piece]:
    """What tokenizer.model would say, from merges: a piece made earlier has the higher score.

    SentencePiece joins the pair whose result scores highest, the `tokenizers` library the pair
    that comes first in its list; the list was made from the scores.
    """
    rank: dict[str, int] = {}
    for merge in state["model"]["merges"]:
        rank.setdefault("".join(_pair(merge)), len(rank))
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


def _fill(vocabulary: _Vocabulary, backend: Tokenizer, rows: int) -> None:
    for text, index in backend.get_vocab(with_added_tokens=False).items():
        if index < rows:
            vocabulary.put(index, text, TokenType.NORMAL)


def _add(vocabulary: _Vocabulary, added: Sequence[Mapping[str, Any]], rows: int) -> None:
    """Added tokens lie over the vocabulary; those without a row cannot be read by the model."""
    without = []
    for token in added:
        index, text = int(token["id"]), str(token["content"])
        if index >= rows:
            without.append(text)
            continue
        control = bool(token["special"]) or _looks_special(text)
        if not control:
            text = text.replace(SPACE, " ")
        vocabulary.put(
            index, text, TokenType.CONTROL if control else TokenType.USER_DEFINED, -1000.0
        )
    if without:
        vocabulary.notes.append(
            f"the embedding has no row for {len(without)} added tokens, which are left out: "
            + ", ".join(without[:SHOWN])
        )


def _looks_special(text: str) -> bool:
    """Marks that some models forgot to call special; printing them would spoil answers."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _ends(speech: Speech, vocabulary: _Vocabulary) -> Metadata:
    """Stop tokens that llama.cpp would not know by itself, in the two places it has for them."""
    eos = speech.special.get("eos")
    more = [i for i in speech.stops if i != eos and vocabulary.texts[i] not in ENDS]
    if len(more) > 2:
        lost = ", ".join(vocabulary.texts[i] for i in more[2:])
        vocabulary.notes.append(f"GGUF has no place for more stop tokens: {lost}")
    return {
        f"tokenizer.ggml.{name}_token_id": index
        for name, index in zip(("eot", "eom"), dict.fromkeys(more), strict=False)
    }


def _edges(backend: Tokenizer, speech: Speech) -> Metadata:
    """Whether a text gets BOS and EOS put around it, as this tokenizer does."""
    ids = backend.encode("a").ids
    bos, eos = speech.special.get("bos"), speech.special.get("eos")
    return {
        "tokenizer.ggml.add_bos_token": bos is not None and ids[:1] == [bos],
        "tokenizer.ggml.add_eos_token": eos is not None and ids[-1:] == [eos],
    }


def _templates(templates: Mapping[str, str]) -> Metadata:
    found: Metadata = {}
    names = [name for name in templates if name != "default"]
    if names:
        found["tokenizer.chat_templates"] = names
    for name, text in templates.items():
        key = "tokenizer.chat_template"
        found[key if name == "default" else f"{key}.{name}"] = text
    return found


def _check_unique(texts: Sequence[str]) -> None:
    """llama.cpp stops the whole process at a vocabulary with two equal texts."""
    if len(set(texts)) != len(texts):
        seen: dict[str, int] = {}
        for index, text in enumerate(texts):
            if text in seen:
                raise ModelError(
                    "two tokens have one text, which llama.cpp cannot load",
                    got=f"{text!r} is {seen[text]} and {index}",
                )
            seen[text] = index


def _normal(backend: Tokenizer, text: str) -> str:
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def _first_piece(backend: Tokenizer, text: str) -> str:
    if backend.pre_tokenizer is None:
        return ""
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return str(pieces[0][0]) if pieces else ""


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    if isinstance(merge, str):
        left, _, right = merge.partition(" ")
        return left, right
    return merge[0], merge[1]


def _kinds(normalizer: Mapping[str, Any] | None) -> str:
    parts = (normalizer or {}).get("normalizers", [normalizer or {}])
    return ", ".join(str(part.get("type")) for part in parts)
