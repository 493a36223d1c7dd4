"""Calls of tools and their results, as templates of many kinds write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data_formats import lines, write
from tokenizers_for_tests import tiny_tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.data.example import IGNORED, Example
from tsugiki.data.formats import read_rows
from tsugiki.data.repairs import ALONE, AS_TEXT, FOLDED, NUMBERED, TOLD, UNASKED
from tsugiki.data.row import CALLS, Message, Row

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "京都"}}}
ASKED = Message("user", "weather?")
CALLED = Message("assistant", "", ((CALLS, [CALL]),))
RESULT, SAID = Message("tool", "SUNNY"), Message("assistant", "It is sunny.")
TALK = (ASKED, CALLED, RESULT, SAID)
OBJECT = '{"city": "京都"}'


def template(call: str, *, turn: str = "{{ m.content }}", end: str = "<|im_end|>") -> str:
    """ChatML with calls as given: c is a call's function."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.tool_calls %}}{{% for t in m.tool_calls %}}{{% set c = t.function %}}{call}"
        f"{{% endfor %}}{end}{{% else %}}{turn}<|im_end|>{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


JSON = template("{{ m.content }}<call>{{ c.name }}{{ c.arguments | tojson }}")


def of(source: str) -> ChatFormat:
    return ChatFormat.of(tiny_tokenizer(source))


def shown(example: Example, chat: ChatFormat) -> str:
    return str(chat.tokenizer.decode(example.ids))


def taught(example: Example, chat: ChatFormat) -> str:
    return str(chat.tokenizer.decode([i for i in example.labels if i != IGNORED]))


@pytest.mark.parametrize(
    ("call", "repairs"),
    [
        ("{{ c.name }}{{ c.arguments | tojson }}", {}),
        ("{{ c.name + c.arguments }}", {AS_TEXT: 1}),  # raises on an object
        ("{{ c.name }}{{ c.arguments }}", {AS_TEXT: 1}),  # prints it as Python would
    ],
)
@pytest.mark.parametrize("stored", ["openai", "plain", "function_call", "older"])
def test_arguments_are_written_as_json_however_they_are_stored(
    call: str, repairs: dict[str, int], stored: str, tmp_path: Path
) -> None:
    held = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
    calls = {
        "openai": {"content": None, CALLS: [{"function": {"name": "weather", "arguments": held}}]},
        "plain": {CALLS: [{"name": "weather", "arguments": json.loads(held)}]},
        "function_call": {"role": "function_call", "content": '{"name": "weather", "arguments": ' + held + "}"},
        "older": {"content": None, "function_call": {"name": "weather", "arguments": held}},
    }[stored]  # fmt: skip
    turns = [{"role": "user", "content": "weather?"}, {"role": "assistant", **calls}]
    rows = read_rows(write(tmp_path, "a.jsonl", lines({"messages": turns})))
    chat = of(template(call))
    (example,) = chat.examples(rows.rows[0])
    assert taught(example, chat) == f"weather{OBJECT}<|im_end|>"
    assert dict(chat.repairs) == repairs


@pytest.mark.parametrize("column", ["tools", "functions"])
@pytest.mark.parametrize("bare", [True, False])
def test_tools_are_given_as_templates_read_them(column: str, bare: bool, tmp_path: Path) -> None:
    tool = {"name": "weather", "parameters": {}}
    whole = {"type": "function", "function": tool}
    row = {"messages": [m.as_dict() for m in (ASKED, SAID)], column: [tool if bare else whole]}
    rows = read_rows(write(tmp_path, "a.jsonl", lines(row)))
    assert rows.rows[0].tools == (whole,)
    assert not any("not used" in note for note in rows.notes)


