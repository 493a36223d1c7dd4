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
from promises import Session, read_promises, unproven

# Without a GPU Triton's kernels are interpreted; to be said before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
SESSION = Session()


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


def pytest_collection_finish(session: pytest.Session) -> None:
    SESSION.collected.update(item.nodeid for item in session.items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """With workers the session itself collects nothing."""
    SESSION.collected.update(ids)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid
    if report.failed:
        SESSION.failed.add(name)
    elif report.skipped and not hasattr(report, "wasxfail"):
        SESSION.skipped[name] = _reason(report)
    elif report.when == "call" and report.passed:
        SESSION.passed.add(name)


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped; empty where nobody said."""
    told = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = told.removeprefix("Skipped: ").strip()
    return "" if reason in ("unconditional skip", "Skipped", "<Skipped instance>") else reason


def _whole_suite(config: pytest.Config) -> bool:
    option = config.option
    return (
        config.args_source is not pytest.Config.ArgsSource.ARGS  # no path was typed
        and not option.keyword and not option.markexpr and not option.deselect
        and not option.collectonly and not getattr(option, "lf", False)
        and not hasattr(config, "workerinput")
    )  # fmt: skip


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _whole_suite(session.config):
        return
    problems = unproven(read_promises(ROOT / "docs" / "promises.md"), SESSION, ROOT)
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
