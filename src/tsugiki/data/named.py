"""Which files of rows a path means. Reads none of them, loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
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
    found = [p for p in sorted(Path("data").glob("*")) if p.is_file() and p.name[0] != "."]
    if len(found) != 1:
        raise DataError(
            "no data was named",
            got=f"{len(found)} files in data/" if found else "no file in data/",
            fix="tsugiki train my.jsonl",
        )
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
        made = set(made_folders(path))
        found = sorted(
            p
            for p in path.rglob("*")
            if p.is_file()
            and p.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in p.relative_to(path).parts)
            and made.isdisjoint(p.parents)
        )
        if not found:
            raise DataError(
                f"the folder {path} holds no data files",
                got=f"runs, adapters or models: {named_folders(made, path)}" if made else None,
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


def made_folders(path: Path) -> list[Path]:
    """Folders of runs, adapters and models within a folder of data, sorted; none within another."""
    found = {
        p.parent
        for first, *others in MADE
        for p in path.rglob(first)
        if all((p.parent / other).exists() for other in others)
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    } - {path}
    return sorted(folder for folder in found if found.isdisjoint(folder.parents))


def named_folders(folders: Iterable[Path], path: Path) -> str:
    """Folders within another, the first three by name."""
    names = sorted(str(folder.relative_to(path)) for folder in folders)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
