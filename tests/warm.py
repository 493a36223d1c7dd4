"""`tsugiki …` without paying for its imports: a process that has imported everything forks them.

Only the interpreter's start is replaced, in the parent and in its supervised child. Supervision,
signals, process groups, command line and training are the program's own; tests that start real
interpreters stand beside these.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["tsugiki.cli", "tsugiki.pipelines", "tsugiki.looking", "transformers.models.llama"]
CONTEXT = multiprocessing.get_context("forkserver")


def ready() -> None:
    """Start the process that forks, unless it runs."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of the process that forks would be lost
    try:
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def begin(
    arguments: list[str],
    cwd: Path,
    errors: Path,
    first: Callable[[], None] | None = None,
    **environment: str,
) -> BaseProcess:
    """Start `tsugiki ARGUMENTS` in a session of its own; stderr goes to a file, stdout nowhere.

    first: done in the new process before the program's own.
    """
    ready()
    process = CONTEXT.Process(target=_parent, args=(arguments, cwd, errors, environment, first))
    process.start()
    return process


def _parent(
    arguments: list[str],
    cwd: Path,
    errors: Path,
    environment: dict[str, str],
    first: Callable[[], None] | None,
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    from tsugiki import __main__, supervise

    supervise.subprocess = types.SimpleNamespace(Popen=Forked)  # type: ignore[assignment]
    sys.argv = ["tsugiki", *arguments]
    if first is not None:
        first()
    __main__.main()


class Forked:
    """What `supervise` uses of subprocess.Popen, as a fork instead of a new interpreter."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        pass_fds: tuple[int, ...],
        process_group: int,
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "tsugiki"]
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                _child(command[3:], env, pass_fds, process_group)
            os._exit(99)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _child(arguments: list[str], env: dict[str, str], kept: tuple[int, ...], group: int) -> None:
    os.setpgid(0, group)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for handle in map(int, os.listdir("/dev/fd")):
        if handle > 2 and handle not in kept:
            with contextlib.suppress(OSError):
                os.close(handle)
    os.environ.update(env)
    from tsugiki import cli, supervise

    supervise.become_worker()
    sys.argv = ["tsugiki", *arguments]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stderr.flush()
    os._exit(code)
