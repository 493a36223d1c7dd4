"""The verbs `tsugiki generate` and `tsugiki chat`: their flags. Knows nothing of the answers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsugiki.engine.settings import Sampling
from tsugiki.errors import UsageError
from tsugiki.flags import Accept, Json
from tsugiki.terminal import Terminal

if TYPE_CHECKING:
    from tsugiki.talk.naming import Named

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="PATH or NAME=PATH, repeatable; default: the newest run's"),
]
Model = Annotated[str | None, typer.Option(help="base; default: the adapter's own, or sprout")]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="no adapter at all")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="allow the model's own code")]
Template = Annotated[str | None, typer.Option(help="chatml, alpaca, instruction-ja or plain")]
System = Annotated[str | None, typer.Option(help="a system turn that always stays")]
MaxTokens = Annotated[int, typer.Option(help="most tokens of an answer")]
Temperature = Annotated[float, typer.Option(help="0 is greedy")]
TopK = Annotated[int | None, typer.Option(help="keep the k likeliest tokens")]
TopP = Annotated[float | None, typer.Option(help="keep the likeliest tokens up to this share")]
MinP = Annotated[float | None, typer.Option(help="keep tokens above this share of the best")]
Penalty = Annotated[float, typer.Option(help="above 1: repeats are less likely")]
Seed = Annotated[int | None, typer.Option(help="seed of the sampling")]
Kept = Annotated[
    str | None, typer.Option("--quantize", help="none, nf4 or int8; default: as it was trained")
]
Compare = Annotated[bool, typer.Option("--compare", help="base and tuned side by side")]


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts; default: stdin")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt by flag, repeatable")] = None,
    adapter: Adapters = None,
    model: Model = None,
    base_only: BaseOnly = False,
    compare: Compare = False,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text, no chat format")] = False,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends an answer")] = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    template: Template = None,
    accept_base: Accept = False,
    quantize: Kept = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with the newest adapter, others, or the base."""
    if raw and system:
        raise UsageError("--system has no meaning with --raw", fix="leave one of them")
    texts = read_prompts([*(prompts or ()), *(prompt or ())])
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    terminal = Terminal(as_json=as_json)
    named = _named(
        terminal, adapter, model=model, base_only=base_only, template=template,
        accept_base=accept_base, quantize=quantize, trust_remote_code=trust_remote_code,
    )  # fmt: skip

    from tsugiki.talk.generate import generate_command

    generate_command(
        terminal,
        named,
        texts,
        sampling=sampling,
        stop=tuple(stop or ()),
        system=system,
        raw=raw,
        compare=compare,
    )


def _named(terminal: Terminal, adapters: list[str] | None, **how: Any) -> Named:
    """Whom the flags name; a wrong name is told before torch is loaded."""
    from tsugiki.talk.naming import Who, find_named

    return find_named(Who(adapters=tuple(adapters or ()), **how), terminal)


def read_prompts(given: list[str]) -> list[str]:
    """The prompts that were given, else the lines of stdin where it is not a terminal.

    Raises:
        UsageError: none.
    """
    if not given and not sys.stdin.isatty():
        given = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not given:
        raise UsageError("no prompt", fix="tsugiki generate 'your question'")
    return given


def chat(
    adapter: Adapters = None,
    model: Model = None,
    base_only: BaseOnly = False,
    compare: Compare = False,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    template: Template = None,
    accept_base: Accept = False,
    quantize: Kept = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk to the newest adapter; /help inside lists what can be typed."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed, max_tokens)
    terminal = Terminal()
    named = _named(
        terminal, adapter, model=model, base_only=base_only, template=template,
        accept_base=accept_base, quantize=quantize, trust_remote_code=trust_remote_code,
    )  # fmt: skip

    from tsugiki.talk.chat import chat_command

    chat_command(
        terminal,
        named,
        sampling=sampling,
        system=system,
        compare=compare,
    )
