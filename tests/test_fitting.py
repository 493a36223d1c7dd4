"""What is refused between reading rows and the first step, and the counts for each way to train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import save_tiny, tiny_model
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.config import build_config
from tsugiki.errors import ModelError
from tsugiki.pipelines import Session, prepare_session
from tsugiki.terminal import Terminal


def session(folder: Path, rows: list[dict[str, str]], **train: object) -> Session:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build_config(
        {
            "model": {"name": str(folder), "device": "cpu", "dtype": "float32"},
            "data": {"path": path},
            "train": train,
        }
    )
    return prepare_session(config, Terminal(as_json=True), None)


def few_rows(folder: Path, rows: int) -> Path:
    """A base whose embedding has less rows than its tokenizer has tokens (320)."""
    tiny_model("llama", vocab=rows).save_pretrained(folder)  # type: ignore[operator]
    tiny_tokenizer(CHATML).save_pretrained(folder)
    return folder


def test_a_token_beyond_the_embedding_is_refused_before_the_first_step(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    word = max((len(tokenizer.encode(w)), w) for w in ("the quick", "brown fox"))[1]
    last = max(tokenizer.encode(word))
    folder = few_rows(tmp_path / "small", last)
    plain = {"prompt": "!", "completion": "!"}
    session(folder, [plain] * 3)
    with pytest.raises(
        ModelError, match=rf"has no row in this model's embedding \({last} rows\)"
    ) as e:
        session(folder, [plain, plain, {"prompt": "!", "completion": word}])
    assert repr(tokenizer.convert_ids_to_tokens(last)) in e.value.problem
    assert "rows.jsonl" in str(e.value.got)
    assert "3" in str(e.value.got)
    assert "resize_token_embeddings(320)" in str(e.value.fix)
    with pytest.raises(ModelError, match="has no row") as e:
        session(folder, [plain] * 3, sample_prompt=[word])
    assert "--sample-prompt" in str(e.value.got)


def test_a_stop_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model", tiny_tokenizer(CHATML))
    tokenizer = tiny_tokenizer(CHATML)
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="token '<stop>' has no row") as e:
        session(folder, [{"prompt": "!", "completion": "!"}] * 3)
    assert "the stop tokens" in str(e.value.got)
