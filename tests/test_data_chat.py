"""Conversations as the model sees them: proven labels, repairs, stop tokens, hostile templates."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.data.example import IGNORED, Example
from tsugiki.data.lengths import WITHOUT_SYSTEM, fit
from tsugiki.data.rendering import Watch, check_template
from tsugiki.data.repairs import FOLDED, JOINED, UNASKED
from tsugiki.data.report import show
from tsugiki.data.row import Message, Row, RowProblem
from tsugiki.data.templates import FALLBACKS
from tsugiki.errors import DataError

# What real templates do, in small. Thinking: only the last answer gets a think block (Qwen3).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = "<think>\n\n</think>\n\n"
# The prompt opens a thought, and finished turns have none (R1).
OPENED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# No system role, roles must alternate, BOS in the template (Gemma).
ALTERNATING = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# The stop token is the tokenizer's own end of text, and spaces hug it (Llama 2).
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)
# Ends answers with nothing at all.
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATES = {
    "plainly": CHATML, "thinking": THINKING, "alternating": ALTERNATING, "inst": INST,
    "endless": ENDLESS, "opened": OPENED,
}  # fmt: skip


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str) -> Message:
    return Message("assistant", text)


def row(*messages: Message) -> Row:
    return Row(messages, None, "rows.jsonl:1")


TALK = (user("one?"), says("1"), user("two?"), says("2"))


def of(template: str) -> ChatFormat:
    if template in FALLBACKS:
        return ChatFormat.of(tiny_tokenizer(), template)
    return ChatFormat.of(
        tiny_tokenizer(TEMPLATES[template], bos=template in ("alternating", "inst"))
    )


def trained(example: Example, chat: ChatFormat) -> list[str]:
    """The trained spans as text."""
    spans: list[list[int]] = []
    for before, label in zip((IGNORED, *example.labels), example.labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                spans.append([])
            spans[-1].append(label)
    return [chat.tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize(
    ("template", "spans", "stop"),
    [
        ("plainly", [["1<|im_end|>", "2<|im_end|>"]], "<|im_end|>"),
        ("thinking", [[THOUGHT + "1<|im_end|>"], [THOUGHT + "2<|im_end|>"]], "<|im_end|>"),
        ("opened", [["1<|im_end|>"], ["2<|im_end|>"]], "<|im_end|>"),
        ("alternating", [["1<|im_end|>", "2<|im_end|>"]], "<|im_end|>"),
        ("inst", [[" 1 </s>", " 2 </s>"]], "</s>"),
        ("endless", [["assistant: 1\n</s>"], ["assistant: 2\n</s>"]], "</s>"),
    ],
)  # fmt: skip
def test_each_answer_is_located_and_ends_with_the_stop_token(
    template: str, spans: list[list[str]], stop: str
) -> None:
    chat = of(template)
    assert chat.tokenizer.convert_ids_to_tokens(chat.stop_id) == stop
    assert [trained(e, chat) for e in chat.examples(row(*TALK))] == spans
    last = chat.examples(row(*TALK), "last")
    assert [trained(e, chat) for e in last] == [spans[-1][-1:]]


@pytest.mark.parametrize("template", ["plainly", "thinking"])
def test_an_answer_of_weight_0_is_shown_and_not_trained(template: str) -> None:
    chat = of(template)
    unsure = Message("assistant", "1", trained=False)
    (example,) = chat.examples(row(TALK[0], unsure, *TALK[2:]))
    thought = THOUGHT if template == "thinking" else ""
    assert trained(example, chat) == [f"{thought}2<|im_end|>"]
    assert "1<|im_end|>" in chat.tokenizer.decode(example.ids)
    with pytest.raises(RowProblem, match="weight 0"):
        chat.examples(row(TALK[0], unsure))
    if template == "plainly":
        (example,) = chat.examples(row(TALK[0], unsure, *TALK[2:]), "everything")
        first, second = trained(example, chat)
        assert (first[-10:], second[:15]) == ("assistant\n", "\n<|im_start|>us")


@pytest.mark.parametrize("template", [*TEMPLATES, *FALLBACKS])
def test_one_prompt_gives_one_token_list(template: str) -> None:
    chat = of(template)
    for number in (1, 3):  # what chat sends before each answer is what was trained before it
        prompt = chat.prompt_ids(TALK[:number])
        example = next(e for e in chat.examples(row(*TALK[: number + 1]))[::-1])
        begin = len(example.labels) - list(example.labels[::-1]).index(IGNORED)
        assert list(example.ids[:begin]) == prompt
        assert example.labels[begin:] == example.ids[begin:]
        shown = show(example, chat.tokenizer, plain=True).plain
        assert shown.rpartition("⟦")[2] == chat.tokenizer.decode(example.ids[begin:]) + "⟧"


@pytest.mark.parametrize("template", [*TEMPLATES, *FALLBACKS])
def test_random_dialogues_are_labelled_or_refused(template: str) -> None:
    chat, draw = of(template), random.Random(template)
    words = [
        "a",
        "fox",
        "\n",
        " ",
        "名前",
        "<|im_end|>",
        "</s>",
        "### 回答:\n",
        "[INST]",
        "😀",
        "1",
    ]
    done = 0
    for _ in range(560):  # 5,040 over all formats
        talk = [
            Message(draw.choice(["user", "user", "assistant", "assistant", "system", "tool"]),
                    "".join(draw.choices(words, k=draw.randint(1, 5))))
            for _ in range(draw.randint(1, 6))
        ]  # fmt: skip
        try:
            examples = chat.examples(row(*talk), draw.choice(["assistant", "last", "everything"]))
        except RowProblem:
            continue
        done += 1
        for example in examples:
            assert len(example.ids) == len(example.labels)
            assert chat.stop_id in example.labels
            assert all(
                label in (IGNORED, i) for i, label in zip(example.ids, example.labels, strict=True)
            )
    assert done > 40


def test_everything_trains_all_but_the_first_token() -> None:
    chat = of("alternating")
    (example,) = chat.examples(row(*TALK), "everything")
    assert example.labels == (IGNORED, *example.ids[1:])
    assert example.ids.count(0) == 1  # one BOS, not two


def test_a_template_that_raises_gets_a_named_repair() -> None:
    chat = of("alternating")
    both = row(Message("system", "Be brief."), user("one?"), user("or two?"), says("1"), says("2"))
    (example,) = chat.examples(both)
    assert dict(chat.repairs) == {FOLDED: 1, JOINED: 1}
    assert chat.tokenizer.decode(example.ids) == (
        "<s><|im_start|>user\nBe brief.\n\none?\n\nor two?<|im_end|>\n"
        "<|im_start|>model\n1\n\n2<|im_end|>"
    )
    with pytest.raises(RowProblem, match="must alternate"):
        chat.examples(row(user("one?"), says("1"), Message("narrator", "2"), says("3")))


def test_answers_in_a_row_are_joined_where_the_template_cannot_prove_them() -> None:
    chat = of("inst")
    whole = chat.examples(row(user("a"), says("b"), says("c")))
    assert [trained(e, chat) for e in whole] == [[" b </s> c </s>"]]
    with pytest.raises(RowProblem, match="begins with an answer"):
        of("chatml").examples(row(says("b")))
    with pytest.raises(RowProblem, match="no answer"):
        of("chatml").examples(row(user("b")))


def test_an_opening_answer_that_nothing_asked_for_is_left_out() -> None:
    for name in ("inst", "chatml"):
        chat = of(name)
        (whole,) = chat.examples(row(says("0"), says("1"), user("a"), says("b")))
        (plain,) = of(name).examples(row(user("a"), says("b")))
        assert whole.ids == plain.ids
        assert dict(chat.repairs) == {UNASKED: 1}
        with pytest.raises(RowProblem, match="no answer"):
            chat.examples(row(says("0"), user("a")))


def test_tool_calls_and_tools_reach_the_template() -> None:
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = ChatFormat.of(tiny_tokenizer(template))
    call = Message("assistant", "", (("tool_calls", [{"function": {"name": "add"}}]),))
    talk = (user("2+2?"), call, Message("tool", "4"), says("four"))
    (example,) = chat.examples(Row(talk, None, "a:1", tools=({"name": "add"},)))
    assert trained(example, chat)[0] == '[{"function": {"name": "add"}}]<|im_end|>'
    assert chat.tokenizer.decode(example.ids).startswith('[{"name": "add"}]<|im_start|>')


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_template_the_fallbacks_work(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    chat = ChatFormat.of(tokenizer)
    assert chat.name == "plain"
    (example,) = chat.examples(row(user("one?"), says("1")))
    assert tokenizer.decode(example.ids) == ("<s>" if bos else "") + "one?\n1</s>"
    assert trained(example, chat) == ["1</s>"]
    kept = (("instruction", "訳せ"), ("input", "fox"))
    told = Row((Message("user", "訳せ\nfox", kept), says("狐")), None, "a:1", instruction=True)
    (japanese,) = ChatFormat.of(tokenizer, "instruction-ja").examples(told)
    assert tokenizer.decode(japanese.ids).removeprefix("<s>") == (
        "### 指示:\n訳せ\n\n### 入力:\nfox\n\n### 回答:\n狐</s>"
    )


def test_raw_text_is_trained_whole_with_one_end() -> None:
    chat = ChatFormat.of(tiny_tokenizer(bos=True))
    (example,) = chat.examples(Row((), "the fox </s>", "a:1"))
    assert (example.ids[0], example.labels[0]) == (0, IGNORED)
    assert example.labels[1:] == example.ids[1:]
    assert example.ids[-1] == 1


def test_an_answer_never_ends_without_any_stop_token() -> None:
    tokenizer = tiny_tokenizer(ENDLESS)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="could never end"):
        ChatFormat.of(tokenizer)


def test_a_saved_format_is_found_again_and_another_refused() -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatFormat.of(tokenizer, "alpaca")
    again = ChatFormat.from_state(chat.state(), tokenizer)
    assert again.prompt_ids([user("a")]) == chat.prompt_ids([user("a")])
    with pytest.raises(DataError, match="unknown chat format"):
        ChatFormat.from_state({"format": "mystery"}, tokenizer)
    with pytest.raises(DataError, match="another token"):
        ChatFormat.from_state({**chat.state(), "stop_id": 3}, tokenizer)


HOSTILE = {
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "include": "{% include '/etc/passwd' %}",
    "change": "{% set _ = messages.append(1) %}",
    "mutate": "{{ messages[0].update({'role': 'x'}) }}",
    "format": "{{ '{0.__class__}'.format(messages) }}{{ ('%s' % messages).__class__ }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for a in range(999999999) %}x{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "repeat": "{{ 'a' * 99999 * 99999 }}",
    "list": "{{ [1] * 99999 }}",
    "width": "{{ 'a'.center(99999999999) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
    "divide": "{{ 1 / 0 }}",
    "nothing": "",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_is_refused_soon(kind: str) -> None:
    tokenizer = tiny_tokenizer(HOSTILE[kind] or "{# #}")
    with pytest.raises((DataError, RowProblem)):
        ChatFormat.of(tokenizer).examples(row(*TALK))


def test_a_render_is_stopped_and_the_next_one_runs() -> None:
    watch = Watch(seconds=0.1)

    def endless() -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:  # what a template could do
                continue

    for _ in range(2):
        with pytest.raises(DataError, match="did not finish"):
            watch.bounded(endless)
        assert watch.bounded(lambda: "done") == "done"


def test_real_constructs_are_not_refused() -> None:
    check_template("{% set n = loop.index0 * 2 %}{{ '%d' % n }}{{ 10 * m.width }}")
    check_template("{% generation %}x{% endgeneration %}")  # syntax of transformers' own


# Long rows


def long_talk(chat: ChatFormat) -> Example:
    talk = row(
        Message("system", "Be brief."),
        user("first question"), says("first answer"),
        user("second question"), says("second answer"),
        user("third question, " + "and more, " * 5 + "the end?"), says("third answer"),
    )  # fmt: skip
    return chat.examples(talk)[-1]


@pytest.mark.parametrize("template", ["plainly", "thinking"])
def test_window_drops_the_oldest_turns_then_the_start_of_the_last_user_text(template: str) -> None:
    chat = of(template)
    example = long_talk(chat)
    seen = []
    for limit in range(len(example.ids) - 1, 10, -1):
        found = fit(example, limit, None, chat, "assistant")
        assert isinstance(found, tuple)
        pieces, name = found
        if name == WITHOUT_SYSTEM:
            bare = chat.tokenizer.decode(pieces[-1].ids)
            assert "Be brief." not in bare
            assert bare.endswith("third answer<|im_end|>")
            break
        assert name == "window"
        assert all(len(piece.ids) <= limit for piece in pieces)
        text = chat.tokenizer.decode(pieces[-1].ids)
        assert text.endswith("third answer<|im_end|>")
        assert pieces[-1].labels[-1] == chat.stop_id
        assert text.startswith("<|im_start|>system\nBe brief.")
        if template == "thinking":
            assert len(pieces) == 1  # the answers before it have examples of their own
        if not seen or seen[-1] != text:
            seen.append(text)
    assert "first" not in seen[0]
    assert any("second" not in text and "third question" in text for text in seen)
    assert "third question" not in seen[-1]
    assert seen[-1].count("<|im_start|>") == 3
    assert "the answer alone has" in str(fit(
        chat.examples(row(user("q"), says("long " * 20)))[0], 20, None, chat, "assistant"
    ))  # fmt: skip


def test_window_shortens_the_input_and_keeps_the_instruction() -> None:
    chat = ChatFormat.of(tiny_tokenizer(), "instruction-ja")
    kept = (("instruction", "translate"), ("input", "x" * 90 + " fox"))
    told = Row((Message("user", "…", kept), says("狐")), None, "a:1", instruction=True)
    (example,) = chat.examples(told)
    found = fit(example, len(example.ids) - 50, None, chat, "assistant")
    assert isinstance(found, tuple)
    text = chat.tokenizer.decode(found[0][0].ids)
    assert "### 指示:\ntranslate\n\n### 入力:\nx" in text
    assert text.endswith(" fox\n\n### 回答:\n狐</s>")


def test_skip_and_split() -> None:
    chat = ChatFormat.of(tiny_tokenizer(bos=True))
    example = long_talk(chat)
    skipped = fit(example, 20, "skip", chat, "assistant")
    assert "more than --max-length 20" in str(skipped)
    assert "not for such rows" in str(fit(example, 20, "split", chat, "assistant"))
    (raw,) = chat.examples(Row((), "the quick brown fox jumps over the lazy dog " * 9, "a:1"))
    for limit in range(2, 40):
        found = fit(raw, limit, None, chat, "assistant")
        assert isinstance(found, tuple)
        pieces, name = found
        assert name == "split"
        assert all(len(p.ids) <= limit and p.labelled for p in pieces)
        labels = [label for p in pieces for label in p.labels if label != IGNORED]
        assert labels == list(raw.ids[1:])  # each token predicted once
        assert [chat.eos in p.ids for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert fit(raw, len(raw.ids), None, chat, "assistant") == ([raw], None)
    assert "not for such rows" in str(fit(raw, 20, "window", chat, "assistant"))


@pytest.mark.shared
def test_a_tokenizer_with_only_two_special_tokens(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    chat = ChatFormat.of(AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K"))
    (example,) = chat.examples(row(*TALK))
    assert chat.tokenizer.convert_ids_to_tokens(list(example.ids))[0] == "<s>"
    assert example.ids.count(chat.bos) == 1
    assert [span.strip() for span in trained(example, chat)] == ["1</s>", "2</s>"]
