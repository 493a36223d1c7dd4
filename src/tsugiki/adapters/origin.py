"""Which base an adapter belongs to: what its files name, and where that is.

A base that moved is found again by its fingerprint. Loads no torch before one has to be, so that a
wrong name is told at once; knows no A and no B.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsugiki.adapters.peft_config import CONFIG, read_raw
from tsugiki.adapters.record import PREFIX, WEIGHTS, read_record
from tsugiki.errors import AdapterError, ModelError, TsugikiError
from tsugiki.models.hub import ResolvedModel, has_tokenizer, local_path, resolve_model

if TYPE_CHECKING:
    from tsugiki.models.shards import StoredModel


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's, or a run's that holds one."""
    return any((folder / CONFIG).is_file() for folder in (path, path / "adapter"))


def adapter_folder(named: Path | str) -> Path:
    """The adapter in a folder that a user named: itself, or a run's.

    Raises:
        AdapterError: there is none.
    """
    path = local_path(str(named))
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
    gone = commit is None and not _is_there(name)
    if gone:
        for folder in _near(adapter, name):
            if saved is None or _is_this(folder, adapter, saved):
                return ResolvedModel(folder, str(folder)), [f"the base {name} is {folder} now"]
    try:
        if saved and gone:  # it was a folder: no Hub is asked
            raise ModelError(f"there is no model folder {name}")
        return resolve_model(name, commit), []
    except (ModelError, OSError) as error:
        moved = _moved(adapter, name, saved) if saved else None
        if moved is not None:
            return ResolvedModel(moved, str(moved), commit), [
                f"the base moved from {name} to {moved} (found by its fingerprint)"
            ]
        raise AdapterError(
            f"{adapter} was trained on {name}, which is not there",
            got=error.problem if isinstance(error, ModelError) else str(error),
            fix="--model with the folder where the base is now",
        ) from None


def belongs(adapter: Path, base: ResolvedModel) -> bool:
    """Whether an adapter was trained on this base, by its name, its place or its tensors, or does
    not say.

    Raises:
        AdapterError: a record or a config that cannot be read.
    """
    saved, name, commit = recorded_base(adapter)
    if name is None or name == base.name:
        return True
    with contextlib.suppress(OSError):
        if local_path(name).samefile(base.folder):
            return True
    if saved is None or (commit is not None and base.commit is not None):
        return False
    from tsugiki.models.quantized_store import is_quantized_folder, read_origin

    if is_quantized_folder(base.folder):
        return bool(read_origin(base.folder).fingerprint.exact == saved["exact"])
    return _is_this(base.folder, adapter, saved)


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
    try:
        return name == "sprout" or local_path(name).is_dir()
    except OSError:  # no name that a folder could have
        return False


def _near(adapter: Path, name: str) -> Iterator[Path]:
    """Model folders of that name, or of its last parts, beside the adapter, above it and here."""
    was, folder = local_path(name), adapter.resolve()
    parts = was.parts[1:] if was.is_absolute() else was.parts
    counts = range(min(4, len(parts)), 0, -1) if was.is_absolute() else (len(parts),)
    for count in counts:
        for root in (folder, *folder.parents[:3], Path.cwd()):
            path = root.joinpath(*parts[-count:])
            if os.access(path / "config.json", os.R_OK):
                yield path


def _moved(adapter: Path, name: str, saved: dict[str, Any]) -> Path | None:
    """Where a base is now: the first with its tensors that has a tokenizer, else the first."""
    found: Path | None = None
    for folder in _places(adapter, name):
        if _is_this(folder, adapter, saved):
            if has_tokenizer(folder):
                return folder
            found = found or folder
    return found


def _places(adapter: Path, name: str) -> Iterator[Path]:
    """Model folders near the adapter, near where the base was, and near where we are."""
    here, was = Path.cwd(), local_path(name)
    roots = [was.parent, was.parent.parent, *adapter.resolve().parents[:3]]
    seen = set()
    for root in (*roots, here, here / "models"):
        with contextlib.suppress(OSError):  # a folder that is not ours to read
            for folder in sorted(root.iterdir()) if root.is_dir() else ():
                if folder.resolve() not in seen and os.access(folder / "config.json", os.R_OK):
                    seen.add(folder.resolve())
                    yield folder


def _is_this(folder: Path, adapter: Path, saved: dict[str, Any]) -> bool:
    """Whether this is the base that was recorded, in 16 or 32 bits, by its tensors."""
    from tsugiki.adapters.identity import identify
    from tsugiki.models.shards import open_model

    try:
        model = open_model(folder)
        if not _could_be(model, adapter):
            return False
        return bool(identify(model, str(folder)).exact == saved["exact"])
    except (TsugikiError, OSError, ValueError, KeyError):
        return False  # another folder's faults are not this command's


def _could_be(model: StoredModel, adapter: Path) -> bool:
    """Whether names and shapes allow it, looked at before gigabytes are."""
    from tsugiki.models.shards import read_shard

    shapes = {one.name: one.shape for one in read_shard(adapter / WEIGHTS, AdapterError).tensors}
    for path, entry in (read_record(adapter) or {}).get("targets", {}).items():
        disk = entry.get("disk") if isinstance(entry, dict) else None
        a = shapes.get(f"{PREFIX}{path}.lora_A.weight")
        if disk is None or a is None:
            continue
        if disk not in model.tensors or a[-1] not in model.tensors[disk].shape:
            return False
    return True
