"""Turns config sections into typer options, so that a setting is written once; and the options
that several verbs share; what is said of one that there is not.

Knows the shape of `config.py` and typer, nothing of what a setting does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from tsugiki.config import SECTIONS, RunConfig, flag_fields
from tsugiki.errors import UsageError
from tsugiki.mistakes import nearest, plain
from tsugiki.spellings import FLAG_NAMES, USUAL_NAMES, plain_type

Json = Annotated[bool, typer.Option("--json", help="one JSON object a line, for machines")]
Model = Annotated[str | None, typer.Option(help="base; default: the adapter's own")]
Accept = Annotated[bool, typer.Option("--accept-base", help="take another base of these shapes")]
EvalData = Annotated[Path | None, typer.Option(help="rows that choose the base of a QLoRA adapter")]
Untie = Annotated[bool, typer.Option("--untie", help="write a tied head apart")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="leave the proof out")]

PANELS = {"model": "Base model", "data": "Data", "lora": "Adapter", "train": "Training"}


class Verbs(TyperGroup):
    """The verbs; of a flag that one does not have, the flag that was meant is told."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb.

        Raises:
            UsageError: it has no such flag.
        """
        try:
            return super().invoke(ctx)
        except Exception as error:
            # typer brings its own click along, or takes an installed one: known by its name.
            if type(error).__name__ != "NoSuchOption":
                raise
            raise _no_such_flag(error) from None


def _no_such_flag(error: Any) -> UsageError:
    verb = error.ctx.command_path
    has = {plain(flag): flag for option in error.ctx.command.params for flag in option.opts
           if flag.startswith("--")}  # fmt: skip
    meant = meant_flag(error.option_name, has)
    said = f"{verb} has no flag {error.option_name}"
    if meant is None:
        return UsageError(said, fix=f"{verb} --help lists them")
    return UsageError(f"{said}; did you mean {meant}?", fix=meant)


def meant_flag(flag: str, has: Mapping[str, str]) -> str | None:
    """The flag of a verb that was meant: another spelling, another toolkit's name, or one near.

    Args:
        has: its flags, by their plain names.
    """
    word = plain(flag)
    settings = flag_fields()
    flags = {".".join(place): own for own, place in settings.items()}
    usual = {name: flags[place] for name, place in USUAL_NAMES.items()}
    usual |= {place[-1]: own for own, place in settings.items()}  # as YAML says it: alpha, r
    for own in (has.get(word), FLAG_NAMES.get(word), usual.get(word)):
        if own in has.values():
            return own
    names = {name: own for name, own in (usual | FLAG_NAMES).items() if own in has.values()}
    names |= has
    near = nearest(word, names)
    return names[near] if near else None


def with_config_flags(
    command: Callable[..., None], sections: tuple[str, ...] | None = None
) -> Callable[..., None]:
    """Give `command(..., settings)` one option for each config field.

    `settings` arrives as nested dicts holding only what the user typed. With `sections`, only
    their fields become options, and `--data` is left to the command's own argument.
    """
    parameters = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "settings"
    ]
    places: dict[str, tuple[str, ...]] = {}
    for flag, place in flag_fields().items():
        if sections is not None and (place[0] not in sections or flag == "--data"):
            continue
        name = "__".join(place)
        places[name] = place
        field = (SECTIONS[place[0]] if len(place) > 1 else RunConfig).model_fields[place[-1]]
        kind, repeats = plain_type(field.annotation)
        text = field.description or ""
        if field.default not in (None, (), {}, False):
            text += f" (default {field.default})"
        option = typer.Option(
            flag,
            help=escape(text),
            rich_help_panel=PANELS.get(place[0], "Run"),
            is_flag=True if kind is bool else None,
            show_default=False,
        )
        annotation = Annotated[(list[kind] if repeats else kind) | None, option]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )

    def run(**arguments: Any) -> None:
        settings: dict[str, Any] = {}
        for name, place in places.items():
            value = arguments.pop(name)
            if value is None or value == []:
                continue
            if len(place) == 1:
                settings[place[0]] = value
            else:
                settings.setdefault(place[0], {})[place[1]] = value
        command(**arguments, settings=settings)

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    by_kind = sorted(parameters, key=lambda p: p.kind)
    run.__signature__ = inspect.Signature(by_kind)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in by_kind}
    return run
