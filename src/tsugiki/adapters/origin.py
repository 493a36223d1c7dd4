"""Which base an adapter belongs to: what its files name, and who a folder is by its tensors.

A base that moved is found again by its fingerprint. Imports no transformers unless only a module
tree knows an architecture's names; knows no A and no B.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsugiki.adapters.record import BaseIdentity, read_record
from tsugiki.errors import AdapterError, ModelError, TsugikiError
from tsugiki.files import read_json
from tsugiki.models.families import FAMILIES, FamilyNames, is_tied
from tsugiki.models.fingerprint import fingerprint_stored
from tsugiki.models.hub import ResolvedModel, resolve_model
from tsugiki.models.shards import StoredModel, open_model

CONFIG = "adapter_config.json"


def adapter_folder(path: Path) -> Path:
    """The adapter in a folder that a user named: itself, or a run's.

    Raises:
        AdapterError: there is none.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(
        f"there is no adapter in {path}",
        allowed=f"a folder with {CONFIG}, or a run folder that holds one",
        fix=None if path.exists() else "ls -d runs/*/adapter models/*",
    )


def identify(model: StoredModel, name: str, commit: str | None = None) -> BaseIdentity:
    """Fingerprint of a base, from its family's names or from its module tree."""
    if model.model_type in FAMILIES:
        found = fingerprint_stored(model.folder, FamilyNames(model.model_type, is_tied(model)))
    else:
        from tsugiki.models.fingerprint import fingerprint_folder
        from tsugiki.models.spec import ModelSpec

        found = fingerprint_folder(model.folder, ModelSpec.from_folder(model.folder).meta_model())
    dtype = model.setting("dtype") or model.setting("torch_dtype")
    return BaseIdentity(
        name, found.exact, found.rounded, commit, None if dtype is None else str(dtype)
    )


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
    record = read_record(adapter)
    saved = record.get("base") if record else None
    if isinstance(saved, dict):
        name, commit = saved["name"], saved.get("commit")
    else:
        name, commit = _peft_base(adapter)
    if not name:
        raise AdapterError(f"{adapter} does not say which base it belongs to", fix="--model FOLDER")
    try:
        return resolve_model(str(name), commit), []
    except ModelError as error:
        if saved:
            for folder in _places(adapter, str(name)):
                if _is_this(folder, saved):
                    return ResolvedModel(folder, str(folder), commit), [
                        f"the base moved from {name} to {folder} (found by its fingerprint)"
                    ]
        raise AdapterError(
            f"{adapter} was trained on {name}, which is not there",
            got=error.problem,
            fix="--model with the folder where the base is now",
        ) from None


def _peft_base(adapter: Path) -> tuple[Any, Any]:
    raw = read_json(adapter / CONFIG)
    if not isinstance(raw, dict):
        return None, None
    return raw.get("base_model_name_or_path"), raw.get("revision")


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
    try:
        return bool(identify(open_model(folder), str(folder)).exact == saved["exact"])
    except (TsugikiError, OSError):
        return False  # another folder's faults are not this command's
