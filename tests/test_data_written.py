"""What a chat template does not write is told, and what rows bring already is not given twice."""

from __future__ import annotations

import pytest
from test_data_formats import lines, told, write
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.data.chat import MARKED, NO_CALLS, ChatFormat
from tsugiki.data.dataset import Prepared, prepare
from tsugiki.data.example import IGNORED
from tsugiki.data.formats import Rows, read_rows
from tsugiki.data.repairs import ENDED, JOINED
from tsugiki.data.row import Message, Row, RowProblem

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Kyoto"}}}
CALLS = Message("assistant", "", (("tool_calls", [CALL]),))
ASKED = Message("user", "weather?")
TOOLS = ({"type": "function", "function": {"name": "weather"}},)
# Writes calls and tools, and wants turns to alternate.
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% set ns = namespace(last='') %}"
    "{% for m in messages %}{% if m.role == ns.last %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.last = m.role %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def row(*messages: Message, tools: tuple[dict[str, object], ...] | None = None) -> Row:
    return Row(tuple(messages), None, "x:1", tools)


def prepared(rows: list[Row], template: str) -> Prepared:
    chat = ChatFormat.of(tiny_tokenizer(template))
    return prepare(Rows(rows, [], "messages"), chat, max_length=200)


def taught(chat: ChatFormat, one: Row) -> str:
    (example,) = chat.examples(one)
    return str(chat.tokenizer.decode([i for i in example.labels if i != IGNORED]))


@pytest.mark.parametrize("said", ["", "Let me look."])
@pytest.mark.parametrize("after", [(), (Message("tool", "sunny"), Message("assistant", "Sunny."))])
def test_calls_that_a_template_does_not_write_are_refused(
    said: str, after: tuple[Message, ...]
) -> None:
    calls = Message("assistant", said, CALLS.extra)
    chat = ChatFormat.of(tiny_tokenizer(CHATML))
    with pytest.raises(RowProblem, match=NO_CALLS):
        chat.examples(row(ASKED, calls, *after))
    writing = ChatFormat.of(tiny_tokenizer(CALLING))
    assert f"{said}<call>weather" in taught(writing, row(ASKED, calls, *after))


def test_joined_turns_keep_their_calls() -> None:
    chat = ChatFormat.of(tiny_tokenizer(CALLING))
    taken = taught(chat, row(ASKED, Message("assistant", "One moment."), CALLS))
    assert taken.startswith("One moment.<call>weather<|im_end|>")
    assert chat.repairs[JOINED] == 1
    plain = ChatFormat.of(tiny_tokenizer(CHATML))
    with pytest.raises(RowProblem, match=NO_CALLS):
        plain.examples(row(ASKED, Message("assistant", "One moment."), CALLS))


def test_tools_that_a_template_does_not_write_are_told() -> None:
    rows = [row(ASKED, Message("assistant", f"a{i}"), tools=TOOLS) for i in range(3)]
    silent = prepared(rows, CHATML)
    assert any("tools of 3 rows are not shown to the model" in note for note in silent.notes)
    shown = prepared(rows, CALLING)
    assert not any("tools of" in note for note in shown.notes)


def test_a_stop_token_in_an_answer() -> None:
    chat = ChatFormat.of(tiny_tokenizer(CHATML))
    plain = chat.examples(row(ASKED, Message("assistant", "yes")))
    ended = chat.examples(row(ASKED, Message("assistant", "yes<|im_end|>\n")))
    assert [e.labels for e in ended] == [e.labels for e in plain]
    assert chat.repairs == {ENDED: 1}
    with pytest.raises(RowProblem, match="before the answer's end"):
        chat.examples(row(ASKED, Message("assistant", "yes<|im_end|> no")))


@pytest.mark.parametrize("bos", [True, False])
def test_raw_text_with_its_own_marks_has_them_once(bos: bool) -> None:
    chat = ChatFormat.of(tiny_tokenizer(None, bos=bos))
    start = "<s>" if bos else ""
    (plain,) = chat.examples(Row((), "a b", "x:1"))
    (marked,) = chat.examples(Row((), f"{start}a b</s>\n", "x:1"))
    assert (marked.ids, marked.labels) == (plain.ids, plain.labels)
    assert chat.repairs == {MARKED: 1}


@pytest.mark.parametrize(
    "one",
    [
        {"指示": "訳せ", "入力": "犬", "回答": "dog"},
        {"指示": "訳せ", "入力": "犬", "出力": "dog", "番号": 1},
        {"質問": "訳せ", "文脈": "犬", "回答": "dog"},
    ],
)
def test_japanese_names_of_columns(one: dict[str, object], tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = read_rows(write(tmp_path, "a.jsonl", lines(one)))
    asked, answered = told(rows)[0]
    assert (asked[0], asked[1].split()) == ("user", ["訳せ", "犬"])
    assert answered == ("assistant", "dog")


def test_text_that_the_tokenizer_does_not_know_is_told_with_its_letters() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {word: i for i, word in enumerate(["<unk>", "</s>", *"abcdefg? "])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(letters, [], unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="</s>",
    )
    rows = [
        row(Message("user", "鬱 abc?"), Message("assistant", said)) for said in ("bad", "a鬱\n")
    ]
    notes = prepare(Rows(rows, [], "messages"), ChatFormat.of(tokenizer), max_length=200).notes
    (note,) = [note for note in notes if "<unk>" in note]
    assert note.startswith("<unk> is trained 2 times in 1 of 2 examples")
    assert "鬱, \\n;" in note
