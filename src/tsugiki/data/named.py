"""Which files of rows a path means. Reads none of them, loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsugiki.data.unreadable import elsewhere, refuse_packed
from tsugiki.errors import DataError

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (*ROW_SUFFIXES, ".txt", ".md")
# What tells a run's, an adapter's and a model's folder: their JSON is not rows.
MADE = (("decisions.json", "config.yaml"), ("adapter_config.json",), ("tokenizer_config.json",))


def find_data(named: Path | None) -> Path:
    """The data that was named, else the only file in `data/`.

    Raises:
        DataError: nothing named and not exactly one file there.
    """
    if named is not None:
        return named
    data = Path("data")
    found = [p for p in sorted(data.glob("*")) if p.is_file() and p.name[0] != "."]
    if len(found) > 1:
        raise DataError(
            "no data was named",
            got=f"{len(found)} files in data/: {_named(found, data)}",
            fix="tsugiki train data (all of them), or name one",
        )
    if not found:
        fix = "tsugiki train my.jsonl"
        raise DataError("no data was named", got="no file in data/", fix=fix)
    return found[0]


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder, sorted.

    A folder's texts count only where it holds no files of rows: beside rows they are a README or a
    licence. Runs, adapters and models in it are left out.

    Raises:
        DataError: nothing there, no permission, or a kind that is not read.
    """
    if not path.exists():
        raise DataError(f"there is no file {path}", fix=elsewhere(path))
    if path.is_dir():
        found, made = _within(path)
        if not found:
            raise DataError(
                f"the folder {path} holds no data files",
                got=f"runs, adapters or models: {_named(made, path)}" if made else None,
                allowed=", ".join(SUFFIXES),
                fix="put the rows there, or name the file that holds them",
            )
        return [p for p in found if p.suffix.lower() in ROW_SUFFIXES] or found
    if path.suffix.lower() not in SUFFIXES:
        if path.is_file():
            refuse_packed(path, "")
        raise DataError(
            f"{path}: this kind of file is not read",
            got=path.suffix or "no suffix",
            allowed=", ".join(SUFFIXES),
            fix="name it by what it holds, e.g. rows.jsonl, table.csv, text.txt",
        )
    return [path]


def folder_notes(path: Path) -> list[str]:
    """What a folder holds beside its rows and is not read."""
    found, made = _within(path)
    notes = []
    if made:
        notes.append(f"runs, adapters and models are not read as rows: {_named(made, path)}")
    texts = sum(p.suffix.lower() not in ROW_SUFFIXES for p in found)
    if texts not in (0, len(found)):
        notes.append(f"{texts} text files beside the rows are not trained on")
    return notes


def _within(path: Path) -> tuple[list[Path], list[Path]]:
    """Data files of a folder, and the folders of runs, adapters and models in it, which are left
    out; sorted, nothing hidden."""
    everything = sorted(
        p
        for p in path.rglob("*")
        if not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    names: dict[Path, set[str]] = {}
    for p in everything:
        names.setdefault(p.parent, set()).add(p.name)
    marked = {f for f, held in names.items() if f != path and any(set(m) <= held for m in MADE)}
    files = [
        p
        for p in everything
        if p.suffix.lower() in SUFFIXES and marked.isdisjoint(p.parents) and p.is_file()
    ]
    return files, sorted(f for f in marked if marked.isdisjoint(f.parents))


def _named(found: Sequence[Path], path: Path) -> str:
    """What lies within a folder, the first three by name."""
    names = [str(one.relative_to(path)) for one in found]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
