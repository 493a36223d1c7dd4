"""Chat templates with a will of their own: they print the day, open a thought, leave a turn out."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from families import save_tiny
from sentencepiece_for_tests import train_pieces
from tokenizers_for_tests import CHATML, tiny_tokenizer
from transformers import AutoTokenizer

from tsugiki.config import build_config, read_yaml
from tsugiki.data import chat as chat_room
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import Rows
from tsugiki.data.rendering import today
from tsugiki.data.repairs import FOLDED
from tsugiki.data.row import Message, Row
from tsugiki.errors import DataError
from tsugiki.files import read_json
from tsugiki.pipelines import run_training
from tsugiki.terminal import Terminal

# What Llama 3.2's template does, in small.
DATED = (
    "{% if not day is defined %}{% if strftime_now is defined %}"
    "{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{{ 'Today: ' + day + '\n' }}" + CHATML
)
# The prompt opens a thought, and finished turns have none (R1).
OPENED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{{ 'A: ' + m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: <think>\n' }}{% endif %}"
)
# Writes the thought of an answer where its prompt has closed an empty one.
CLOSED = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "A: <think>{{ m.thought }}</think>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: <think></think>{% endif %}"
)
# Prints user and assistant turns alone.
SILENT = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}\n"
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
HEAD = "{% if messages[0].role == 'system' %}{{ messages[0].content | trim | upper }}{% endif %}"
DAY = datetime.date(2031, 2, 3)


def text_of(chat: ChatFormat) -> str:
    return chat.render([Message("user", "hi")], answer_next=True)


def test_a_template_prints_the_day_that_it_is_given() -> None:
    chat = ChatFormat.of(tiny_tokenizer(DATED), date=DAY)
    assert text_of(chat).startswith("Today: 03 Feb 2031\n<|im_start|>user\nhi<|im_end|>\n")
    assert ChatFormat.of(tiny_tokenizer(DATED)).date == today()
    again = ChatFormat.from_state(chat.state(), tiny_tokenizer(DATED))
    assert (again.date, text_of(again)) == (DAY, text_of(chat))
    with pytest.raises(DataError, match="date is none"):
        ChatFormat.from_state({**chat.state(), "date": "soon"}, tiny_tokenizer(DATED))
    plain = ChatFormat.of(tiny_tokenizer(CHATML), date=DAY)
    assert (plain.date, "date" in plain.state()) == (None, False)
    assert ChatFormat.of(tiny_tokenizer(DATED), "chatml", DAY).date is None


@pytest.mark.parametrize(
    ("form", "printed"),
    [("%Y-%m-%d", "2031-02-03"), ("%-d.%-m.%y, %A", "3.2.31, Monday"), ("%%d %F %e", "%d 2031-02-03  3"),
     ("%B %j %H:%M", "February 034 00:00"), ("no day", "no day")],
)  # fmt: skip
def test_every_form_of_the_day(form: str, printed: str) -> None:
    """Nothing else changes: lines and blanks at the template's beginning stay."""
    for before in ("", "\n", "  \n x", "  {% if true %}y{% endif %}\n"):
        source = before + "{% set f = '" + form + "' %}{{ strftime_now(f) }}"
        chat = ChatFormat.of(tiny_tokenizer(source), date=DAY)
        without = ChatFormat.of(tiny_tokenizer(before + "{% set f = 1 %}{{ 'Z' }}"))
        assert text_of(chat) == text_of(without).removesuffix("Z") + printed


def test_a_tools_template_prints_the_day_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": DATED, "tool_use": "tools: " + DATED}
    chat = ChatFormat.of(tokenizer, date=DAY)
    told = chat.render([Message("user", "hi")], answer_next=True, tools=[{"name": "add"}])
    assert told.startswith("tools: Today: 03 Feb 2031\n")
    assert text_of(chat).startswith("Today: 03 Feb 2031\n")


