"""A Modelfile for Ollama: the chat format as a Go template, and the tokens that end an answer.

Jinja is not translated. The format is asked how it renders a few conversations of marks, the texts
between the marks become the Go template, and fifty other conversations must then render alike;
where they do not, no template is written and the reason is told. Ollama hands the template .System
(all system turns), .Messages (with .Role and .Content) and puts BOS before the text by itself where
the file says so. Knows no tensors.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message, RowProblem

MARKS = tuple(f"\ue000{name}\ue001" for name in "suvwab")  # private use: no template says them
COUNT = 50
CONTENTS = (
    "Hello",
    "日本の首都はどこですか？",
    "def f(x):\n    return x + 1",
    "a  b\n\nc",
    "🙂 {{ x }} {% y %}",
    "What is 2+2?",
    "「それは、何ですか」と聞いた。",
    "<b>x</b> & \"quotes\" 'single'",
    "1\n2\n3",
    "`code` \\n",
)
SYSTEMS = ("You are terse.", "あなたは猫です。\n短く答えて。")


@dataclass(frozen=True)
class Wording:
    """What stands between the contents of a conversation.

    system: before and after a system turn. plain: before the first question without one.
    answer: between a question and its answer. again: between an answer and the next question.
    end: after the last question, where the model answers.
    """

    system: tuple[str, str] | None
    plain: str
    answer: str
    again: str
    end: str

    def render(self, messages: Sequence[Message]) -> str | None:
        """A conversation as the Go template renders it; None for a system turn it has no words for.

        It alternates, and ends with a question.
        """
        text, system = "", [m.content for m in messages if m.role == "system"]
        if system and self.system is None:
            return None
        if system and self.system is not None:
            text += self.system[0] + "\n\n".join(system) + self.system[1]
        else:
            text += self.plain
        first = True
        for message in messages:
            if message.role == "user":
                text += ("" if first else self.again) + message.content
                first = False
            elif message.role == "assistant":
                text += self.answer + message.content
        return text + self.end

    def template(self) -> str:
        """The same in Go's text/template."""
        head = _quoted(self.plain)
        if self.system is not None:
            before, after = (_quoted(part) for part in self.system)
            told = before + "{{ .System }}" + after
            head = "{{ if .System }}" + told + "{{ else }}" + head + "{{ end }}"
        again, answer = _quoted(self.again), _quoted(self.answer)
        return (
            "{{ $again := false }}" + head + "{{ range .Messages }}"
            '{{ if eq .Role "user" }}{{ if $again }}' + again + "{{ end }}{{ .Content }}"
            '{{ $again = true }}{{ else if eq .Role "assistant" }}' + answer + "{{ .Content }}"
            "{{ end }}{{ end }}" + _quoted(self.end)
        )


def read_wording(chat: ChatFormat) -> tuple[Wording | None, str]:
    """How a chat format puts conversations, and what is to be known of it.

    Returns:
        None and the reason where no such template renders what the format does.
    """
    bos = _bos_text(chat)
    try:
        wording = _ask(chat, bos)
    except RowProblem as problem:
        return None, f"the chat template cannot be asked: {problem}"
    if wording is None:
        return None, "the chat template words a turn by more than its role and place"
    for talk in conversations():
        ours = _render(chat, talk, bos)
        if ours is not None and wording.render(talk) != ours:
            return None, f"the chat template renders {talk[-1].content[:20]!r} otherwise"
    edges = (Message("user", "  x \n"),)
    trims = _render(chat, edges, bos) != wording.render(edges)
    return wording, "blanks around a question are kept; in training they were cut" if trims else ""


def conversations() -> list[tuple[Message, ...]]:
    """Fifty, with and without a system turn, of one to four questions."""
    chooser = random.Random(0)
    found = []
    for turns, system in itertools.islice(
        itertools.cycle(itertools.product((1, 2, 3, 4), (None, *SYSTEMS))), COUNT
    ):
        talk = [] if system is None else [Message("system", system)]
        for turn in range(turns):
            talk += [Message("assistant", chooser.choice(CONTENTS))] if turn else []
            talk.append(Message("user", chooser.choice(CONTENTS)))
        found.append(tuple(talk))
    return found


def modelfile(gguf: str, wording: Wording | None, stops: Sequence[str]) -> str:
    """The file's text.

    Args:
        gguf: the model's file, as Ollama will find it.
        stops: texts of the tokens that end an answer.
    """
    lines = [f"FROM {gguf}"]
    if wording is not None:
        lines.append(f'TEMPLATE """{wording.template()}"""')
    lines += [f"PARAMETER stop {_parameter(text)}" for text in stops]
    return "\n".join(lines) + "\n"


def stop_texts(chat: ChatFormat) -> list[str]:
    """The tokens that end an answer, as text."""
    texts = [str(chat.tokenizer.convert_ids_to_tokens(i)) for i in chat.stop_ids]
    return [text for text in dict.fromkeys(texts) if text and '"' not in text]


def _ask(chat: ChatFormat, bos: str) -> Wording | None:
    s, u, v, w, a, b = MARKS
    one = _parts(chat, [("user", u)], bos)
    three = _parts(
        chat, [("user", u), ("assistant", a), ("user", v), ("assistant", b), ("user", w)], bos
    )
    if one is None or three is None:
        return None
    plain, answer, again, answer2, again2, end = three
    if [plain, end] != one or answer != answer2 or again != again2:
        return None
    try:
        told = _parts(chat, [("system", s), ("user", u)], bos)
    except RowProblem:
        return Wording(None, plain, answer, again, end)
    if told is None or told[2] != end:
        return None
    return Wording((told[0], told[1]), plain, answer, again, end)


def _parts(chat: ChatFormat, turns: Sequence[tuple[str, str]], bos: str) -> list[str] | None:
    """The texts around the contents; None where a content is changed, moved or said twice."""
    text = _render(chat, [Message(role, mark) for role, mark in turns], bos, strict=True)
    assert text is not None
    found = []
    for _, mark in turns:
        before, seen, text = text.partition(mark)
        if not seen or mark in text:
            return None
        found.append(before)
    return [*found, text]


def _render(
    chat: ChatFormat, messages: Sequence[Message], bos: str, strict: bool = False
) -> str | None:
    """Rendered for an answer, without the BOS that Ollama adds; None where it is refused."""
    try:
        repaired, _ = chat.repair(messages)
        return chat.render(repaired, answer_next=True).removeprefix(bos)
    except RowProblem:
        if strict:
            raise
        return None


def _bos_text(chat: ChatFormat) -> str:
    """What the tokenizer puts before a text by itself."""
    return str(chat.tokenizer.bos_token) if chat.starts_with_bos else ""


def _quoted(text: str) -> str:
    """Plain text of a Go template inside a Modelfile's three quotes."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def _parameter(text: str) -> str:
    return f'"{text}"'
