"""`tsugiki generate`: answers to prompts, from one voice as it comes, or from several side by side.

Knows no conversation.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from tsugiki.data.chat import ChatFormat
from tsugiki.data.row import Message, RowProblem
from tsugiki.engine.engine import Request
from tsugiki.engine.sampling import Sampling
from tsugiki.errors import UsageError
from tsugiki.talk.answering import Spoken, harmless, speak
from tsugiki.talk.naming import BASE, Named
from tsugiki.talk.opening import Voice, open_voices
from tsugiki.terminal import Terminal


def generate_command(
    terminal: Terminal,
    named: Named,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    stop: Sequence[str] = (),
    system: str | None = None,
    raw: bool = False,
    compare: bool = False,
) -> None:
    """Answer each prompt.

    Args:
        named: base and adapters; every adapter named answers.
        prompts: one question each.
        stop: strings that end an answer.
        system: a system turn before each prompt.
        raw: go on with the text itself, without chat format.
        compare: the base answers too.

    Raises:
        UsageError: a prompt that does not fit.
        AdapterError, ModelError: see `open_voices`.
    """
    opened = open_voices(named, terminal)
    voices = [v for v in opened.voices.values() if v.name != BASE] or [opened.default]
    if compare and voices[0].name != BASE:
        voices.insert(0, opened.voices[BASE])
    asked = [(prompt, voice) for prompt in prompts for voice in voices]
    requests = [
        _request(prompt, voice, sampling, tuple(stop), system, raw) for prompt, voice in asked
    ]
    alone = len(asked) == 1 and not terminal.as_json

    def show(_: int, piece: str) -> None:
        if alone:
            terminal.console.out(harmless(piece), end="", highlight=False)

    answers = speak(opened.engine, requests, show)
    if alone:
        terminal.console.out("")
        _note(answers[0], sampling, terminal)
        return
    for (prompt, voice), request, answer in zip(asked, requests, answers, strict=True):
        _tell(prompt, voice, request, answer, terminal)


def _request(
    prompt: str,
    voice: Voice,
    sampling: Sampling,
    stop: tuple[str, ...],
    system: str | None,
    raw: bool,
) -> Request:
    if raw:
        ids = raw_ids(prompt, voice.chat)
    else:
        messages = [Message("system", system)] if system else []
        try:
            ids = voice.chat.prompt_ids([*messages, Message("user", prompt)])
        except RowProblem as problem:
            raise UsageError(f"the prompt cannot be put into the template: {problem}") from None
    return Request(
        tuple(ids),
        adapter=voice.adapter,
        sampling=sampling,
        stop_ids=voice.stop_ids,
        stop=stop,
        raw=raw,
    )


def raw_ids(text: str, chat: ChatFormat) -> list[int]:
    """The text's own tokens, with the BOS that the tokenizer puts before any text."""
    ids = chat.encode(text)
    return [chat.bos, *ids] if chat.starts_with_bos and ids[:1] != [chat.bos] else ids


def _tell(prompt: str, voice: Voice, request: Request, answer: Spoken, terminal: Terminal) -> None:
    shown = Text(f"{voice.name}: ", style="dim")
    shown.append(harmless(prompt), style="italic")
    shown.append(" → ", style="dim")
    shown.append(harmless(answer.text))
    terminal.say(
        "answer",
        shown,
        voice=voice.name,
        prompt=prompt,
        text=answer.text,
        finish=answer.finish,
        prompt_tokens=len(request.ids),
        tokens=answer.tokens,
    )


def _note(answer: Spoken, sampling: Sampling, terminal: Terminal) -> None:
    if answer.finish == "length":
        terminal.warn(f"cut after {answer.tokens} tokens (--max-tokens {sampling.max_tokens})")
    elif answer.finish == "cancelled":
        terminal.warn("stopped")
