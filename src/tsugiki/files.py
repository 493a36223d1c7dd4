"""Files that are whole or absent: atomic writes, folders, locks, digests, space.

Every write goes to a temporary neighbour, is fsynced and renamed into place, and the folder is
fsynced after it, so that a crash leaves the old file or the new one. Knows nothing of what the
files mean, and imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tsugiki.errors import DiskError, RunError

CHUNK = 1 << 20


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: under TSUGIKI_CACHE, else in the user's own cache."""
    own = os.environ.get("TSUGIKI_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own or os.path.join(base, "tsugiki")) / kind


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Make every file under `folder`, and the folders themselves, durable."""
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync_folder(Path(root))


def as_disk_error(error: OSError, path: Path) -> DiskError:
    """What a failed write means to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(
            f"the disk is full: writing {path}",
            got=f"{human_bytes(free_bytes(path))} free",
            fix="free some space and run the same command again (a run goes on with --resume)",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DiskError(
            f"no permission to write {path}", fix="choose another folder with --output"
        )
    return DiskError(f"cannot write {path}: {error.strerror or error}")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the file as a whole.

    Raises:
        DiskError: disk full, no permission; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise as_disk_error(error, path) from error


def refuse_existing(*targets: Path) -> None:
    """Raises RunError: what shall be written is there already; asked before any work is done."""
    there = ", ".join(str(path) for path in targets if path.exists())
    if there:
        raise RunError(f"{there} exists already", fix="choose another --output, or remove it")


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` when the block ends well.

    The contents are fsynced before the rename. With `replace`, an existing target is moved
    aside first and removed after. What killed writers of it left is removed first.

    Raises:
        DiskError: disk full, no permission; `target` is as before.
        RunError: `target` exists and `replace` is false.
    """
    try:
        sweep_left_over(target)
        if not replace:
            refuse_existing(target)
        with scratch_folder(target) as temporary:
            os.chmod(temporary, 0o755)
            yield temporary
            fsync_tree(temporary)
            if target.exists():
                aside = temporary.with_suffix(".old.tmp")
                os.rename(target, aside)
                try:
                    os.rename(temporary, target)
                except OSError:
                    os.rename(aside, target)
                    raise
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(temporary, target)
            fsync_folder(target.parent)
    except OSError as error:
        raise as_disk_error(error, target) from error


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone after; of a killed owner, swept with `target`'s own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with held(Path(name)):
            yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def sweep_temporary(folder: Path, name: str = "*") -> list[Path]:
    """Remove what killed writers left in `folder`; returns what was removed.

    One that is still at work is left alone. A replaced folder whose new version never arrived is
    put back.

    Args:
        name: of what they wrote, as a pattern.
    """
    removed = []
    for left in sorted(folder.glob(f".{name}.*.tmp")):
        if left.name.endswith(".old.tmp"):
            original = folder / left.name[1:].rsplit(".", 3)[0]
            if not original.exists():
                os.rename(left, original)
                continue
        try:
            with held(left):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue
        removed.append(left)
    return removed


def sweep_left_over(target: Path) -> None:
    """Remove what killed writers of `target` left beside it; one still at work is left alone."""
    sweep_temporary(target.parent, glob.escape(target.name))


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary neighbour of `target` to write, that becomes it when the block ends well.

    What killed writers of this file left is removed first. Fsynced before the rename.

    Raises:
        DiskError: disk full, no permission; nothing is left.
        RunError: `target` exists.
    """
    refuse_existing(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep_left_over(target)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        with held(temporary):
            yield temporary
            handle = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            os.chmod(temporary, 0o644)
            os.rename(temporary, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise as_disk_error(error, target) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock on what is being written, freed by the kernel however the writer ends."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Readable, stable JSON (UTF-8, sorted as given), written atomically."""
    atomic_write(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """JSON of a file.

    Raises:
        RunError: missing, unreadable or not JSON; the file is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read {path}: {error}") from None


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write; a crash leaves at most one half line at the end."""
    try:
        with open(path, "ab") as stream:
            stream.write(line.encode() + b"\n")
    except OSError as error:
        raise as_disk_error(error, path) from error


def read_lines(path: Path) -> list[Any]:
    """The JSON values of an append-only file; a torn last line is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line:
            try:
                values.append(json.loads(line))
            except ValueError:
                continue
    return values


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def human_bytes(count: float) -> str:
    """1500 → '1.5 KB' (powers of 1000, one decimal), as `parse_bytes` reads them."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def require_space(path: Path, need: int, what: str) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        DiskError: needed and free bytes are told.
    """
    free = free_bytes(path)
    if free < need:
        raise DiskError(
            f"too little disk space for {what} at {path}",
            got=f"{human_bytes(free)} free",
            allowed=f"{human_bytes(need)} needed",
            fix="free some space, or choose another disk with --output",
        )


class RunLock:
    """One writer for a folder: an OS lock (flock), freed by the kernel however the holder ends.

    The file's text (who holds it) is only for the message.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise as_disk_error(error, self.path) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 100).decode(errors="replace").strip()
            os.close(handle)
            raise RunError(
                f"another run is writing {self.path.parent}",
                got=f"process {holder}" if holder else None,
                fix="wait for it to end, or choose another --output",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def parse_bytes(text: str) -> int:
    """'8GB' (10⁹), '6GiB' (2³⁰), '512 MB', '1000000' → bytes.

    Raises:
        ValueError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise ValueError("a size such as 8GB, 6GiB or 500MB")
    number, letter, binary = match.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter or " "))
    if size <= 0:
        raise ValueError("must be more than nothing")
    return size


class _KeysOnce(yaml.SafeLoader):
    """YAML in which no mapping gives a key twice, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, or an error that names the line of the second key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What `text` says.

    Raises:
        yaml.YAMLError: not YAML, or a mapping that gives a key twice.
    """
    return yaml.load(text, Loader=_KeysOnce)
