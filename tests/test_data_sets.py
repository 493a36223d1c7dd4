"""Sets of rows: splits, duplicates, counts, fingerprints, the loader's order, and what is shown."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared, prepare
from tsugiki.data.example import IGNORED, Example
from tsugiki.data.files import Skipped
from tsugiki.data.formats import Rows
from tsugiki.data.loader import Loader, epoch_order
from tsugiki.data.report import counts_table, show
from tsugiki.data.row import Message, Row
from tsugiki.errors import DataError, RunError


def pair(prompt: str, answer: str, number: int = 0) -> Row:
    return Row((Message("user", prompt), Message("assistant", answer)), None, f"a.jsonl:{number}")


def rows_of(*rows: Row, skipped: tuple[Skipped, ...] = ()) -> Rows:
    numbered = [Row(r.messages, r.text, f"a.jsonl:{i}") for i, r in enumerate(rows, 1)]
    return Rows(numbered, list(skipped), "prompt/completion", len(rows) + len(skipped))


def chat_of(template: str | None = CHATML) -> ChatFormat:
    return ChatFormat.of(tiny_tokenizer(template))


def prepared(*rows: Row, **how: object) -> Prepared:
    return prepare(rows_of(*rows), chat_of(), **{"max_length": 200, **how})  # type: ignore[arg-type]


def prompts(examples: tuple[Example, ...]) -> set[str]:
    return {e.key for e in examples}


def test_equal_prompts_stay_on_one_side() -> None:
    for seed in range(8):
        rows = [pair(f"q{i % 40}", f"a{i}") for i in range(120)]
        found = prepared(*rows, seed=seed)
        assert len(found.train) + len(found.held_out) == 120
        assert len(prompts(found.held_out)) == 4
        assert not prompts(found.train) & prompts(found.held_out)
    assert prepared(*rows, seed=1).fingerprint == prepared(*rows, seed=1).fingerprint
    assert prepared(*rows, seed=1).fingerprint != prepared(*rows, seed=2).fingerprint


def test_a_conversation_and_its_beginning_stay_on_one_side() -> None:
    rows = []
    for i in range(30):
        short = pair(f"q{i}", f"a{i}")
        more = (Message("user", "and then?"), Message("assistant", f"b{i}"))
        rows += [short, Row((*short.messages, *more), None, "")]
    found = prepared(*rows, eval_ratio=0.3)
    firsts = [{e.ids[:12] for e in side} for side in (found.train, found.held_out)]
    assert not firsts[0] & firsts[1]
    assert len(found.held_out) == 18


def test_below_twenty_rows_nothing_is_held_out_and_it_says_so() -> None:
    few = prepared(*(pair(f"q{i}", "a") for i in range(19)))
    assert few.held_out == ()
    assert "fewer than 20" in few.notes[0]
    enough = prepared(*(pair(f"q{i}", "a") for i in range(20)))
    assert (len(enough.train), len(enough.held_out)) == (18, 2)
    many = prepared(*(pair(f"q{i}", "a") for i in range(2500)))
    assert len(many.held_out) == 200
    assert prepared(*(pair(f"q{i}", "a") for i in range(40)), eval_ratio=0.0).held_out == ()
    assert len(prepared(*(pair(f"q{i}", "a") for i in range(40)), eval_ratio=0.99).train) == 1


def test_long_texts_hold_out_their_ends() -> None:
    texts = [Row((), f"{name} " + "the quick brown fox " * 60, None or "") for name in "ab"]
    found = prepare(rows_of(*texts), chat_of(None), max_length=20)
    assert {e.source for e in found.held_out} == {"a.jsonl:1", "a.jsonl:2"}
    for source in ("a.jsonl:1", "a.jsonl:2"):
        assert [e.ids[-1] == 1 for e in found.train if e.source == source].count(True) == 0
        assert [e.ids[-1] for e in found.held_out if e.source == source][-1] == 1
    assert "held out" in found.notes[0]


def test_held_out_rows_of_their_own() -> None:
    ours = rows_of(*(pair(f"q{i}", "a") for i in range(40)))
    theirs = rows_of(pair("q1", "a"), pair("new", "b"), skipped=(Skipped("b.jsonl:3", "broken"),))
    found = prepare(ours, chat_of(), max_length=99, eval_rows=theirs)
    assert (len(found.train), len(found.held_out)) == (40, 2)
    assert "prompts of --eval-data that are in the training rows too: 1" in found.notes
    assert found.skipped == (Skipped("b.jsonl:3", "broken"),)


def test_duplicates_are_named_and_counts_are_exact() -> None:
    rows = [
        pair("q", "a"),
        pair("p", "a"),
        pair("q", "a"),
        pair("q", "b" * 300),
        pair("x" * 300, "c"),
    ]
    found = prepare(
        rows_of(*rows, skipped=(Skipped("a.jsonl:9", "not valid JSON"),)), chat_of(), max_length=60
    )
    assert found.notes[1] == "1 duplicate, kept: a.jsonl:3 repeats a.jsonl:1"
    assert [s.source for s in found.skipped] == ["a.jsonl:9", "a.jsonl:4"]
    assert "the answer alone has" in found.skipped[1].reason
    wanted = {"rows": 6, "kept": 4, "skipped": 2, "duplicates": 1, "train": 4, "held_out": 0,
              "long: window": 1}  # fmt: skip
    assert {key: found.counts[key] for key in wanted} == wanted
    assert found.counts["tokens"] == sum(len(e.ids) for e in found.train)
    assert found.counts["labelled"] == sum(e.labelled for e in found.train)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(counts_table(found))
    told = console.export_text()
    assert "6 read, 4 kept, 2 skipped" in told
    assert "1 × window" in told
    console.file.close()


def test_repairs_are_counted_once_a_row() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [
        Row(
            (Message("system", "s"), Message("user", "x " * 90), Message("assistant", "a")),
            None,
            "",
        )
    ]
    found = prepare(rows_of(*rows * 3), chat_of(template), max_length=40)
    assert found.counts["repair: system turn put into a user turn"] == 3
    assert found.counts["long: window"] == 3


def test_every_answer_has_one_example_where_turns_cannot_be_joined() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{{ '<t>' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    )
    talk = tuple(
        m
        for i in range(4)
        for m in (Message("user", f"question {i}"), Message("assistant", f"answer {i}"))
    )
    chat = chat_of(template)
    for limit in range(40, 130, 6):
        try:
            found = prepare(rows_of(Row(talk, None, "")), chat, max_length=limit)
        except DataError:
            continue
        answers = [
            chat.tokenizer.decode([t for t in e.labels if t != IGNORED]) for e in found.train
        ]
        assert len(answers) == len(set(answers))
        assert answers[-1] == "<t>answer 3<|im_end|>"


def test_rows_are_kept_or_skipped_and_each_file_is_counted_alone() -> None:
    thought = "{{ '<t>' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    template = CHATML.replace("{{ m.content }}", thought)
    talk = (Message("user", "q"), Message("assistant", "a " * 200))
    more = (*talk, Message("user", "r"), Message("assistant", "b"))
    rows = rows_of(Row(more, None, ""), Row(talk, None, ""), pair("s", "c"))
    held = rows_of(pair("t", "d"), skipped=(Skipped("held.jsonl:9", "bad"),))
    found = prepare(rows, chat_of(template), max_length=60, long="skip", eval_rows=held)
    wanted = {"rows": 3, "kept": 1, "skipped": 2, "left_out": 0}
    wanted |= {"eval_rows": 2, "eval_kept": 1, "eval_skipped": 1, "eval_left_out": 0}
    assert {key: found.counts[key] for key in wanted} == wanted
    short = prepare(rows, chat_of(template), max_length=60, eval_rows=held)
    wanted |= {"kept": 2, "skipped": 1, "left_out": 1}
    assert {key: short.counts[key] for key in wanted} == wanted
    assert [s.source for s in short.skipped] == ["a.jsonl:1", "a.jsonl:2", "held.jsonl:9"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(counts_table(short))
    told = console.export_text()
    assert "3 read, 2 kept, 1 skipped; of the kept 1 answers left out" in told
    assert "2 read, 1 kept, 1 skipped" in told
    console.file.close()


def test_thoughts_that_the_template_does_not_write_are_told() -> None:
    thought = Message("assistant", "a", (("reasoning_content", "so"),))
    rows = rows_of(Row((Message("user", "q"), thought), None, ""))
    told = "reasoning_content of 1 rows is not trained: the chat template does not read it"
    assert told in prepare(rows, chat_of(), max_length=99).notes
    template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    found = prepare(rows, chat_of(template), max_length=99)
    assert told not in found.notes
    assert "⟦soa<|im_end|>⟧" in show(found.train[0], chat_of().tokenizer, plain=True).plain


def test_held_out_rows_of_which_none_can_be_used_are_refused() -> None:
    question = rows_of(Row((Message("user", "q"),), None, ""))
    with pytest.raises(DataError, match=r"(?s)no row of --eval-data.*a.jsonl:1: no answer"):
        prepare(rows_of(pair("q", "a")), chat_of(), max_length=99, eval_rows=question)


@pytest.mark.parametrize(
    ("template", "limit", "way"),
    [
        (CHATML, 2, "a larger --max-length"),
        ("{{ raise_exception('no') }}", 99, "--template chatml"),
    ],
)
def test_the_way_out_where_every_row_is_left_out(template: str, limit: int, way: str) -> None:
    rows = rows_of(pair("q", "a"), pair("r", "b"))
    with pytest.raises(DataError, match="nothing would be trained") as caught:
        prepare(rows, chat_of(template), max_length=limit)
    assert way in str(caught.value.fix)
    assert "a.jsonl:1" in str(caught.value.got)


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_to_train_is_refused(strict: bool) -> None:
    with pytest.raises(DataError, match="a.jsonl:1" if strict else "nothing would be trained"):
        prepared(pair("q", "a" * 500), max_length=20, strict=strict)


def some(count: int) -> tuple[Example, ...]:
    return tuple(Example((i, i + 1), (IGNORED, i + 1), f"a:{i}") for i in range(count))


def test_each_row_comes_once_an_epoch_whatever_interrupts() -> None:
    draw = random.Random(3)
    for count, micro, accumulation in [(10, 3, 2), (1, 4, 4), (64, 4, 4), (17, 1, 5), (9, 9, 1)]:
        examples = some(count)
        steady = Loader(examples, micro_batch=micro, accumulation=accumulation, seed=5)
        steps = -(-count // (micro * accumulation))
        wanted = [next(steady) for _ in range(3 * steps)]
        loader = Loader(examples, micro_batch=micro, accumulation=accumulation, seed=5)
        got = []
        for _ in range(3 * steps):
            if draw.random() < 0.4:  # interrupted: a new process with the saved state
                state = loader.state_dict()
                loader = Loader(examples, micro_batch=micro, accumulation=accumulation, seed=5)
                loader.load_state_dict(state)
            got.append(next(loader))
        assert got == wanted
        for epoch in range(3):
            mine = got[epoch * steps : (epoch + 1) * steps]
            seen = Counter(e.source for s in mine for one in s.passes for e in one)
            assert seen == Counter(e.source for e in examples)
            assert mine[-1].epoch == epoch + 1
            assert all(len(one) <= micro for s in mine for one in s.passes)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_order(6, 0, 0) == [2, 0, 4, 5, 1, 3]  # on every platform, for ever
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert epoch_order(50, 1, 0) != epoch_order(50, 1, 1)
    assert epoch_order(50, 1, 0) != epoch_order(50, 2, 0)


@pytest.mark.parametrize("state", [(-1, 0), (0, -1), (0, 5), (0, 99)])
def test_a_place_outside_the_data_is_refused(state: tuple[int, int]) -> None:
    loader = Loader(some(5), micro_batch=2, accumulation=1, seed=0)
    with pytest.raises(RunError, match="does not lie in this data"):
        loader.load_state_dict({"epoch": state[0], "position": state[1]})


def test_trained_tokens_are_marked() -> None:
    chat = chat_of()
    (example,) = chat.examples(pair("fox?", "yes", 7))
    plain = show(example, chat.tokenizer, plain=True).plain
    assert plain.endswith("<|im_start|>assistant\n⟦yes<|im_end|>⟧")
    assert plain.startswith(f"a.jsonl:7: {len(example.ids)} tokens, {example.labelled} trained\n")
    coloured = show(example, chat.tokenizer)
    assert [coloured.plain[s.start : s.end] for s in coloured.spans if "green" in str(s.style)] == [
        "yes<|im_end|>"
    ]


@pytest.mark.shared
def test_real_rows_are_all_kept(shared_data: Path) -> None:
    from tsugiki.data.formats import read_rows

    chat = ChatFormat.of(tiny_tokenizer())
    by_columns = {"prompt": "question", "answer": "choice[label]"}
    folder = shared_data / "chat"
    for path, columns, count in [
        (folder / "gsm8k" / "test.jsonl", None, 1319),
        (folder / "jcommonsenseqa" / "valid.jsonl", by_columns, 1119),
        (folder / "wikisql" / "test.jsonl", None, 100),
    ]:
        found = prepare(read_rows(path, columns=columns), chat, max_length=4096)
        assert (found.counts["rows"], found.counts["kept"], found.counts["skipped"]) == (
            count,
            count,
            0,
        )
