"""Ctrl-C, SIGTERM and SIGKILL during merge, export, quantize-base and their proofs.

One plain message, nothing half-written left, no process left, and the same command again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_merging_peft import TOKENIZER

from tsugiki.errors import Interrupted
from tsugiki.stopping import stoppable, will_write

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import merge_memory

KILLED = (
    "was killed (SIGKILL); without a kill by hand this means out of memory; "
    "nothing half-written is left"
)
ROOM = "end other programs, or take a machine with more memory"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGINT to a group is POSIX")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ of 100 MB and adapter/: long enough in the making to be stopped in it."""
    folder = tmp_path_factory.mktemp("stopped")
    merge_memory.make_model(folder / "base", 0.1, 50_000_000, vocabulary=4000)
    TOKENIZER.save_pretrained(folder / "base")
    merge_memory.make_adapter(folder / "base", folder / "adapter")
    return folder


def ended(
    place: Path, when: Callable[[], object], whom: str, number: int, *arguments: str
) -> tuple[int, str, str]:
    """Signal the "parent", its "child" or the "group" once `when` holds: code, stdout, stderr.

    All that it had started is gone two seconds later.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tsugiki", *arguments], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as parent:  # fmt: skip
        while not when():
            assert parent.poll() is None, "it ended before it could be stopped"
            time.sleep(0.005)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert "libtorch" not in Path(f"/proc/{parent.pid}/maps").read_text()
        if whom == "group":
            os.killpg(parent.pid, number)
        else:
            os.kill(parent.pid if whom == "parent" else family[0].pid, number)
        if number == signal.SIGKILL:
            assert psutil.wait_procs(family, timeout=2)[1] == [], "an orphan works on"
        out, err = parent.communicate(timeout=120)
    assert "Traceback" not in err
    return parent.returncode, out, err


def stopped(place: Path, when: Callable[[], object], *arguments: str) -> str:
    """Ctrl-C as a terminal sends it, to the whole group, once `when` holds; what it said then."""
    code, _, said = ended(place, when, "group", signal.SIGINT, *arguments)
    assert code == 130, said
    assert not list(place.rglob("*.tmp")), "nothing half-written"
    return said


def killed(place: Path, when: Callable[[], object], *arguments: str) -> dict[str, str]:
    """SIGKILL of the child, as the kernel does it; the error that the parent then tells machines."""
    code, out, said = ended(place, when, "child", signal.SIGKILL, *arguments, "--json")
    assert code == 137, said
    assert not list(place.rglob("*.tmp")), "the parent removes what is half-written"
    error = json.loads(out.splitlines()[-1])
    assert error["error"] == "KilledError"
    assert error["problem"] in said
    assert re.fullmatch(r"up to [\d.]+ .B held; [\d.]+ .B free without it", error["got"])
    return error


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


def test_a_merge_that_is_killed(place: Path) -> None:
    command = ["merge", "adapter", "--model", "base", "--output", "again"]
    error = killed(place, lambda: list(place.glob(".again.*.tmp/*")), *command)
    assert error["problem"] == f"the merge {KILLED}"
    assert error["fix"] == f"{ROOM}, then run the same command again"
    assert not (place / "again").exists()
    code, _, said = ended(
        place, lambda: list(place.glob(".again.*.tmp/*")), "parent", signal.SIGTERM, *command
    )
    assert (code, said) == (143, "")
    assert not list(place.rglob("*.tmp")), "the parent removes what is half-written"


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


def test_an_export_that_is_killed(place: Path) -> None:
    """At the parent with llama.cpp at work, then in the proof, which has another way on."""
    command = ["export", "adapter", "--model", "base", "--output", "kill"]
    code, _, _ = ended(
        place, lambda: list(place.glob("kill/.*-Q4_K_M.gguf.*.tmp")), "parent", signal.SIGKILL,
        *command, "--gguf", "q4_k_m",
    )  # fmt: skip
    assert code == -signal.SIGKILL
    assert list(place.glob("kill/.*.tmp"))
    written = place / "kill" / f"{place.name}-Q4_K_M.gguf"
    error = killed(place, written.exists, *command, "--gguf", "q4_k_m")
    assert error["problem"].endswith(f"{KILLED}; whole, not proven: kill/{written.name}")
    assert error["fix"] in (
        f"{ROOM}, then remove it, or leave it out, and run the same command again",
        "end other programs, then: tsugiki verify adapter "
        f"kill/{written.name} --model base --layer-by-layer",
    )  # of the moment between the two, either


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see it begin")
def test_a_comparison(place: Path) -> None:
    """Once it reads weights: it writes nothing that would tell."""

    def reading() -> bool:
        family = psutil.Process().children(recursive=True)
        return any(".safetensors" in Path(f"/proc/{p.pid}/maps").read_text() for p in family)

    command = ["verify", "adapter", "base", "--model", "base"]
    said = stopped(place, reading, *command)
    assert said == (
        "error: the proof of base was stopped; nothing half-written is left\n"
        "  fix:     run the same command again\n"
    )
    error = killed(place, reading, *command)
    assert error["problem"] == f"the proof of base {KILLED}"
    again = "tsugiki verify adapter base --model base --json --layer-by-layer"
    assert error["fix"] == f"end other programs, then: {again}"


def test_a_base_in_few_bits(place: Path) -> None:
    command = ["quantize-base", "base", "--output", "four"]
    half = lambda: set(place.glob(".four.*.tmp/*"))  # noqa: E731
    error = killed(place, half, *command)
    assert error["problem"] == f"the quantising of base {KILLED}"
    ended(place, half, "group", signal.SIGKILL, *command)
    left = half()
    assert left, "nobody was there to remove it"
    said = stopped(place, lambda: not (half() & left) and half(), *command)
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
