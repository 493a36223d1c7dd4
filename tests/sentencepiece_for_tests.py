"""SentencePiece tokenizers for the tests: one trained on the spot, or made from a tokenizer.json.

Knows no models; the folder it writes is as the Hub has it.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "def f(x):\n    return x + 1",
    "numbers 1 22 333 4444 and more, don't stop!",
]


def train_pieces(
    folder: Path,
    vocabulary: int = 400,
    special: tuple[str, ...] = (),
    user: tuple[str, ...] = (),
    template: str | None = None,
    prefix: bool = True,
) -> int:
    """Train, and write tokenizer.model, tokenizer.json and tokenizer_config.json.

    special, user: tokens added to the trained ones. prefix: whether a text gets a blank before it,
        as Llama's does and Gemma's does not.

    Returns:
        how many ids there are.
    """
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50), model_writer=stream, vocab_size=vocabulary,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, hard_vocab_limit=False, add_dummy_prefix=prefix,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(stream.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    pieces = [processor.IdToPiece(i) for i in range(processor.GetPieceSize())]
    scores = [processor.GetScore(i) for i in range(len(pieces))]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(a, b) for a, b in splits if a in ids and b in ids]
        merges += [(-score, ids[a], ids[b], a, b) for a, b in found]
    tokenizer = Tokenizer(
        models.BPE(ids, [(a, b) for *_, a, b in sorted(merges)], unk_token="<unk>",
                   byte_fallback=True, fuse_unk=True)
    )  # fmt: skip
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    names = ("<unk>", "<s>", "</s>", *special)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in user])
    tokenizer.save(str(folder / "tokenizer.json"))
    state = json.loads((folder / "tokenizer.json").read_text())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in state["added_tokens"]
        },
    }  # fmt: skip
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def train_unigram(folder: Path, vocabulary: int = 150) -> int:
    """A unigram tokenizer.json with NFKC rules, as T5's kind has it (rinna's GPT-2, for one)."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 50), model_writer=stream, vocab_size=vocabulary,
        model_type="unigram", character_coverage=1.0, minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    count = processor.GetPieceSize()
    pieces = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(count)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(_charsmap(stream.getvalue())),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    names = ("<unk>", "<s>", "</s>", "[SEP]")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _charsmap(model: bytes) -> bytes:
    """normalizer_spec (3) . precompiled_charsmap (2) of a serialised model."""
    return _field(_field(model, 3), 2)


def _field(message: bytes, wanted: int) -> bytes:
    """The last length-delimited field of that number."""
    at, found = 0, b""
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7 == 2:
            size, at = _read_varint(message, at)
            found = message[at : at + size] if tag >> 3 == wanted else found
            at += size
        elif tag & 7 == 0:
            _, at = _read_varint(message, at)
        else:
            at += 4 if tag & 7 == 5 else 8
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def save_pieces(state: dict[str, Any], path: Path) -> None:
    """A tokenizer.json of SentencePiece's kind as the tokenizer.model it came from.

    Scores are the order in which pieces are made; types are as its special tokens say.
    """
    rank: dict[str, int] = {}
    for merge in state["model"]["merges"]:
        rank.setdefault(
            "".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), len(rank)
        )
    special = {t["content"] for t in state["added_tokens"] if t["special"]}
    unknown = state["model"]["unk_token"]
    out = bytearray()
    for text, _ in sorted(state["model"]["vocab"].items(), key=lambda item: item[1]):
        is_byte = len(text) == 6 and text.startswith("<0x")
        kind = 2 if text == unknown else 6 if is_byte else 3 if text in special else 1
        score = 0.0 if kind != 1 else -float(rank.get(text, len(rank)))
        raw = text.encode()
        piece = b"\x0a" + _varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score)
        piece += b"\x18" + _varint(kind)
        out += b"\x0a" + _varint(len(piece)) + piece
    # trainer_spec (2): model_type (3) = BPE (2), byte_fallback (35)
    trainer = b"\x18\x02" + b"\x98\x02\x01"
    out += b"\x12" + _varint(len(trainer)) + trainer
    path.write_bytes(bytes(out))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
