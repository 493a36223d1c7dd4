"""Ollama's Modelfile renders what training saw, on fifty conversations, and stops where it did."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from families import save_tiny
from go_template import collate, render
from test_merging_forms import our_adapter
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message
from tsugiki.data.templates import FALLBACKS
from tsugiki.exporting.ollama import COUNT, conversations, modelfile, read_wording, stop_texts
from tsugiki.models.hub import ResolvedModel, sprout_folder
from tsugiki.models.load import load_tokenizer
from tsugiki.shipping import export_gguf
from tsugiki.terminal import Terminal

GEMMA = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '')"
    " + m.content | trim + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
DEFAULTED = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"
    + CHATML
)
COUNTED = "{% for m in messages %}{{ loop.index }}{{ m.content }}</s>{% endfor %}"
SHOUTED = "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}"
FORMATS = {
    "chatml": CHATML, "gemma": GEMMA, "a system turn of its own": DEFAULTED,
    "braces": CHATML.replace("assistant\n", 'assistant\n{{ "{{ x }}" }}'),
}  # fmt: skip


def chats() -> dict[str, ChatFormat]:
    found = {name: ChatFormat.of(tiny_tokenizer(text)) for name, text in FORMATS.items()}
    found |= {name: ChatFormat.of(tiny_tokenizer(), name) for name in FALLBACKS}
    found["with BOS"] = ChatFormat.of(tiny_tokenizer(GEMMA, bos=True))
    folder = sprout_folder()
    found["sprout"] = ChatFormat.of(load_tokenizer(ResolvedModel(folder, "sprout")))
    return found


CHATS = chats()


@pytest.mark.parametrize("name", CHATS)
def test_fifty_conversations_render_alike(name: str) -> None:
    chat = CHATS[name]
    wording, remark = read_wording(chat)
    assert wording is not None, remark
    text = modelfile("./x.gguf", wording, stop_texts(chat))
    found = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)
    assert found
    talks = conversations()
    assert len(talks) == COUNT == 50
    assert len({len(talk) for talk in talks}) > 5
    for talk in talks:
        theirs = render(found.group(1), collate([(m.role, m.content) for m in talk]))
        if chat.starts_with_bos:  # Ollama puts it before the text itself
            theirs = chat.tokenizer.bos_token + theirs
        assert chat.encode(theirs) == chat.prompt_ids(talk)
    assert ("blanks" in remark) == ("gemma" in name or name == "with BOS")


def test_stop_tokens() -> None:
    text = modelfile("x", None, ["<|end|>", "</s>"])
    assert text == 'FROM x\nPARAMETER stop "<|end|>"\nPARAMETER stop "</s>"\n'
    assert stop_texts(CHATS["sprout"]) == ["<|end|>"]
    assert stop_texts(CHATS["alpaca"]) == ["</s>"]


@pytest.mark.parametrize("template", [COUNTED, SHOUTED], ids=["by count", "changed content"])
def test_formats_without_such_a_template(template: str) -> None:
    wording, remark = read_wording(ChatFormat.of(tiny_tokenizer(template)))
    assert wording is None
    assert "more than its role and place" in remark


def test_a_system_turn_that_the_format_refuses() -> None:
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + ("<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}")
    )
    chat = ChatFormat.of(tiny_tokenizer(refuses))
    wording, _ = read_wording(chat)
    assert wording is not None
    talk = (Message("system", "s"), Message("user", "u"))
    assert wording.render(talk) == chat.render(chat.repair(talk)[0], answer_next=True)


def test_an_export_brings_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny("llama", tmp_path / "base", tiny_tokenizer())
    our_adapter(base, tmp_path / "run" / "adapter", "instruction-ja")
    export_gguf(str(tmp_path / "run"), ["f16"], None, Terminal())
    text = (tmp_path / "run" / "gguf" / "run.Modelfile").read_text()
    assert text.startswith("FROM ./run-F16.gguf\nTEMPLATE")
    assert "### 回答:" in text
    assert 'PARAMETER stop "</s>"' in text
    said = capsys.readouterr().out
    assert "ollama create run" in said
    assert "llama-server -m" in said
