"""What is refused between reading rows and the first step, and the counts for each way to train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import save_tiny, tiny_model
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.config import build_config
from tsugiki.errors import MemoryLimitError, ModelError
from tsugiki.pipelines import Session, prepare_session
from tsugiki.showing import show_plan
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


def test_full_fine_tuning_asks_for_no_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stacked experts cannot be adapted; every weight of them can be trained."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=320,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer(CHATML).save_pretrained(tmp_path)
    rows = [{"prompt": f"{n}", "completion": "!"} for n in range(4)]
    show_plan(session(tmp_path, rows, method="full"), Terminal(as_json=True))
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "full" in plan["memory_by_method"]
    assert plan["trainable"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
    )
    with pytest.raises(MemoryLimitError) as caught:
        session(tmp_path, rows, method="full", max_memory="1MB")
    assert "--method lora" in str(caught.value.fix)
