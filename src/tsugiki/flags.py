"""Turns config sections into typer options, so that a setting is written once; and the options
that several verbs share.

Knows the shape of `config.py` and typer, nothing of what a setting does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tsugiki.config import SECTIONS, RunConfig, flag_fields
from tsugiki.spellings import plain_type

Json = Annotated[bool, typer.Option("--json", help="one JSON object a line, for machines")]
Model = Annotated[str | None, typer.Option(help="base; default: the adapter's own")]
Accept = Annotated[bool, typer.Option("--accept-base", help="take another base of these shapes")]
EvalData = Annotated[Path | None, typer.Option(help="rows that choose the base of a QLoRA adapter")]
Untie = Annotated[bool, typer.Option("--untie", help="write a tied head apart")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="leave the proof out")]

PANELS = {"model": "Base model", "data": "Data", "lora": "Adapter", "train": "Training"}


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
