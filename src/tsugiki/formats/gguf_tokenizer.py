"""A tokenizer as GGUF metadata: tokens, types, merges, special ids, stops, template.

Takes the tokenizer as the `tokenizers` library runs it, which is what training saw, and where there
is one the pieces of tokenizer.model. Byte-level BPE ("gpt2" in GGUF) is written here, the kinds of
SentencePiece in `gguf_sentencepiece`. Knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import TokenType
from tokenizers import Tokenizer

from tsugiki.errors import ModelError
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_pre import KNOWN, PROBES, pre_tokenizer_of
from tsugiki.formats.gguf_sentencepiece import sentencepiece_metadata, unigram_metadata
from tsugiki.formats.gguf_vocabulary import Piece, Vocabulary, pair

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


@dataclass(frozen=True)
class Speech:
    """What a model says and hears beside its vocabulary.

    special: "bos", "eos", … → id. stops: ids that end an answer, the chat format's first.
    templates: name → Jinja text; "default" is the one in use.
    """

    special: Mapping[str, int]
    stops: Sequence[int] = ()
    templates: Mapping[str, str] = field(default_factory=dict)


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
        found, vocabulary = sentencepiece_metadata(backend, state, rows, pieces)
    elif model["type"] == "BPE":
        found, vocabulary = _byte_level(backend, state, rows)
    elif model["type"] == "Unigram" and model.get("unk_id") is not None:
        found, vocabulary = unigram_metadata(backend, state, rows)
    else:
        raise ModelError(
            f"a tokenizer of kind {model['type']} cannot be written as GGUF",
            allowed="byte-level BPE, SentencePiece BPE, unigram",
            fix="use the merged Hugging Face folder (tsugiki merge)",
        )
    vocabulary.check_unique()
    found |= {"tokenizer.ggml.tokens": vocabulary.texts}
    if found["tokenizer.ggml.model"] != "gpt2":
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
) -> tuple[Metadata, Vocabulary]:
    vocabulary = Vocabulary.empty(rows)
    for text, index in backend.get_vocab(with_added_tokens=False).items():
        if index < rows:
            vocabulary.put(index, text, TokenType.NORMAL)
    vocabulary.add(state["added_tokens"])
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
        " ".join(part.replace(" ", "\u0120") for part in pair(merge))
        for merge in state["model"]["merges"]
    ]
    found: Metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
    if merges:
        found["tokenizer.ggml.merges"] = merges
    return found, vocabulary


def _ends(speech: Speech, vocabulary: Vocabulary) -> Metadata:
    """Stop tokens that llama.cpp would not know by itself, in the two places it has for them."""
    eos = speech.special.get("eos")
    known = [i for i in speech.stops if isinstance(i, int) and 0 <= i < len(vocabulary.texts)]
    more = [i for i in known if i != eos and vocabulary.texts[i] not in ENDS]
    if len(more) > 2:
        lost = ", ".join(vocabulary.texts[i] for i in more[2:])
        vocabulary.notes.append(f"GGUF has no place for more stop tokens: {lost}")
    return {
        f"tokenizer.ggml.{name}_token_id": index
        for name, index in zip(("eot", "eom"), dict.fromkeys(more), strict=False)
    }


def _edges(backend: Tokenizer, speech: Speech) -> Metadata:
    """Whether a text gets BOS put before it, as this tokenizer does; never EOS behind it.

    Some tokenizers end every text so (T5's kind), but a prompt that has ended gets no answer.
    """
    bos = speech.special.get("bos")
    return {
        "tokenizer.ggml.add_bos_token": bos is not None and backend.encode("a").ids[:1] == [bos],
        "tokenizer.ggml.add_eos_token": False,
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


def _normal(backend: Tokenizer, text: str) -> str:
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def _kinds(normalizer: Mapping[str, Any] | None) -> str:
    parts = (normalizer or {}).get("normalizers", [normalizer or {}])
    return ", ".join(str(part.get("type")) for part in parts)
