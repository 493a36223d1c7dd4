"""A Ctrl-C during merge, export and their proofs: one plain message, nothing left, and again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from test_merging_peft import TOKENIZER

from tsugiki.errors import Interrupted
from tsugiki.stopping import stoppable, will_write

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import merge_memory

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGINT to a group is POSIX")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ of 100 MB and adapter/: long enough in the making to be stopped in it."""
    folder = tmp_path_factory.mktemp("stopped")
    merge_memory.make_model(folder / "base", 0.1, 50_000_000, vocabulary=4000)
    TOKENIZER.save_pretrained(folder / "base")
    merge_memory.make_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A job in the background ignores Ctrl-C, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stopped(place: Path, when: Callable[[], object], *arguments: str) -> str:
    """Ctrl-C as a terminal sends it, to the whole group, once `when` holds; what it said then."""
    with subprocess.Popen(
        [sys.executable, "-m", "tsugiki", *arguments], cwd=place, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    ) as child:  # fmt: skip
        while not when():
            assert child.poll() is None, "it ended before it could be stopped"
            time.sleep(0.002)
        os.killpg(child.pid, signal.SIGINT)
        _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert not list(place.rglob("*.tmp")), "nothing half-written"
    return said


def test_a_merge(place: Path) -> None:
    command = ["merge", "adapter", "--model", "base", "--output", "merged"]
    said = stopped(place, lambda: list(place.glob(".merged.*.tmp/*")), *command)
    assert said == (
        "error: the merge was stopped; nothing half-written is left\n"
        "  fix:     run the same command again\n"
    )
    assert not (place / "merged").exists()
    said = stopped(place, (place / "merged").exists, *command)
    assert "merged" in said, "whole: it is named, whether the proof had begun or not"
    assert (place / "merged" / "tsugiki.json").is_file()


def test_an_export(place: Path) -> None:
    """In the middle of the second file: the first is whole and said to be."""
    first = place / "out" / f"{place.name}-F16.gguf"
    said = stopped(
        place, first.exists, "export", "adapter", "--model", "base", "--output", "out",
        "--gguf", "f16,q4_k_m",
    )  # fmt: skip
    assert said.endswith(
        "error: the export was stopped; nothing half-written is left; "
        f"whole, not proven: out/{first.name}\n"
        "  fix:     remove it, or leave it out, and run the same command again\n"
    )
    assert [path.name for path in (place / "out").iterdir()] == [first.name]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see it begin")
def test_a_comparison(place: Path) -> None:
    """Once it reads weights: it writes nothing that would tell."""

    def reading() -> bool:
        (child,) = psutil.Process().children()
        return ".safetensors" in Path(f"/proc/{child.pid}/maps").read_text()

    said = stopped(place, reading, "verify", "adapter", "base", "--model", "base")
    assert said == (
        "error: the proof of base was stopped; nothing half-written is left\n"
        "  fix:     run the same command again\n"
    )


def test_a_base_in_few_bits(place: Path) -> None:
    said = stopped(
        place,
        lambda: list(place.glob(".four.*.tmp/*")),
        "quantize-base",
        "base",
        "--output",
        "four",
    )
    assert said == (
        "error: the quantising of base was stopped; nothing half-written is left\n"
        "  fix:     run the same command again\n"
    )
    assert not (place / "four").exists()


def test_what_is_told(tmp_path: Path) -> None:
    """Only what was written since is whole; a proof inside has a way on of its own."""
    (tmp_path / "old").touch()

    def work() -> None:
        will_write([tmp_path / "old", tmp_path / "new", tmp_path / "never"])
        (tmp_path / "new").touch()
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as error, stoppable("the work"):
        work()
    assert error.value.exit_code == 130
    assert error.value.problem.endswith(f"left; whole, not proven: {tmp_path / 'new'}")
    with (
        pytest.raises(Interrupted) as error,
        stoppable("the work"),
        stoppable("the proof of x", "tsugiki verify x"),
    ):
        raise KeyboardInterrupt
    assert (error.value.problem, error.value.fix) == (
        "the proof of x was stopped; nothing half-written is left", "tsugiki verify x",
    )  # fmt: skip
    will_write([tmp_path / "alone"])  # without anything around it changes nothing
