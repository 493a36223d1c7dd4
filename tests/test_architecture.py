"""The floors: imports go down only, never sideways between stages, and files stay rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tsugiki"

FLOORS: dict[str, int] = {
    "errors": 0, "config": 0, "files": 0, "device": 0, "supervise": 0, "terminal": 0,
    "presets": 0, "stopping": 0, "spellings": 0, "mistakes": 0,
    "models": 1, "data": 1, "kernels": 1, "formats": 1,
    "adapters": 2, "memory": 2, "defaults": 2,
    "planning": 3, "engine": 3, "proof": 3,
    "training": 4, "evaluation": 4, "merging": 4, "exporting": 4, "joining": 5, "judging": 5, "quantizing": 5,
    "doctor": 5,
    "shipping": 5, "export_verb": 5, "proving": 5, "talk_verbs": 5,
    "cli": 5, "pipelines": 5, "demo": 5, "talk": 5, "flags": 5,
    "guarding": 5, "watching": 5, "looking": 5, "showing": 5, "fitting": 5, "sources": 5, "resuming": 5, "__main__": 5, "__init__": 5,
}  # fmt: skip
MAY_IMPORT_NEIGHBOUR = {("models", "kernels")}
SAME_FLOOR_FREE = {0, 5}


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "tsugiki":
                names = [f"tsugiki.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("tsugiki.")}
    return rooms


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for other in imported_rooms(path) & set(FLOORS):
        if other == room or (room, other) in MAY_IMPORT_NEIGHBOUR:
            continue
        same_and_free = FLOORS[other] == FLOORS[room] and FLOORS[room] in SAME_FLOOR_FREE
        assert FLOORS[other] < FLOORS[room] or same_and_free, f"{room} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_rooms(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 400, "two rooms?"
    assert ast.get_docstring(ast.parse(text)), "opens with what it does and does not know"


def test_public_names() -> None:
    import tsugiki

    for name in tsugiki.__all__:
        assert getattr(tsugiki, name) is not None
    assert sorted(tsugiki.__all__) == list(tsugiki.__all__)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["export", "--help"], ["presets"]]
)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from tsugiki.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
