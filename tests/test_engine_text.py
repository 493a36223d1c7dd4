"""Streams of text: nothing lost, no character split, no stop string leaked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from engine_tiny import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tsugiki.engine.text import BROKEN, Decodes, StopStrings, TextStream


class Pieces:
    """A tokenizer whose tokens are arbitrary runs of bytes, as byte-level BPE may have them."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], **_: bool) -> str:
        return b"".join(self.pieces[i] for i in token_ids).decode("utf-8", errors="replace")


def streamed(tokenizer: Decodes, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, context)
    return [*(stream.push(i) for i in ids), stream.finish()]


UNICODE = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@given(UNICODE, st.data())
@settings(max_examples=300, deadline=None)
def test_any_byte_level_tokenisation(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)))))
    edges = [0, *(c for c in cuts if c < len(raw)), len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges) if a < b]
    out = streamed(Pieces(pieces), range(len(pieces)))
    assert "".join(out) == text
    if BROKEN not in text:
        assert not any(BROKEN in piece for piece in out)


@given(st.lists(st.binary(min_size=1, max_size=5), max_size=60))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text(pieces: list[bytes]) -> None:
    whole = b"".join(pieces).decode("utf-8", errors="replace")
    assert "".join(streamed(Pieces(pieces), range(len(pieces)))) == whole


@given(UNICODE)
@settings(max_examples=50, deadline=None)
def test_one_token_a_byte_with_a_real_tokenizer(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Metaspace words and byte fallback, as Llama 2 has them."""
    words = ["<unk>", "▁the", "▁cat", "s", "▁"] + [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(st.lists(st.one_of(st.sampled_from(["▁the", "▁cat", "s"]), UNICODE.filter(len)), max_size=9))
@settings(max_examples=100, deadline=None)
def test_spaces_and_byte_fallback(parts: list[str]) -> None:
    tokenizer = sentencepiece_like()
    ids: list[int] = []
    for part in parts:
        known = tokenizer.convert_tokens_to_ids(part)
        ids += [known] if known else [5 + b for b in part.encode()]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_continuation_keeps_its_space() -> None:
    tokenizer = sentencepiece_like()
    the, cat = tokenizer.convert_tokens_to_ids(["▁the", "▁cat"])
    assert "".join(streamed(tokenizer, [cat])) == "cat"
    assert "".join(streamed(tokenizer, [cat], context=[the])) == " cat"


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aあ𠮷", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, ids) == ["a", "", "", "あ", "", "", "", "𠮷", ""]


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4)), st.randoms())
def test_stop_strings(text: str, stops: list[str], rng: object) -> None:
    stopper, out, at = StopStrings(stops), "", 0
    while at < len(text):
        size = rng.randint(1, 4)  # type: ignore[attr-defined]
        out += stopper.push(text[at : at + size])
        at += size
        if not stopper.found:
            assert not any(stop in out for stop in stops)
    out += stopper.finish()
    places = [text.find(stop) for stop in stops if stop in text]
    assert stopper.found == bool(places)
    # which of several stops is met first may depend on the pieces; none of them is in the text
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if not places:
        assert out == text
