"""Shared fixtures, and the check at the session's end that every promise was proven."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread: two test processes fill two cores, tiny models gain nothing from a second thread, and
# runs that are compared byte for byte must sum in one order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A job in the background ignores Ctrl-C, and so would every command that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
from promises import read_promises, unproven

# Without a GPU Triton's kernels are interpreted; to be said before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
PASSED: set[str] = set()
FAILED: set[str] = set()


@pytest.fixture(autouse=True)
def _small_numbers() -> Iterator[None]:
    """A run takes numbers below 1e-38 for zero, and so would every test after it."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it are skipped without."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs real data in ../shared/data, which is not here")
    return folder


@pytest.fixture(scope="module", params=["torch", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU bodies in plain torch, then compiled; the second is skipped where they cannot be built."""
    from tsugiki.kernels import backend
    from tsugiki.kernels.cpu.build import library

    found, reason = library()
    if request.param == "compiled" and found is None:
        pytest.skip(reason)
    backend.hold_plain(backend.ON_CPU if request.param == "torch" else ())
    yield request.param
    backend.hold_plain(())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: begun last, it would run on alone."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid
    if report.failed:
        FAILED.add(name)
    elif report.when == "call" and report.passed:
        PASSED.add(name)


def _whole_suite(config: pytest.Config) -> bool:
    asked = [argument for argument in config.invocation_params.args if not argument.startswith("-")]
    return (
        not asked and not config.option.keyword and not config.option.markexpr
        and not config.option.collectonly and not config.option.lf
        and not hasattr(config, "workerinput")
    )  # fmt: skip


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _whole_suite(session.config):
        return
    problems = unproven(read_promises(ROOT / "docs" / "promises.md"), PASSED, FAILED, ROOT)
    session.config.stash[PROBLEMS] = problems
    if problems and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


PROBLEMS: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    problems = terminalreporter.config.stash.get(PROBLEMS, None)
    if problems is None:
        return
    if problems:
        terminalreporter.section("promises without proof")
        for problem in problems:
            terminalreporter.line(problem)
    else:
        terminalreporter.line("every promise in docs/promises.md is proven")
