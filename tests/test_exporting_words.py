"""Tokenizers, templates and stops in GGUF files: llama.cpp reads and ends what training did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny, tiny_model
from sentencepiece_for_tests import train_pieces, train_unigram
from test_merging_forms import our_adapter
from test_merging_peft import peft_adapter
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tsugiki.adapters.joined import join
from tsugiki.data.templates import FALLBACKS
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf import ExportPlan, plan_export, write_gguf
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.gguf_pre import KNOWN, known_splits, pre_tokenizer_of
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.models.hub import sprout_folder
from tsugiki.proof.texts import STRINGS

SPECIALS = ["<|im_start|>user\nhi<|im_end|>\n", "a</s>b", "<s>x"]


def with_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int | None = None
) -> Path:
    tiny_model("llama", 0, rows or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planned(folder: Path, adapter: Path | None = None) -> ExportPlan:
    return plan_export(join(folder, adapter), "x")


def unlike(folder: Path, texts: list[str], tmp_path: Path, special: bool = True) -> list[str]:
    """Texts that llama.cpp reads otherwise than transformers."""
    plan = planned(folder)
    file = write_gguf(plan, "f16", tmp_path / "x.gguf").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with LlamaCpp(1) as llama:
        theirs = llama.tokenise(file, texts, add_special=special, parse_special=True)
    ours = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]
    return [t for t, a, b in zip(texts, ours, theirs, strict=True) if list(a) != list(b)]


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_byte_level_ids(bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML, bos=bos)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    folder = with_tokenizer(tmp_path / "m", tokenizer)
    assert unlike(folder, [*STRINGS, *SPECIALS, "a<tool>b"], tmp_path) == []
    data = open_gguf(tmp_path / "x.gguf").metadata
    assert data["tokenizer.ggml.pre"] == "gpt-2"
    assert data["tokenizer.ggml.add_bos_token"] is bos
    kinds = dict(zip(data["tokenizer.ggml.tokens"], data["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<tool>"], kinds["a"]) == (3, 4, 1)


def test_sprout_is_known_by_how_it_splits(tmp_path: Path) -> None:
    assert unlike(sprout_folder(), [*STRINGS, "<|user|>\nhi<|end|>\n"], tmp_path) == []
    data = open_gguf(tmp_path / "x.gguf").metadata
    assert data["tokenizer.ggml.pre"] == "qwen2"
    assert data["tokenizer.ggml.eos_token_id"] == 1
    assert "<|assistant|>" in data["tokenizer.chat_template"]


@pytest.mark.parametrize("stored", [True, False], ids=["tokenizer.model", "tokenizer.json alone"])
def test_sentencepiece_ids(stored: bool, tmp_path: Path) -> None:
    """Also without tokenizer.model: scores come from the order of the merges."""
    folder = tmp_path / "m"
    rows = train_pieces(folder, special=("<|user|>", "<|end|>"), user=("<tool>",))
    tiny_model("llama", 0, rows).save_pretrained(folder)
    if not stored:
        (folder / "tokenizer.model").unlink()
    texts = [*STRINGS, "a<|user|>b", "   three", "x   y", "a<tool> b"]
    assert unlike(folder, texts, tmp_path) == []
    data = open_gguf(tmp_path / "x.gguf").metadata
    assert data["tokenizer.ggml.model"] == "llama"
    assert data["tokenizer.ggml.add_space_prefix"] is True
    assert data["tokenizer.ggml.add_bos_token"] is True


def test_unigram_ids(tmp_path: Path) -> None:
    """Of the kind that Japanese GPT-2 models have; its EOS after every text does not travel."""
    folder = tmp_path / "m"
    rows = train_unigram(folder)
    tiny_model("gpt2", 0, rows).save_pretrained(folder)
    texts = [
        "Hello, world!",
        "吾輩は猫である。名前はまだ無い。",
        "①ｱｲｳ Å ﬁ",
        "a [SEP] b",
        "the quick brown fox",
    ]
    assert unlike(folder, texts, tmp_path, special=False) == []
    data = open_gguf(tmp_path / "x.gguf").metadata
    assert data["tokenizer.ggml.model"] == "t5"
    assert data["tokenizer.ggml.add_eos_token"] is False
    assert len(data["tokenizer.ggml.precompiled_charsmap"]) > 1000


def test_what_llama_cpp_reads_otherwise_is_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    folder = with_tokenizer(
        tmp_path / "m",
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
        ),
    )
    assert any("NFC" in note for note in planned(folder).notes)
    assert set(unlike(folder, ["e\u0301", "plain text"], tmp_path)) == {"e\u0301"}


def test_vocabularies_smaller_and_larger_than_the_embedding(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    folder = with_tokenizer(tmp_path / "more", tokenizer, rows=len(tokenizer) + 7)
    write_gguf(planned(folder), "f16", tmp_path / "a.gguf")
    data = open_gguf(tmp_path / "a.gguf").metadata
    assert len(data["tokenizer.ggml.tokens"]) == len(tokenizer) + 7
    assert data["tokenizer.ggml.tokens"][-1] == f"[PAD{len(tokenizer) + 6}]"
    assert data["tokenizer.ggml.token_type"][-1] == 5
    tokenizer.add_tokens(["<late>"])
    folder = with_tokenizer(tmp_path / "less", tokenizer, rows=len(tokenizer) - 1)
    plan = planned(folder)
    assert any("<late>" in note for note in plan.notes)
    write_gguf(plan, "f16", tmp_path / "b.gguf")
    assert "<late>" not in open_gguf(tmp_path / "b.gguf").metadata["tokenizer.ggml.tokens"]


def test_pre_tokenizers_differ_from_each_other() -> None:
    """Each name is found again by its own splits, so none hides another."""
    for name, (patterns, ignore) in KNOWN.items():
        parts = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        assert pre_tokenizer_of(tokenizer, ignore) == name
    same = [{a, b} for a in KNOWN for b in KNOWN if a < b and known_splits(a) == known_splits(b)]
    assert same == [{"llama-bpe", "smaug-bpe"}], "told apart by whole words"


def words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))


def other_blanks() -> Tokenizer:
    """Pieces of unigram's kind over text that is cut where llama.cpp would not cut it."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def by_spaces() -> Tokenizer:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return tokenizer


