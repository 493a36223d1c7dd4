"""The embedded base and the demo's rows: size, tokens, template, and a task that is new to both."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tsugiki.data.chat import ChatFormat
from tsugiki.data.formats import read_rows
from tsugiki.data.row import Row
from tsugiki.demo import rows_path
from tsugiki.files import sha256_file
from tsugiki.models.load import load_tokenizer, resolve_model

ROOT = Path(__file__).parent.parent
SPROUT = ROOT / "src" / "tsugiki" / "models" / "sprout"


def tool(name: str) -> ModuleType:
    """A module of tools/."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.of(load_tokenizer(resolve_model(None)))


def slots(row: Row) -> tuple[str, ...]:
    """verb, room, who, day, hour of a row's answer."""
    return tuple(row.messages[-1].content.split(" | "))


def test_it_is_small_and_of_known_formats() -> None:
    size = sum(path.stat().st_size for path in SPROUT.iterdir())
    assert size <= 12_000_000
    assert json.loads((SPROUT / "config.json").read_text())["model_type"] == "llama"
    names = {path.name for path in SPROUT.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names


def test_its_card_tells_how_it_grew() -> None:
    card, growth = (
        (SPROUT / "README.md").read_text(),
        json.loads((SPROUT / "growth.json").read_text()),
    )
    assert growth["command"] in card
    assert f"`{sha256_file(SPROUT / 'model.safetensors')}`" in card, "the figures are others'"
    assert f"{growth['parameters']:,}" in card
    assert len(growth["curve"]) >= 20
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.M)
    figures = {name: (float(english), float(japanese)) for name, english, japanese in rows}
    for bar in ("5-gram over tokens", "5-gram over bytes", "xz -9 primed"):
        for side in (0, 1):
            assert figures["sprout"][side] < figures[bar][side], (bar, side)


def test_kana_and_common_kanji_are_whole_tokens(chat: ChatFormat) -> None:
    words = tool("sprout_words")
    characters = [
        *words.KANJI,
        *words.HIRAGANA,
        *words.katakana(words.HIRAGANA),
        *"っゃゅょッャュョー",
    ]
    split = [
        c for c in characters if len(chat.tokenizer(c, add_special_tokens=False)["input_ids"]) > 1
    ]
    assert split == []
    text = "ぴょんと跳ねた𠮷野家の猫🐈、Ünïcode\t\n end"
    assert (
        chat.tokenizer.decode(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    )


def test_a_longer_conversation_begins_like_a_shorter_one(chat: ChatFormat) -> None:
    corpus = tool("sprout_corpus")
    rng = random.Random(0)
    for _ in range(100):
        turns = corpus.dialogue(rng, ["word"])
        messages = [{"role": role, "content": text} for role, text in turns]
        whole = chat.tokenizer.apply_chat_template(messages, tokenize=False)
        assert whole == corpus.render(turns), "the corpus is written as the template writes"
        for place, (role, _) in enumerate(turns):
            if role == "assistant":
                asked = chat.tokenizer.apply_chat_template(
                    messages[:place], tokenize=False, add_generation_prompt=True
                )
                assert whole.startswith(asked)
                assert whole[len(asked) :].startswith(turns[place][1] + "<|end|>")


def test_the_demos_rows_come_from_the_tool() -> None:
    for name, text in tool("make_demo_rows").make().items():
        assert (ROOT / "src" / "tsugiki" / "demo" / name).read_text(encoding="utf-8") == text, name


def test_held_out_rows_are_new_combinations_in_new_phrasings() -> None:
    rows = tool("make_demo_rows")
    train = read_rows(rows_path("train")).rows
    held = read_rows(rows_path("heldout")).rows
    unseen = read_rows(rows_path("heldout_new_words")).rows
    assert len(held) >= 200
    known = {slots(row)[1:] for row in train}
    assert not known & {slots(row)[1:] for row in held}
    assert not known & {slots(row)[1:] for row in unseen}
    words = {word for row in train for word in slots(row)[1:3]}
    assert not words & {word for row in unseen for word in slots(row)[1:3]}
    assert {word for row in held for word in slots(row)[1:3]} <= {
        *rows.ROOMS_EN, *rows.PEOPLE_EN, *rows.ROOMS_JA, *rows.PEOPLE_JA,
    }  # fmt: skip
    for seen, held_texts in ((rows.EN, rows.EN_HELD), (rows.JA, rows.JA_HELD)):
        for verb in seen:
            assert not set(seen[verb]) & set(held_texts[verb])


def test_the_demos_task_is_not_in_sprouts_diet() -> None:
    corpus = tool("sprout_corpus")
    rows, rng = tool("make_demo_rows"), random.Random(1)
    text = "\n".join(corpus.render(corpus.dialogue(rng, ["word"])) for _ in range(3000))
    assert " | " not in text, "the answer's form"
    pieces = {
        max(re.split(r"\{\w+\}", template), key=len).strip()
        for phrasings in (*rows.EN.values(), *rows.JA.values())
        for template in phrasings
    }
    long = {piece for piece in pieces if len(piece) >= (12 if piece.isascii() else 5)}
    assert len(long) > 50
    assert not [piece for piece in long if piece in text]
