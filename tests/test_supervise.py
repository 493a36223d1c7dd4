"""The parent: it returns the child's code, forwards signals, and neither outlives the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A stand-in for `python -m tsugiki`: what __main__ does in the child, then a script of ours.
PACKAGE = """
from tsugiki import supervise
if supervise.is_worker():
    supervise.become_worker()
import os, signal, sys, time
"""

PARENT = """
import sys
from tsugiki import supervise
outcome = supervise.supervise(sys.argv[1:])
print(outcome.code, outcome.killed, outcome.told, flush=True)
sys.exit(outcome.code)
"""


@pytest.fixture
def start(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Starts a parent whose child runs the given body; gives (process, child pid)."""
    started: list[subprocess.Popen[str]] = []

    def begin(body: str) -> tuple[subprocess.Popen[str], int]:
        import tsugiki

        folder = tmp_path / "shadow" / "tsugiki"
        folder.mkdir(parents=True)
        real = Path(tsugiki.__file__).parent
        for name in ("supervise.py", "__init__.py", "errors.py"):
            (folder / name).write_text((real / name).read_text() if name != "__init__.py" else "")
        (folder / "__main__.py").write_text(
            PACKAGE + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n" + body
        )
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "shadow")},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pid = tmp_path / "pid"
            if pid.exists() and pid.read_text():
                return process, int(pid.read_text())
            time.sleep(0.02)
        raise AssertionError("the child never started")

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def gone(pid: int, seconds: float = 2) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_returns_the_childs_code_and_what_it_told(start) -> None:  # type: ignore[no-untyped-def]
    process, _ = start("supervise.tell_parent(run='/r/x')\nsys.exit(7)")
    out, _ = process.communicate(timeout=20)
    assert out.split() == ["7", "False", "{'run':", "'/r/x'}"]
    assert process.returncode == 7


def test_a_killed_child_is_told(start) -> None:  # type: ignore[no-untyped-def]
    process, pid = start("time.sleep(60)")
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=20)
    assert out.split()[:2] == ["137", "True"]


@pytest.mark.parametrize("how", ["parent", "group"])
def test_the_child_dies_with_the_parent(start, how: str) -> None:  # type: ignore[no-untyped-def]
    process, pid = start("time.sleep(60)")
    if how == "parent":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_child_once(start, number: int) -> None:  # type: ignore[no-untyped-def]
    body = (
        "got = []\n"
        f"signal.signal({int(number)}, lambda *a: got.append(1))\n"
        "open(sys.argv[0] + '.ready', 'w').close()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "sys.exit(40 + len(got))\n"
    )
    process, _ = start(body)
    time.sleep(0.5)
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == 41


def test_what_the_parent_ignores_the_child_ignores(start) -> None:  # type: ignore[no-untyped-def]
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, pid = start("time.sleep(0.5)\nsys.exit(7)")
    finally:
        signal.signal(signal.SIGHUP, before)
    for target in (process.pid, pid):
        os.kill(target, signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 7
