"""Checkpoints: atomic folders with a hashed manifest; only what verifies is ever used.

Weights, optimiser and random states are safetensors, the rest JSON; nothing is pickled. Knows no
model and no loop: tensors and a state in, the same out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tsugiki.errors import RunError, TsugikiError
from tsugiki.files import atomic_folder, read_json, sha256_file, sweep_temporary

KEPT = 2
CONTENT = {"tensors.safetensors", "state.json"}
NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    step: int
    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write `folder/step-N`, then remove what is older than the newest two.

    Raises:
        DiskError: it could not be written; the checkpoints before it are intact.
    """
    target = folder / f"step-{step}"
    with atomic_folder(target, replace=True) as temporary, as_os_error():
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors"
        )
        (temporary / "state.json").write_text(json.dumps(state, ensure_ascii=False))
        entries = {
            p.name: {"sha256": sha256_file(p), "bytes": p.stat().st_size}
            for p in sorted(temporary.iterdir())
        }
        (temporary / "manifest.json").write_text(_manifest(step, entries))
    for _, old in checkpoints(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """A full disk met by safetensors' own writer becomes the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code.group(1)) if code else errno.EIO, str(error)) from error


def _manifest(step: int, entries: dict[str, Any]) -> str:
    """The one spelling of a manifest, so that a changed byte anywhere in it is seen."""
    return json.dumps({"version": 1, "step": step, "files": entries}, indent=2)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint folder, newest first."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found, reverse=True)


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and notes on those passed over; None if none does."""
    notes = [f"removed an unfinished {path.name}" for path in sweep_temporary(folder)]
    for step, path in checkpoints(folder):
        damage = damaged(path)
        if damage is None:
            try:
                tensors = load_file(path / "tensors.safetensors")
                return Checkpoint(step, path, tensors, read_json(path / "state.json")), notes
            except (SafetensorError, TsugikiError, OSError) as error:
                damage = str(error)
        notes.append(f"{path} is damaged ({damage}); using the one before it")
    return None, notes


def damaged(path: Path) -> str | None:
    """The first file of a checkpoint that is not what the manifest says, or None."""
    try:
        manifest = read_json(path / "manifest.json")
        files = manifest["files"]
        assert isinstance(files, dict)
    except RunError as error:
        return error.problem
    except (KeyError, TypeError, AssertionError):
        return "manifest.json"
    for name, entry in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if not isinstance(entry, dict) or file.stat().st_size != entry.get("bytes"):
            return f"{name} has another size"
        if sha256_file(file) != entry.get("sha256"):
            return f"{name} has another content"
    match = NAME.fullmatch(path.name)
    spelled = _manifest(int(match.group(1)), files).encode() if match else b""
    if set(files) != CONTENT or (path / "manifest.json").read_bytes() != spelled:
        return "manifest.json is not as written"
    return None


def saved_identity(folder: Path) -> dict[str, Any] | None:
    """What the newest whole checkpoint says of its run; None if there is none."""
    for _, path in checkpoints(folder):
        if damaged(path) is not None:
            continue
        with contextlib.suppress(TsugikiError, KeyError, TypeError):
            found = read_json(path / "state.json")["identity"]
            if isinstance(found, dict):
                return found
    return None


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on only as what it was.

    Raises:
        RunError: data, base or a setting differs; every difference is listed.
    """
    words = {
        "data": "the rows are not those that it began with",
        "base": "the base's weights are not those that it began with",
    }
    differences = [
        words.get(key) or f"{key}: {_short(saved.get(key))} → {_short(now.get(key))}"
        for key in sorted(set(saved) | set(now))
        if saved.get(key) != now.get(key)
    ]
    if differences:
        raise RunError(
            "this is not the run that was begun:\n"
            + "\n".join(f"    {line}" for line in differences),
            fix="resume with the same data, base and settings, or start a new run",
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}…"
