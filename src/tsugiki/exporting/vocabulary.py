"""What a model's folder says of its vocabulary: the tokenizer that training saw, ids, templates.

tokenizer.model is found by itself where the tokenizer is SentencePiece's; byte-level BPE needs
none. Knows no tensors and nothing of GGUF's keys.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tsugiki.adapters.joined import Joined
from tsugiki.data.chat import ChatFormat
from tsugiki.errors import ModelError
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_pieces import MODEL, read_pieces
from tsugiki.formats.gguf_tokenizer import SPECIAL, Speech, tokenizer_metadata
from tsugiki.formats.gguf_vocabulary import Piece
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.load import load_tokenizer, tokenizer_of


def vocabulary_metadata(joined: Joined, rows: int) -> tuple[Metadata, list[str]]:
    """The keys under `tokenizer.` for a base with what an adapter adds, and notes.

    Args:
        rows: tokens that the embedding has.

    Raises:
        ModelError: no tokenizer, or one that llama.cpp does not have.
    """
    folder = joined.base.folder
    tokenizer = load_tokenizer(ResolvedModel(folder, str(folder)))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"the tokenizer in {folder} is Python code: what it does cannot be written to a file",
            allowed="tokenizers that have a tokenizer.json, or that transformers can convert",
        )
    return tokenizer_metadata(backend, rows, _speech(joined, tokenizer), _pieces(joined, backend))


def chat_of(joined: Joined) -> ChatFormat | None:
    """The chat format that the exported model speaks; None for a base that has none."""
    folder = joined.base.folder
    tokenizer = load_tokenizer(ResolvedModel(folder, str(folder)))
    if joined.changes is None:
        return ChatFormat.of(tokenizer) if tokenizer.chat_template else None
    tokenizer = tokenizer_of(joined.changes.folder, tokenizer)
    if joined.changes.chat is None and not tokenizer.chat_template:
        return None
    return ChatFormat.from_state(joined.changes.chat, tokenizer)


def _speech(joined: Joined, tokenizer: PreTrainedTokenizerBase) -> Speech:
    special = {}
    for name in SPECIAL:
        index: Any = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            index = joined.base.setting(f"{name}_token_id")
        if isinstance(index, int) and index >= 0:
            special[name] = index
    own = tokenizer.chat_template
    templates = dict(own) if isinstance(own, dict) else {"default": own} if own else {}
    carried = joined.template()
    if carried is not None:
        templates["default"] = carried
    more, stops = joined.stops()
    return Speech(special, (*more, *stops), templates)


def _pieces(joined: Joined, backend: Tokenizer) -> list[Piece] | None:
    """SentencePiece's own pieces and scores, where the tokenizer is one of its kind."""
    if not bool(getattr(backend.model, "byte_fallback", False)):
        return None
    places = [joined.base.folder] + ([joined.changes.folder] if joined.changes else [])
    found = next((folder / MODEL for folder in places if (folder / MODEL).is_file()), None)
    return None if found is None else read_pieces(found)
