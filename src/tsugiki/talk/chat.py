"""`tsugiki chat`: a conversation with an adapter, with the base, or with both side by side.

On a terminal answers stream as they come; without one each line of stdin is a turn. Ctrl-C stops
the answer and not the chat. Knows how turns are shown, not how they are computed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from rich.live import Live
from rich.table import Table
from rich.text import Text

from tsugiki.engine.conversation import Conversation
from tsugiki.engine.engine import Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import UsageError, did_you_mean
from tsugiki.talk.answering import Spoken, harmless, speak
from tsugiki.talk.naming import BASE, Named
from tsugiki.talk.opening import Opened, Voice, open_voices
from tsugiki.terminal import Terminal

COMMANDS = {
    "/adapter": "NAME  go on with another adapter; the conversation stays",
    "/base": "go on with the base alone",
    "/adapters": "list who can answer",
    "/reset": "begin a new conversation",
    "/help": "show these",
    "/quit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}


def chat_command(
    terminal: Terminal,
    named: Named,
    *,
    sampling: Sampling,
    system: str | None = None,
    compare: bool = False,
) -> None:
    """Talk until /quit, Ctrl-D or the end of stdin.

    Args:
        named: base and adapters; the first adapter answers.
        system: a system turn that always stays.
        compare: base and adapter answer side by side, each with its own conversation.

    Raises:
        UsageError: `compare` without an adapter.
        AdapterError, ModelError: see `open_voices`.
    """
    opened = open_voices(named, terminal)
    if compare and opened.default.name == BASE:
        raise UsageError("there is no adapter to compare the base with", fix="--adapter FOLDER")
    Chat(terminal, opened, sampling, system, compare).run()


@dataclass
class Speaker:
    """Who answers now, and what was said to them."""

    voice: Voice
    conversation: Conversation


class Chat:
    """The state of one chat: its speakers (the base first when comparing)."""

    def __init__(
        self,
        terminal: Terminal,
        opened: Opened,
        sampling: Sampling,
        system: str | None,
        compare: bool,
    ) -> None:
        self.terminal = terminal
        self.opened = opened
        self.sampling = sampling
        voices = [opened.voices[BASE], opened.default] if compare else [opened.default]
        context, room = opened.engine.context, sampling.max_tokens
        self.speakers = [Speaker(v, Conversation(context, room, system)) for v in voices]
        self.live = terminal.live and sys.stdin.isatty()

    def run(self) -> None:
        """Read lines until the end."""
        self._say("hint", "a question, or /help")
        interrupted = False
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                self._say("hint", "\nCtrl-C again, Ctrl-D or /quit leaves")
                continue
            interrupted = False
            if line is None or line.strip() == "/quit":
                break
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self.command(line.strip())
                else:
                    self.ask(line)
            except UsageError as error:
                self.terminal.warn(str(error))

    def command(self, line: str) -> None:
        """One line that begins with a slash.

        Raises:
            UsageError: no such command or adapter; the chat goes on.
        """
        word, _, rest = line.partition(" ")
        match word:
            case "/adapter":
                self._switch(rest.strip())
            case "/base":
                self._switch(BASE)
            case "/adapters":
                now = {speaker.voice.name for speaker in self.speakers}
                names = [f"{'*' if name in now else ' '} {name}" for name in self.opened.voices]
                self._say("adapters", "\n".join(names), names=list(self.opened.voices))
            case "/reset":
                for speaker in self.speakers:
                    speaker.conversation.reset()
                self._say("reset", "a new conversation")
            case "/help":
                lines = [f"{name:<10} {text}" for name, text in COMMANDS.items()]
                self._say("help", "\n".join(lines))
            case _:
                near = did_you_mean(word, tuple(COMMANDS))
                raise UsageError(f"there is no {word}", fix=f"{near}?" if near else "/help")

    def ask(self, text: str) -> None:
        """One question to every speaker; the answers are shown and kept.

        Raises:
            UsageError: the question does not fit or the template refuses it; nobody was asked.
        """
        requests: list[Request] = []
        for number, speaker in enumerate(self.speakers):
            try:
                asked = speaker.conversation.ask(text, speaker.voice.chat)
            except UsageError:
                for earlier in self.speakers[:number]:
                    earlier.conversation.take_back()
                raise
            if asked.dropped:
                turns = "turn was" if asked.dropped == 1 else "turns were"
                self.terminal.warn(
                    f"the context of {speaker.conversation.context:,} tokens is full: the oldest "
                    f"{asked.dropped} {turns} dropped",
                    dropped=asked.dropped,
                )
            voice = speaker.voice
            # no answer runs past the room that is left
            room = speaker.conversation.context - len(asked.ids)
            sampling = replace(self.sampling, max_tokens=min(self.sampling.max_tokens, room))
            requests.append(Request(asked.ids, voice.adapter, sampling, voice.stop_ids))
        answers = self._answers(requests)
        for speaker, answer in zip(self.speakers, answers, strict=True):
            if answer.text or answer.finish == "stop":
                speaker.conversation.answer(answer.text)
            else:
                speaker.conversation.take_back()
            self._after(speaker, answer, text)

    def _answers(self, requests: list[Request]) -> list[Spoken]:
        names = [speaker.voice.name for speaker in self.speakers]
        if len(requests) > 1:
            return self._side_by_side(names, requests)
        silent = self.terminal.as_json
        out = self.terminal.console.out
        if not silent:
            self.terminal.console.print(Text(f"{names[0]}: ", style="green"), end="")

        def show(_: int, piece: str) -> None:
            if not silent:
                out(harmless(piece), end="", highlight=False)
                sys.stdout.flush()

        answers = speak(self.opened.engine, requests, show)
        if not silent:
            out("")
        return answers

    def _side_by_side(self, names: list[str], requests: list[Request]) -> list[Spoken]:
        texts = ["" for _ in requests]

        def table() -> Table:
            shown = Table(*names, box=None, padding=(0, 2), expand=True)
            shown.add_row(*(Text(text) for text in texts))
            return shown

        if not self.live:
            answers = speak(self.opened.engine, requests, lambda _index, _piece: None)
            for name, answer in zip(names, answers, strict=True):
                if not self.terminal.as_json:
                    self.terminal.console.print(Text(f"{name}: ", style="green"), end="")
                    self.terminal.console.out(harmless(answer.text), highlight=False)
            return answers
        with Live(table(), console=self.terminal.console, vertical_overflow="visible") as live:

            def show(index: int, piece: str) -> None:
                texts[index] += harmless(piece)
                live.update(table())

            return speak(self.opened.engine, requests, show)

    def _after(self, speaker: Speaker, answer: Spoken, question: str) -> None:
        if self.terminal.as_json:
            self.terminal.say(
                "answer",
                "",
                voice=speaker.voice.name,
                prompt=question,
                text=answer.text,
                finish=answer.finish,
                tokens=answer.tokens,
            )
        elif answer.finish == "cancelled":
            self._say("hint", "(stopped)")
        elif answer.finish == "length":
            self._say("hint", f"(cut after {answer.tokens} tokens)")

    def _switch(self, name: str) -> None:
        voice = self.opened.voices.get(name)
        if voice is None:
            names = tuple(self.opened.voices)
            near = did_you_mean(name, names)
            raise UsageError(
                f"there is no adapter {name!r}" if name else "/adapter needs a name",
                allowed=", ".join(names),
                fix=f"/adapter {near}" if near else None,
            )
        self.speakers[-1].voice = voice
        self._say("speaks", f"{voice.name} answers now", name=voice.name)

    def _read(self) -> str | None:
        """The next line, None at the end of input."""
        if self.live:
            try:
                return input("> ")
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _say(self, kind: str, text: str, **data: object) -> None:
        if not (kind == "hint" and self.terminal.as_json):
            self.terminal.say(kind, Text(text, style="dim"), **data)
