"""Which base an adapter belongs to: what its files name, and where that is.

A base that moved is found again by its fingerprint. Loads no torch before one has to be, so that a
wrong name is told at once; knows no A and no B.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsugiki.adapters.record import read_record
from tsugiki.errors import AdapterError, ModelError, TsugikiError
from tsugiki.files import read_json
from tsugiki.models.hub import ResolvedModel, resolve_model

CONFIG = "adapter_config.json"


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's, or a run's that holds one."""
    return any((folder / CONFIG).is_file() for folder in (path, path / "adapter"))


def adapter_folder(named: Path | str) -> Path:
    """The adapter in a folder that a user named: itself, or a run's.

    Raises:
        AdapterError: there is none.
    """
    path = Path(named).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(
        f"there is no adapter in {path}",
        allowed=f"a folder with {CONFIG}, or a run folder that holds one",
        fix=None if path.exists() else "ls -d runs/*/adapter models/*",
    )


def name_of(adapter: Path) -> str:
    """What an adapter is called: its folder, or its run's."""
    folder = adapter.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def beside(folder: Path, what: str) -> Path:
    """Where to put what is made of a folder: RUN/what for a run's adapter, else FOLDER-what."""
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    if folder.name == "adapter":
        return folder.parent / what
    return folder.with_name(f"{folder.name}-{what}")


def find_base(adapter: Path, asked: str | None = None) -> tuple[ResolvedModel, list[str]]:
    """The base that was asked for, else the one that the adapter names, else where it moved.

    Returns:
        the base, and notes on how it was found.

    Raises:
        AdapterError: the adapter names none, or it is nowhere to be found.
        HubError: it has to be downloaded and cannot be.
    """
    if asked is not None:
        return resolve_model(asked), []
    saved, name, commit = recorded_base(adapter)
    if not name:
        raise AdapterError(f"{adapter} does not say which base it belongs to", fix="--model FOLDER")
    try:
        return resolve_model(name, commit), []
    except ModelError as error:
        if saved:
            for folder in _places(adapter, name):
                if _is_this(folder, saved):
                    return ResolvedModel(folder, str(folder), commit), [
                        f"the base moved from {name} to {folder} (found by its fingerprint)"
                    ]
        raise AdapterError(
            f"{adapter} was trained on {name}, which is not there",
            got=error.problem,
            fix="--model with the folder where the base is now",
        ) from None


def recorded_base(adapter: Path) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """What tsugiki recorded of an adapter's base, if it did; the base's name and commit, by that
    record or by PEFT's config.

    Raises:
        AdapterError: a record or a config that cannot be read.
    """
    record = read_record(adapter)
    saved = record.get("base") if record else None
    if isinstance(saved, dict):
        return saved, str(saved["name"]), saved.get("commit")
    raw = read_json(adapter / CONFIG)
    named = raw if isinstance(raw, dict) else {}
    name, commit = named.get("base_model_name_or_path"), named.get("revision")
    return None, str(name) if name else None, commit if isinstance(commit, str) else None


def _places(adapter: Path, name: str) -> Iterator[Path]:
    """Model folders near the adapter, near where the base was, and near where we are."""
    here, was = Path.cwd(), Path(name).expanduser()
    roots = [was.parent, was.parent.parent, *adapter.resolve().parents[:3]]
    seen = set()
    for root in (*roots, here, here / "models"):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if folder.resolve() not in seen and (folder / "config.json").is_file():
                seen.add(folder.resolve())
                yield folder


def _is_this(folder: Path, saved: dict[str, Any]) -> bool:
    from tsugiki.adapters.identity import identify
    from tsugiki.models.shards import open_model

    try:
        return bool(identify(open_model(folder), str(folder)).exact == saved["exact"])
    except (TsugikiError, OSError):
        return False  # another folder's faults are not this command's
