"""One prompt, one token list: trainer, chat, GGUF file and Modelfile, on fifty conversations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from families import save_tiny
from go_template import collate, render
from test_exporting_ollama import GEMMA
from test_merging_forms import our_adapter
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.data.example import IGNORED
from tsugiki.data.row import Message, Row
from tsugiki.exporting.ollama import conversations
from tsugiki.formats.gguf_file import open_gguf
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.models.hub import sprout_folder
from tsugiki.proof.artefact import open_artefact
from tsugiki.shipping import export_gguf
from tsugiki.terminal import Terminal


def sprout(folder: Path) -> str:
    return str(sprout_folder())


def own_template(folder: Path) -> str:
    return str(save_tiny("llama", folder / "base", tiny_tokenizer(CHATML)))


def with_bos(folder: Path) -> str:
    return str(save_tiny("llama", folder / "base", tiny_tokenizer(GEMMA, bos=True)))


def format_of_training(folder: Path) -> str:
    """The base has no template: the adapter brings the one that it was trained in."""
    base = save_tiny("qwen3", folder / "base", tiny_tokenizer())
    our_adapter(base, folder / "run" / "adapter", "instruction-ja")
    return str(folder / "run")


def trained_prompt(chat: ChatFormat, talk: tuple[Message, ...]) -> list[int]:
    """What training masks before the answer."""
    row = Row(messages=(*talk, Message("assistant", "ok")), text=None, source="x")
    example = chat.examples(row, train_on="last")[0]
    begin = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    return list(example.ids[:begin])


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@pytest.mark.parametrize("source", [sprout, own_template, with_bos, format_of_training])
def test_one_prompt_gives_one_token_list(source: Callable[[Path], str], tmp_path: Path) -> None:
    given = source(tmp_path)
    chat = open_artefact(given).chat()
    (shipped,) = export_gguf(given, ["f16"], tmp_path / "out", Terminal())
    known = open_gguf(shipped.path).metadata
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(known["tokenizer.chat_template"])
    bos = chat.tokenizer.bos_token if chat.starts_with_bos else ""
    (modelfile,) = (tmp_path / "out").glob("*.Modelfile")
    go = re.search(r'TEMPLATE """(.*?)"""\n', modelfile.read_text(), re.DOTALL)
    assert go
    talks = [chat.repair(talk)[0] for talk in conversations()]
    ours = [chat.prompt_ids(talk) for talk in talks]
    file = [
        template.render(
            messages=[m.as_dict() for m in talk], add_generation_prompt=True, bos_token=bos,
            eos_token=chat.tokenizer.eos_token, raise_exception=refuse,
        )
        for talk in talks
    ]  # fmt: skip
    theirs = [render(go.group(1), collate([(m.role, m.content) for m in talk])) for talk in talks]
    with LlamaCpp(1) as llama:
        in_file = llama.tokenise(shipped.path, file, add_special=False, parse_special=True)
        in_ollama = llama.tokenise(shipped.path, theirs, add_special=True, parse_special=True)
        ends = llama.ends(shipped.path)
    assert [trained_prompt(chat, talk) for talk in talks] == ours, "trainer"
    assert in_file == ours, "GGUF"
    assert in_ollama == ours, "Modelfile"
    assert set(chat.stop_ids) <= set(ends)