@pytest.mark.parametrize("template", [DATED, CHATML])
def test_a_run_goes_on_with_the_day_that_it_began_with(
    tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("llama", tmp_path / "model", tiny_tokenizer(template))
    rows = [{"prompt": f"say {i}", "completion": f"{i} it is"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "output": "run", "model": {"name": "model", "device": "cpu", "dtype": "float32"},
        "data": {"path": "rows.jsonl"},
        "train": {"max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1},
    }  # fmt: skip
    monkeypatch.setattr(chat_room, "today", lambda: DAY)
    run_training(build_config(given), Terminal(as_json=True))
    stored = build_config(read_yaml(Path("run/config.yaml")))
    kept = DAY if template is DATED else None
    assert stored.data.template_date == kept
    adapter = read_json(Path("run/adapter/tsugiki.json"))
    assert adapter["chat"].get("date") == (kept and kept.isoformat())
    monkeypatch.setattr(chat_room, "today", lambda: DAY + datetime.timedelta(1))
    run_training(stored, Terminal(as_json=True), resume=Path("run"))


@pytest.mark.parametrize(
    ("answer", "trained"),
    [("2", "2"), ("<think>\nhm\n</think>\n\n2", "hm\n</think>\n\n2"), (" <think>hm</think>2 ", "hm</think>2 ")],
)  # fmt: skip
def test_a_prompt_that_opens_a_thought_is_trained_as_chat_sends_it(
    answer: str, trained: str
) -> None:
    chat = ChatFormat.of(tiny_tokenizer(OPENED))
    talk = (Message("user", "1+1?"), Message("assistant", answer), Message("user", "sure?"))
    last = Message("assistant", "<think>\nagain\n</think>yes")
    first, second = chat.examples(Row((*talk, last), None, "a:1"))
    for example, before, said in ((first, talk[:1], trained), (second, talk, "again\n</think>yes")):
        prompt = chat.prompt_ids(before)
        assert list(example.ids[: len(prompt)]) == prompt
        assert example.labels[: len(prompt)] == (-100,) * len(prompt)
        assert chat.tokenizer.decode(example.labels[len(prompt) :]) == said + "<|im_end|>"


def test_a_prompt_that_the_answer_changes_is_told_with_a_way_out() -> None:
    chat = ChatFormat.of(tiny_tokenizer(CLOSED))
    answer = Message("assistant", "2", (("thought", "hm"),))
    row = Row((Message("user", "1+1?"), answer), None, "a:1")
    rows = Rows([row], [], "messages", 1)
    with pytest.raises(DataError, match="differently once the answer is there") as caught:
        prepare(rows, chat, max_length=200)
    assert "--template chatml" in str(caught.value)


BRIEF = Message("system", "Be brief. ")
ASKED, SAID = Message("user", "one?"), Message("assistant", "1")


def test_a_system_turn_that_a_template_leaves_out_goes_into_the_first_question() -> None:
    chat = ChatFormat.of(tiny_tokenizer(SILENT))
    for _ in range(2):
        (example,) = chat.examples(Row((BRIEF, ASKED, SAID), None, "a:1"))
        shown = chat.tokenizer.decode(example.ids)
        assert shown == "USER: Be brief. \n\none?\nASSISTANT: 1<|im_end|>"
    assert dict(chat.repairs) == {FOLDED: 2}
    prompt = chat.prompt_ids([BRIEF, ASKED])
    assert list(example.ids[: len(prompt)]) == prompt, "chat asks as training did"
    rows = Rows([Row((BRIEF, Message("narrator", "x"), SAID), None, "a:1")], [], "messages", 1)
    with pytest.raises(DataError, match="leaves out the system turn") as caught:
        prepare(rows, chat, max_length=200)
    assert "--template chatml" in str(caught.value)
    (plain,) = chat.examples(Row((Message("system", " "), ASKED, SAID), None, "a:1"))
    assert chat.tokenizer.decode(plain.ids).startswith("USER: one?")


def test_a_system_turn_that_a_template_prints_in_its_way_stays() -> None:
    chat = ChatFormat.of(tiny_tokenizer(HEAD + SILENT))
    (example,) = chat.examples(Row((BRIEF, ASKED, SAID), None, "a:1"))
    assert chat.tokenizer.decode(example.ids).startswith("BE BRIEF.USER: one?")
    assert not chat.repairs
    later = (ASKED, SAID, BRIEF, ASKED, SAID)  # there this template is silent
    (example,) = chat.examples(Row(later, None, "a:1"))
    first, second = chat.tokenizer.decode(example.ids).split("<|im_end|>", 1)
    assert first == "USER: one?\nASSISTANT: 1"
    assert "USER: Be brief. \n\none?\n" in second
    assert dict(chat.repairs) == {FOLDED: 1}


def test_an_answer_after_a_blank_is_written_with_one_blank(tmp_path: Path) -> None:
    """Llama's sentencepiece puts a blank before a text of its own; rinna's prompts end with one."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ('</s>' if m.role == 'assistant' else "
        "'\n') }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    train_pieces(tmp_path, template=template)
    chat = ChatFormat.of(AutoTokenizer.from_pretrained(tmp_path))
    (example,) = chat.examples(Row((ASKED, Message("assistant", "fox")), None, "a:1"))
    prompt = chat.prompt_ids([ASKED])
    assert list(example.ids[: len(prompt)]) == prompt
    assert chat.tokenizer.decode(example.ids).endswith("assistant: fox</s>")
