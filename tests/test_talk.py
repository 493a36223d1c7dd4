"""generate and chat on a tiny model from disk with two adapters."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tiny import byte_tokenizer, tiny_model

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.adapters.origin import belongs
from tsugiki.adapters.storage import BaseIdentity, save_adapter
from tsugiki.config import LoraConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import AdapterError, ModelError, UsageError
from tsugiki.models.load import ResolvedModel, load_base
from tsugiki.quantizing import quantize_base
from tsugiki.talk.answering import harmless
from tsugiki.talk.chat import chat_command
from tsugiki.talk.generate import generate_command
from tsugiki.talk.naming import Who, find_named, newest_adapter
from tsugiki.talk.opening import open_voices
from tsugiki.talk_verbs import read_prompts
from tsugiki.terminal import Terminal

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role[0] + ']' + m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
SHORT = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, runs/first/adapter, runs/second/adapter; the second is the newer one.

    Special tokens have logits of 0, below the best of 256 others: greedy answers never stop.
    """
    root = tmp_path_factory.mktemp("home")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # type: ignore[union-attr,operator,index]
    model.save_pretrained(root / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(root / "model")
    base = load_base(ResolvedModel(root / "model", str(root / "model")))
    prints = base.fingerprint()
    identity = BaseIdentity(base.name, prints.exact, prints.rounded)
    chat = ChatFormat.of(base.tokenizer)
    for seed, name in enumerate(("first", "second")):
        generator = torch.Generator().manual_seed(seed)
        attach(base.model, LoraConfig(r=2, alpha=4), generator=generator)
        with torch.no_grad():
            for _, module in lora_modules(base.model):
                module.lora_B.normal_(0, 0.5, generator=generator)
        folder = root / "runs" / name / "adapter"
        folder.parent.mkdir(parents=True)
        save_adapter(base.model, folder, base=identity, tokenizer=base.tokenizer, chat=chat.state())
        detach(base.model)
        os.utime(folder / "adapter_config.json", (1000 + seed, 1000 + seed))
    return root


def heard(capsys: pytest.CaptureFixture[str], kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line["kind"] == kind]


def ask(home: Path, who: Who, prompts: list[str], *, terminal: Terminal, **options: Any) -> None:
    generate_command(terminal, find_named(who, terminal, home), prompts, **options)


def chat_with(home: Path, monkeypatch: pytest.MonkeyPatch, lines: str, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    who = options.pop("who", Who())
    options.setdefault("sampling", SHORT)
    terminal = Terminal(as_json=True)
    chat_command(terminal, find_named(who, terminal, home), **options)


def test_the_newest_adapter_answers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_adapter(home) == home / "runs" / "second" / "adapter"
    assert newest_adapter(home / "model") is None
    ask(home, Who(), ["hello"], sampling=SHORT, terminal=Terminal(as_json=True))
    (answer,) = heard(capsys, "answer")
    assert answer["voice"] == "second"
    assert answer["tokens"] <= 8


def test_the_newest_adapter_may_lie_right_here(tmp_path: Path) -> None:
    """As `train --output r1` leaves it; what is being written is passed over."""
    assert newest_adapter(tmp_path) is None
    for age, folder in enumerate(("runs/a/adapter", "r1/adapter", "mine", ".r2.x.tmp/adapter")):
        (tmp_path / folder).mkdir(parents=True)
        config = tmp_path / folder / "adapter_config.json"
        config.touch()
        os.utime(config, (1000 + age, 1000 + age))
        expected = "mine" if folder.startswith(".") else folder
        assert newest_adapter(tmp_path) == tmp_path / expected


def test_adapters_by_name_and_the_base(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = home / "runs"
    who = Who(adapters=(f"one={runs / 'first' / 'adapter'}", str(runs / "second")))
    terminal = Terminal(as_json=True)
    ask(home, who, ["hello", "ab"], sampling=SHORT, compare=True, terminal=terminal)
    together = {(a["voice"], a["prompt"]): a["text"] for a in heard(capsys, "answer")}
    assert {voice for voice, _ in together} == {"base", "one", "second"}
    assert len(set(together.values())) == 6, "voices that do not differ prove nothing"
    for adapters, base_only, voice in (
        ((str(runs / "first"),), False, "one"),
        ((str(runs / "second"),), False, "second"),
        ((), True, "base"),
    ):
        alone = Who(str(home / "model"), adapters=adapters, base_only=base_only)
        ask(home, alone, ["hello"], sampling=SHORT, terminal=terminal)
        (answer,) = heard(capsys, "answer")
        assert answer["text"] == together[voice, "hello"]


def test_the_prompt_is_what_training_saw(home: Path) -> None:
    opened = open_voices(find_named(Who(), Terminal(as_json=True), home), Terminal(as_json=True))
    chat = ChatFormat.of(opened.base.tokenizer)
    messages = [Message("user", "hello")]
    assert opened.default.chat.prompt_ids(messages) == chat.prompt_ids(messages)
    assert opened.default.chat.stop_id == opened.base.tokenizer.convert_tokens_to_ids("<end>")


def test_raw_text_goes_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = Who(str(home / "model"), base_only=True)
    ask(home, who, ["hello"], sampling=SHORT, raw=True, terminal=Terminal())
    engine = Engine(load_base(ResolvedModel(home / "model", "model")))
    ids = engine.base.tokenizer("hello", add_special_tokens=False)["input_ids"]
    (answer,) = engine.complete([Request(tuple(ids), sampling=SHORT, raw=True)])
    assert capsys.readouterr().out == harmless(answer.text) + "\n", "a pipe gets the answer alone"


def test_a_base_that_moved_is_found(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    shutil.copytree(home / "model", tmp_path / "moved")
    record = tmp_path / "runs" / "second" / "adapter" / "tsugiki.json"
    record.write_text(record.read_text().replace(str(home / "model"), str(tmp_path / "gone")))
    named = find_named(Who(), Terminal(), tmp_path)
    assert named.resolved.folder == tmp_path / "moved"
    assert f"the base moved from {tmp_path / 'gone'} to" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(AdapterError, match="which is not there"):
        find_named(Who(), Terminal(), tmp_path)


def test_a_project_that_moved_and_what_lies_beside_its_base(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bases lie in folders of folders; a copy in few bits and a model of another shape do too."""
    models = tmp_path / "models" / "org"
    shutil.copytree(home / "runs", tmp_path / "runs")
    shutil.copytree(home / "model", models / "base")
    quantize_base(str(models / "base"), tmp_path / "a-nf4", "nf4", "float32")
    tiny_model("gpt2").save_pretrained(tmp_path / "b-other")  # type: ignore[operator]
    adapter = tmp_path / "runs" / "second" / "adapter"
    record = adapter / "tsugiki.json"
    text = record.read_text()
    for was in ("/gone/models/org/base", "models/org/base", str(tmp_path / "nowhere")):
        record.write_text(text.replace(str(home / "model"), was))
        if "org" not in was:
            (models / "base").rename(tmp_path / "c-base")
        capsys.readouterr()
        named = find_named(Who(), Terminal(), tmp_path)
        assert named.resolved.folder == tmp_path / ("models/org/base" if "org" in was else "c-base")
    few = ResolvedModel(tmp_path / "a-nf4", "few")
    assert belongs(adapter, few), "an adapter of the base may be laid over it in few bits"
    assert not belongs(adapter, ResolvedModel(tmp_path / "b-other", "other"))
    record.write_text("{")
    named = find_named(Who(str(tmp_path / "c-base")), Terminal(), tmp_path)
    assert named.folders == {}
    assert "cannot be read" in capsys.readouterr().err


def test_prompts_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert read_prompts(["here"]) == ["here"]
    assert read_prompts([]) == ["one", "two"]
    with pytest.raises(UsageError, match="no prompt"):
        read_prompts([])


def test_commands_of_the_chat(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = home / "runs"
    who = Who(adapters=(str(runs / "first"), str(runs / "second")))
    script = [
        "hello", "/adapter second", "hello", "/base", "hello", "/adapters", "/adapter secnd",
        "/rest", "/reset", "/adapter first", "hello", "/quit", "never asked",
    ]  # fmt: skip
    chat_with(home, monkeypatch, "\n".join(script), who=who)
    out = capsys.readouterr()
    lines = [json.loads(line) for line in out.out.splitlines()]
    answers = [line for line in lines if line["kind"] == "answer"]
    assert [a["voice"] for a in answers] == ["first", "second", "base", "first"]
    assert answers[0]["text"] == answers[3]["text"], "/reset forgets what was said"
    warnings = [line["text"] for line in lines if line["kind"] == "warning"]
    assert any("/adapter second" in text for text in warnings)
    assert any("/reset?" in text for text in warnings)


def test_compare_answers_twice(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_with(home, monkeypatch, "hello\nagain\n", compare=True)
    assert [a["voice"] for a in heard(capsys, "answer")] == ["base", "second"] * 2
    with pytest.raises(UsageError, match="no adapter to compare"):
        chat_with(home, monkeypatch, "", who=Who(str(home / "model"), base_only=True), compare=True)


def test_a_full_context_drops_the_oldest_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_with(home, monkeypatch, ("x" * 150 + "\n") * 5 + "y" * 600 + "\nz\n")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(line.get("dropped", 0) for line in lines if line["kind"] == "warning") >= 2
    assert any("alone takes" in line.get("text", "") for line in lines)
    assert sum(line["kind"] == "answer" for line in lines) == 6


def test_refusals(home: Path, tmp_path: Path) -> None:
    terminal = Terminal(as_json=True)
    with pytest.raises(AdapterError, match="no adapter in"):
        find_named(Who(adapters=(str(tmp_path),)), terminal, home)
    first = str(home / "runs" / "first")
    with pytest.raises(UsageError, match="two voices"):
        find_named(Who(adapters=(first, first)), terminal, home)
    with pytest.raises(UsageError, match="base's name"):
        find_named(Who(adapters=(f"base={first}",)), terminal, home)
    with pytest.raises(UsageError, match="--base"):
        find_named(Who(adapters=(first,), base_only=True), terminal, home)


def test_what_the_bases_own_files_end_an_answer_by_ends_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "model", folder)
    who = Who(model=str(folder), base_only=True)
    ask(tmp_path, who, ["hello"], sampling=SHORT, terminal=Terminal(as_json=True))
    (whole,) = heard(capsys, "answer")
    every = {"eos_token_id": [*range(256)]}
    (folder / "generation_config.json").write_text(json.dumps(every))
    ask(tmp_path, who, ["hello"], sampling=SHORT, terminal=Terminal(as_json=True))
    (answer,) = heard(capsys, "answer")
    assert (whole["finish"], answer["finish"]) == ("length", "stop")
    assert (bool(whole["text"]), answer["text"]) == (True, "")


def test_a_token_that_the_base_has_no_numbers_for(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "model", folder)
    tokenizer = load_base(ResolvedModel(folder, "")).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    who = Who(model=str(folder), base_only=True)
    with pytest.raises(ModelError, match="'<new>' has no row in this model's embedding"):
        ask(tmp_path, who, ["<new>"], sampling=SHORT, terminal=Terminal(as_json=True))


def test_no_control_characters_reach_the_terminal() -> None:
    assert harmless("a\x1b[2Jb\x07\r\x9b1mc\n\tあ") == "a[2Jb1mc\n\tあ"


TALKER = """
import sys
from pathlib import Path
from tsugiki.engine.sampling import Sampling
from tsugiki.talk.chat import chat_command
from tsugiki.talk.naming import Who, find_named
from tsugiki.terminal import Terminal
endless = Sampling(max_tokens=10**6)
chat_command(Terminal(), find_named(Who(sys.argv[1], base_only=True), Terminal()), sampling=endless)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to a child is POSIX")
def test_ctrl_c_stops_the_answer_and_not_the_chat(home: Path, tmp_path: Path) -> None:
    """The context is 100,000 tokens long, so the answer does not end by itself in time."""
    shutil.copytree(home / "model", tmp_path / "long")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    config["max_position_embeddings"] = 100_000
    (tmp_path / "long" / "config.json").write_text(json.dumps(config))
    child = subprocess.Popen(
        [sys.executable, "-c", TALKER, str(tmp_path / "long")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    guard = threading.Timer(60, child.kill)  # a failure ends, it does not hang
    guard.start()

    def read_until(mark: bytes, more: int = 0) -> None:
        seen = b""
        while mark not in seen or len(seen.partition(mark)[2]) < more:
            piece = os.read(child.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
            assert piece, f"the chat ended before {mark!r}"
            seen += piece

    try:
        read_until(b"/help")
        for _ in range(2):
            child.stdin.write(b"hello\n")
            child.stdin.flush()
            read_until(b"base: ", more=20)
            child.send_signal(signal.SIGINT)
            read_until(b"(stopped)")
        child.stdin.write(b"/quit\n")
        child.stdin.flush()
        assert child.wait(timeout=60) == 0
    finally:
        guard.cancel()
        child.kill()
        child.communicate()
