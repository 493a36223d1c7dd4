"""The pieces of a tokenizer.model, SentencePiece's own file. Knows no keys of GGUF."""

from __future__ import annotations

from pathlib import Path

from gguf.constants import TokenType
from sentencepiece import SentencePieceProcessor

from tsugiki.errors import ModelError
from tsugiki.formats.gguf_vocabulary import Piece

MODEL = "tokenizer.model"


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a tokenizer.model.

    Raises:
        ModelError: not a SentencePiece model.
    """
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path} is not a SentencePiece model: {str(error)[:200]}") from None
    return [
        Piece(processor.IdToPiece(i), processor.GetScore(i), _kind(processor, i))
        for i in range(processor.GetPieceSize())
    ]


def _kind(processor: SentencePieceProcessor, index: int) -> TokenType:
    if processor.IsUnknown(index):
        return TokenType.UNKNOWN
    if processor.IsControl(index):
        return TokenType.CONTROL
    if processor.IsUnused(index):
        return TokenType.UNUSED
    return TokenType.BYTE if processor.IsByte(index) else TokenType.NORMAL