def twins() -> Tokenizer:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.add_tokens([AddedToken("▁x", normalized=False), AddedToken(" x", normalized=False)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (words, "kind WordLevel"),
        (other_blanks, "most texts otherwise"),
        (by_spaces, "none of llama.cpp's"),
        (twins, "two tokens have one text"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_tokenizers_that_cannot_travel(make: Any, says: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="</s>")
    folder = with_tokenizer(tmp_path / "m", tokenizer, rows=400)
    with pytest.raises(TsugikiError, match=says):
        planned(folder)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "m")
    with pytest.raises(TsugikiError, match="no tokenizer"):
        planned(tmp_path / "m")


def test_templates_and_stops_travel(tmp_path: Path) -> None:
    """The template that training used, and its stop token where it is not the end of text."""
    base = save_tiny("llama", tmp_path / "base", tiny_tokenizer())
    our_adapter(base, tmp_path / "adapter", "alpaca")
    write_gguf(planned(base, tmp_path / "adapter"), "f16", tmp_path / "a.gguf")
    data = open_gguf(tmp_path / "a.gguf").metadata
    assert data["tokenizer.chat_template"].endswith(FALLBACKS["alpaca"])
    assert "tokenizer.ggml.eot_token_id" not in data
    assert data["tokenizer.ggml.eos_token_id"] == 1

    peft_adapter(base, tmp_path / "foreign")
    tiny_tokenizer(CHATML).save_pretrained(tmp_path / "foreign")
    write_gguf(planned(base, tmp_path / "foreign"), "f16", tmp_path / "b.gguf")
    assert open_gguf(tmp_path / "b.gguf").metadata["tokenizer.chat_template"] == CHATML


def test_all_ends_of_an_answer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_tokens(["<fin>", "<halt>", "<over>"], special_tokens=True)
    folder = with_tokenizer(tmp_path / "m", tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<fin>", "<halt>", "<over>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    plan = planned(folder)
    assert any("no place for more stop tokens: <over>" in note for note in plan.notes)
    write_gguf(plan, "f16", tmp_path / "a.gguf")
    data = open_gguf(tmp_path / "a.gguf").metadata
    assert [data[f"tokenizer.ggml.{k}_token_id"] for k in ("eos", "eot", "eom")] == [1, *ids[2:4]]


def test_named_templates(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    folder = with_tokenizer(tmp_path / "m", tokenizer)
    write_gguf(planned(folder), "f16", tmp_path / "a.gguf")
    data = open_gguf(tmp_path / "a.gguf").metadata
    assert data["tokenizer.chat_templates"] == ["tool_use"]
    assert data["tokenizer.chat_template.tool_use"] == "{{ messages }}"
    assert data["tokenizer.chat_template"] == CHATML


def test_a_name_that_llama_cpp_would_misread(tmp_path: Path) -> None:
    """Its "phi3" in a name makes llama.cpp look for Phi-3's own tokens, and stop without them."""
    base = save_tiny("phi3", tmp_path / "Phi-3-mini", tiny_tokenizer())
    plan = plan_export(join(base, None), "Phi-3-mini")
    file = write_gguf(plan, "f32", tmp_path / "a.gguf").path
    assert open_gguf(file).metadata["general.name"] == "Phi 3-mini"
    with LlamaCpp(1) as llama:
        assert llama.tokenise(file, ["a  b"], add_special=False, parse_special=True)
    shutil.rmtree(base)
