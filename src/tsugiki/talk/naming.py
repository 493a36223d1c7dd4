"""From what the user named (or did not name) to the folders of a base and of adapters.

The newest adapter speaks by default; its record says which base it belongs to. Loads no torch, so
that a wrong name is told at once. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsugiki.adapters.origin import CONFIG, adapter_folder, find_base, name_of, recorded_base
from tsugiki.adapters.record import recorded_quantization
from tsugiki.errors import TsugikiError, UsageError
from tsugiki.files import read_json
from tsugiki.models.hub import QUANTIZED_RECORD as RECORD
from tsugiki.models.hub import ResolvedModel, resolve_model
from tsugiki.terminal import Terminal

BASE = "base"


@dataclass(frozen=True)
class Who:
    """Whom to talk to, as the user named it.

    Args:
        model: base; the adapter's own when None.
        adapters: PATH or NAME=PATH, an adapter folder or a run folder; the first one speaks.
            None given: the newest one under runs/ and models/.
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
    """The adapter folder under runs/ or models/ that was written last, or None."""
    patterns = (f"runs/*/adapter/{CONFIG}", f"models/*/adapter/{CONFIG}", f"models/*/{CONFIG}")
    found = [file for pattern in patterns for file in root.glob(pattern) if file.is_file()]
    if not found:
        return None
    return max(found, key=lambda file: (file.stat().st_mtime_ns, str(file))).parent


def find_named(who: Who, terminal: Terminal, root: Path = Path(".")) -> Named:
    """The folders that were meant; a base of the Hub is downloaded.

    Raises:
        UsageError: names given twice, an adapter together with `base_only`.
        AdapterError, ModelError, HubError: no such adapter or base.
    """
    folders = _folders(who, terminal, root)
    kept = _recorded_quantization(folders)
    return Named(who, folders, _resolve(who, folders, kept, terminal), kept[0])


def _folders(who: Who, terminal: Terminal, root: Path) -> dict[str, Path]:
    """Name → folder of each adapter."""
    if who.base_only:
        if who.adapters:
            raise UsageError("an adapter was named together with --base", fix="leave one of them")
        return {}
    if not who.adapters:
        newest = newest_adapter(root)
        if newest is None:
            terminal.warn("no adapter under runs/ or models/: the base answers alone")
            return {}
        recorded = recorded_base(newest)[1]
        if who.model is not None and recorded not in (None, who.model):
            terminal.warn(
                f"the newest adapter, {newest}, was trained on {recorded}: the base answers alone"
            )
            return {}
        return {name_of(newest): newest}
    folders: dict[str, Path] = {}
    for given in who.adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        folder = adapter_folder(path)
        name = name or name_of(folder)
        if name in folders or name == BASE:
            raise UsageError(
                f"two voices named {name!r}" if name in folders else f"{BASE!r} is the base's name",
                fix=f"name them: --adapter one={folder}",
            )
        folders[name] = folder
    return folders


def _recorded_quantization(folders: dict[str, Path]) -> tuple[str, Path | None]:
    """How the first adapter's base was kept in training, and where that is stored."""
    try:
        return recorded_quantization(read_json(next(iter(folders.values())) / "tsugiki.json"))
    except (StopIteration, TsugikiError, ValueError, OSError):
        return "none", None  # reading the adapter itself will say what is wrong with it


def _resolve(
    who: Who, folders: dict[str, Path], kept: tuple[str, Path | None], terminal: Terminal
) -> ResolvedModel:
    if who.model is not None or not folders:
        return resolve_model(who.model)
    method, quantized = kept
    if quantized is not None and who.quantize in (None, method) and (quantized / RECORD).is_file():
        return resolve_model(str(quantized))
    found, notes = find_base(next(iter(folders.values())))
    for note in notes:
        terminal.warn(note)
    return found
