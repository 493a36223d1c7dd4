"""From what the user named (or did not name) to the folders of a base and of adapters.

The newest adapter speaks by default; its record says which base it belongs to. Loads no torch, so
that a wrong name is told at once. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tsugiki.adapters.origin import adapter_folder, belongs, find_base, name_of, recorded_base
from tsugiki.adapters.peft_config import CONFIG, read_raw
from tsugiki.adapters.record import read_record, recorded_quantization
from tsugiki.config import Quantize
from tsugiki.data.templates import FALLBACKS
from tsugiki.errors import AdapterError, UsageError
from tsugiki.models.hub import QUANTIZED_RECORD as RECORD
from tsugiki.models.hub import (
    ResolvedModel,
    refuse_no_config,
    refuse_no_tokenizer,
    resolve_model,
)
from tsugiki.terminal import Terminal

BASE = "base"


@dataclass(frozen=True)
class Who:
    """Whom to talk to, as the user named it.

    Args:
        model: base; the adapter's own when None.
        adapters: PATH or NAME=PATH, an adapter folder or a run folder; the first one speaks.
            None given: the newest one under runs/, models/ and right here.
        base_only: no adapter at all.
        template: a named fallback instead of the recorded chat format.
        accept_base: take an adapter of another base of the same shapes, loudly.
        quantize: none, nf4 or int8; as the first adapter was trained when None.
    """

    model: str | None = None
    adapters: tuple[str, ...] = ()
    base_only: bool = False
    template: str | None = None
    accept_base: bool = False
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None


@dataclass(frozen=True)
class Named:
    """Folders by voice, the base's folder, and how the first adapter's base was kept."""

    who: Who
    folders: dict[str, Path]
    resolved: ResolvedModel
    quantize: str


def newest_adapter(root: Path) -> Path | None:
    """The adapter folder under runs/, models/ or right here that was written last, or None."""
    folders = ("runs/*/adapter", "models/*/adapter", "models/*", "*/adapter", "*")
    found = [
        file
        for folder in folders
        for file in root.glob(f"{folder}/{CONFIG}")
        # what is still being written has a name with a dot
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)
    ]
    if not found:
        return None
    return max(found, key=lambda file: (file.stat().st_mtime_ns, str(file))).parent


def find_named(who: Who, terminal: Terminal, root: Path = Path(".")) -> Named:
    """The folders that were meant; a base of the Hub is downloaded.

    Raises:
        UsageError: names given twice, an adapter together with `base_only`, a word that is none of
            those allowed.
        AdapterError, ModelError, HubError: no such adapter or base.
    """
    for flag, given, allowed in (
        ("--quantize", who.quantize, get_args(Quantize)),
        ("--template", who.template, tuple(FALLBACKS)),
    ):
        if given not in (None, *allowed):
            raise UsageError(f"no such {flag}", got=given, allowed=", ".join(allowed))
    folders = _folders(who)
    asked = None if who.model is None else resolve_model(who.model)
    if not folders and not who.base_only:
        folders = _newest(who, asked, terminal, root)
    first = next(iter(folders.values()), None)
    method, kept = ("none", None) if first is None else recorded_quantization(read_record(first))
    notes: list[str] = []
    if asked is not None or first is None:
        resolved = asked or resolve_model(None)
    elif kept is not None and who.quantize in (None, method) and (kept / RECORD).is_file():
        resolved = resolve_model(str(kept))
    else:
        resolved, notes = find_base(first)
    for note in notes:
        terminal.warn(note)
    refuse_no_config(resolved.folder)
    refuse_no_tokenizer(resolved.folder)
    return Named(who, folders, resolved, method)


def _newest(
    who: Who, base: ResolvedModel | None, terminal: Terminal, root: Path
) -> dict[str, Path]:
    """The newest adapter, if it is one of the base that was asked for."""
    newest = newest_adapter(root)
    if newest is None:
        terminal.warn("no adapter here, under runs/ or under models/: the base answers alone")
        return {}
    if base is not None and not who.accept_base:
        try:
            belonging = belongs(newest, base)
            said = f"was trained on {recorded_base(newest)[1]}"
        except AdapterError as error:
            belonging, said = False, f"cannot be read ({error.problem})"
        if not belonging:
            terminal.warn(f"the newest adapter, {newest}, {said}: the base answers alone")
            return {}
    return {name_of(newest): newest}


def _folders(who: Who) -> dict[str, Path]:
    """Name → folder of each adapter that was named."""
    if who.base_only and who.adapters:
        fix = "leave one of them"
        raise UsageError("an adapter was named together with --base-only", fix=fix)
    folders: dict[str, Path] = {}
    for given in who.adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        if not path:
            raise UsageError(f"--adapter {given!r} names no folder", fix="ls -d runs/*/adapter")
        folder = adapter_folder(path)
        read_raw(folder)
        name = name or name_of(folder)
        if name in folders or name == BASE:
            raise UsageError(
                f"two voices named {name!r}" if name in folders else f"{BASE!r} is the base's name",
                fix=f"name them: --adapter one={folder}",
            )
        folders[name] = folder
    return folders
