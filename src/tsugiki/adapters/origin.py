"""Which base an adapter belongs to: what its files name, and where that is.

A base that moved is found again by its fingerprint. Loads no torch before one has to be, so that a
wrong name is told at once; knows no A and no B.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsugiki.adapters.peft_config import CONFIG, read_raw
from tsugiki.adapters.record import read_record
from tsugiki.errors import AdapterError, ModelError, TsugikiError
from tsugiki.models.hub import ResolvedModel, has_tokenizer, resolve_model


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
    near = _near(adapter, name)
    if near is not None:
        return ResolvedModel(near, str(near)), [f"the base {name} was found at {near}"]
    try:
        if saved and commit is None and not _is_there(name):  # a folder then: no Hub is asked
            raise ModelError(f"there is no model folder {name}")
        return resolve_model(name, commit), []
    except ModelError as error:
        moved = [folder for folder in _places(adapter, name) if _is_this(folder, saved)]
        if moved:
            folder = next((folder for folder in moved if has_tokenizer(folder)), moved[0])
            return ResolvedModel(folder, str(folder), commit), [
                f"the base moved from {name} to {folder} (found by its fingerprint)"
            ]
        raise AdapterError(
            f"{adapter} was trained on {name}, which is not there",
            got=error.problem,
            fix="--model with the folder where the base is now",
        ) from None


def belongs(adapter: Path, base: ResolvedModel) -> bool:
    """Whether an adapter was trained on this base, by its name, its place or its tensors, or does
    not say.

    Raises:
        AdapterError: a record or a config that cannot be read.
    """
    saved, name, _ = recorded_base(adapter)
    if name is None or name == base.name:
        return True
    was = Path(name).expanduser()
    if was.is_dir() and was.samefile(base.folder):
        return True
    return _is_this(base.folder, saved)


def recorded_base(adapter: Path) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """What tsugiki recorded of an adapter's base, if it did; the base's name and commit, by that
    record or by PEFT's config.

    Raises:
        AdapterError: a record or a config that cannot be read.
    """
    record = read_record(adapter)
    saved = record.get("base") if record else None
    if isinstance(saved, dict):
        return saved, saved["name"], saved.get("commit")
    named = read_raw(adapter)
    name, commit = named.get("base_model_name_or_path"), named.get("revision")
    return None, str(name) if name else None, commit if isinstance(commit, str) else None


def _is_there(name: str) -> bool:
    return name == "sprout" or Path(name).expanduser().is_dir()


def _near(adapter: Path, name: str) -> Path | None:
    """The folder of that name beside the adapter or above it, where it is not found from here."""
    if _is_there(name) or Path(name).expanduser().is_absolute():
        return None
    folder = adapter.resolve()
    found = (root / name for root in (folder, *folder.parents[:3]))
    return next((path for path in found if (path / "config.json").is_file()), None)


def _places(adapter: Path, name: str) -> Iterator[Path]:
    """Model folders near the adapter, near where the base was, and near where we are."""
    here, was = Path.cwd(), Path(name).expanduser()
    roots = [was.parent, was.parent.parent, *adapter.resolve().parents[:3]]
    seen = set()
    for root in (*roots, here, here / "models"):
        with contextlib.suppress(OSError):  # a folder that is not ours to read
            for folder in sorted(root.iterdir()) if root.is_dir() else ():
                if folder.resolve() not in seen and os.access(folder / "config.json", os.R_OK):
                    seen.add(folder.resolve())
                    yield folder


def _is_this(folder: Path, saved: dict[str, Any] | None) -> bool:
    """Whether this is the base that was recorded, by its tensors."""
    if saved is None:
        return False
    from tsugiki.adapters.identity import identify
    from tsugiki.models.quantized_store import is_quantized_folder, read_origin
    from tsugiki.models.shards import open_model

    try:
        if is_quantized_folder(folder):
            return bool(read_origin(folder).fingerprint.exact == saved["exact"])
        return bool(identify(open_model(folder), str(folder)).exact == saved["exact"])
    except (TsugikiError, OSError, ValueError, KeyError):
        return False  # another folder's faults are not this command's