def test_what_pads_objects_in_parquet_is_not_written(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    def turns(name: str, arguments: dict[str, object]) -> list[dict[str, object]]:
        call = {"function": {"name": name, "arguments": arguments}}
        return [
            ASKED.as_dict() | {CALLS: None},
            {"role": "assistant", "content": "", CALLS: [call]},
        ]

    talks = [turns("weather", {"city": "京都"}), turns("time", {"zone": "JST"})]
    write_table(Table.from_pylist([{"messages": talk} for talk in talks]), tmp_path / "a.parquet")
    chat = of(JSON)
    first, second = (chat.examples(one)[0] for one in read_rows(tmp_path / "a.parquet").rows)
    assert taught(first, chat) == f"<call>weather{OBJECT}<|im_end|>"
    assert taught(second, chat) == '<call>time{"zone": "JST"}<|im_end|>'


@pytest.mark.parametrize("content", ["SUNNY", {"sky": "SUNNY"}, [{"sky": "SUNNY"}]])
def test_a_result_that_a_template_does_not_print_is_told_by_the_user(
    content: object, tmp_path: Path
) -> None:
    turns = [m.as_dict() for m in TALK]
    turns[2]["content"] = content
    rows = read_rows(write(tmp_path, "a.jsonl", lines({"messages": turns})))
    silent = of(
        JSON.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    )
    (example,) = silent.examples(rows.rows[0])
    result = content if isinstance(content, str) else json.dumps(content)
    assert f"<|im_start|>user\n{result}<|im_end|>" in shown(example, silent)
    assert dict(silent.repairs) == {TOLD: 1}
    prompt = silent.prompt_ids(rows.rows[0].messages[:3])
    assert list(example.ids[: len(prompt)]) == prompt
    printing = of(JSON)
    (example,) = printing.examples(rows.rows[0])
    assert f"<|im_start|>tool\n{result}<|im_end|>" in shown(example, printing)
    assert not printing.repairs


def test_text_beside_a_call_that_a_template_does_not_print_is_counted() -> None:
    both = Message("assistant", "Let me look.", CALLED.extra)
    silent = of(template("<call>{{ c.name }}"))
    (example,) = silent.examples(Row((ASKED, both), None, "a:1"))
    assert "Let me look." not in shown(example, silent)
    assert dict(silent.repairs) == {ALONE: 1}
    printing = of(JSON)
    (example,) = printing.examples(Row((ASKED, both), None, "a:1"))
    assert taught(example, printing) == f"Let me look.<call>weather{OBJECT}<|im_end|>"
    assert not printing.repairs


def test_calls_that_end_by_a_token_of_their_own() -> None:
    chat = of(template("<call>{{ c.name }}", end="</s>"))
    (example,) = chat.examples(Row(TALK, None, "a:1"))
    assert taught(example, chat) == "<call>weather</s>It is sunny.<|im_end|>"
    assert chat.tokenizer.convert_ids_to_tokens(list(chat.stop_ids)) == ["<|im_end|>", "</s>"]


def test_what_closes_each_call_is_no_end_of_the_answer() -> None:
    closing = "<call>{{ c.name }}<|im_end|>"
    chat = of(template(closing, end="</s>"))
    two = Message("assistant", "", ((CALLS, [CALL, CALL]),))
    (example,) = chat.examples(Row((ASKED, two), None, "a:1"))
    assert taught(example, chat) == "<call>weather<|im_end|><call>weather<|im_end|>"
    chat = of(template("<call>{{ c.name }}</s>", end="", turn="{{ m.content }}"))
    assert chat.call_stop == chat.stop_id, "</s> closes each call"


@pytest.mark.parametrize("odd", [["x"], {"a": 1}, 7])
def test_odd_ids_of_calls_make_no_traceback(odd: object) -> None:
    named = Message("assistant", "", ((CALLS, [{**CALL, "id": odd}]),))
    result = Message("tool", "SUNNY", (("tool_call_id", odd),))
    chat = of(JSON)
    (example,) = chat.examples(Row((ASKED, named, result, SAID), None, "a:1"))
    assert taught(example, chat).endswith("It is sunny.<|im_end|>")


def test_a_long_conversation_with_many_repairs_is_rendered_a_few_times_an_answer() -> None:
    """Not once for each combination of repairs and each answer."""
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('system') }}{% endif %}"
        "{% endfor %}"
    )
    silent = template("<call>{{ c.name }}{{ c.arguments | tojson }}").replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    chat = of(refusing + silent)
    both = Message("assistant", "Let me look.", CALLED.extra)
    talk = (Message("system", "Be brief."), *((ASKED, both, RESULT, SAID) * 10))
    count = 0
    render = chat.render

    def counted(*given: Any, **named: Any) -> str:
        nonlocal count
        count += 1
        return render(*given, **named)

    chat.render = counted  # type: ignore[method-assign]
    chat.examples(Row(talk, None, "a:1"))
    assert dict(chat.repairs) == {FOLDED: 1, TOLD: 1, ALONE: 1}
    assert count < 12 * 20, "twenty answers"


def test_calls_get_the_ids_that_a_template_asks_for() -> None:
    wants = (
        "{% for m in messages %}{% for t in m.tool_calls or [] %}{% if not t.id or t.id | length != 9 %}"
        "{{ raise_exception('ids of length 9') }}{% endif %}{% endfor %}{% endfor %}"
    )  # fmt: skip
    named = {**CALL, "id": "call_abcdefghijkl"}
    result = Message("tool", "SUNNY", (("tool_call_id", named["id"]),))
    talk = (ASKED, Message("assistant", "", ((CALLS, [named]),)), result, SAID)
    turn = "{{ m.content }}{{ m.tool_call_id }}"
    chat = of(wants + template("{{ c.name }}{{ t.id }}", turn=turn))
    for one in (talk, TALK):
        (example,) = chat.examples(Row(one, None, "a:1"))
        assert taught(example, chat).startswith("weathercall00100<|im_end|>")
        assert "SUNNYcall00100<|im_end|>" in shown(example, chat)
    assert dict(chat.repairs) == {NUMBERED: 2}


# Mistral v0.3: the system turn stands before the last question, and nowhere if that is answered.
LATE = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


def test_each_answer_follows_the_prompt_that_chat_sends() -> None:
    chat = of(LATE)
    talk = (
        Message("system", "Be brief."),
        ASKED,
        SAID,
        Message("user", "sure?"),
        Message("assistant", "yes"),
    )
    examples = chat.examples(Row(talk, None, "a:1"))
    for example, end in zip(examples, (2, 4), strict=True):
        prompt = chat.prompt_ids(talk[:end])
        assert list(example.ids[: len(prompt)]) == prompt
        assert taught(example, chat) == talk[end].content + "</s>"
    assert shown(examples[1], chat).count("Be brief.") == 1
    assert dict(chat.repairs) == {FOLDED: 1}
    (plain,) = chat.examples(Row(talk[1:], None, "a:1"))
    assert taught(plain, chat) == "It is sunny.</s>yes</s>"


def test_an_opening_answer_after_a_system_turn() -> None:
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('alternate') }}{% endif %}"
    )
    chat = of(JSON.replace("{% for m in messages %}", alternating, 1))
    greeting = (Message("system", "Be brief."), Message("assistant", "Hello!"), ASKED, SAID)
    (example,) = chat.examples(Row(greeting, None, "a:1"))
    assert shown(example, chat).startswith("<|im_start|>user\nBe brief.\n\nweather?<|im_end|>")
    assert dict(chat.repairs) == {FOLDED: 1, UNASKED: 1}
