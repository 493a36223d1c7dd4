"""A parent that tells what happened to a process that may be killed for memory.

On a CPU, out of memory is SIGKILL, not an exception: only another process can say so and how to
go on. The parent imports no torch, forwards signals, returns the child's code. The child cannot
outlive it: PR_SET_PDEATHSIG on Linux, and everywhere a thread that waits on a pipe which only the
parent holds open. Knows nothing of what the child does but what it tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

PARENT = "TSUGIKI_PARENT"
LIFELINE = "TSUGIKI_LIFELINE"
STATUS = "TSUGIKI_STATUS"
PR_SET_PDEATHSIG = 1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Outcome(NamedTuple):
    """How the child ended.

    code: its exit code, or 128 + signal. killed: by a SIGKILL that we did not send.
    out_of_memory: the kernel's own count of memory kills went up meanwhile.
    peak: the most bytes it held at once, mapped files among them. told: what `tell_parent` said.
    """

    code: int
    killed: bool
    out_of_memory: bool
    peak: int
    told: dict[str, Any]


def is_worker() -> bool:
    """Whether this process is the supervised child."""
    return LIFELINE in os.environ


def supervise(arguments: list[str]) -> Outcome:
    """Run `python -m tsugiki ARGUMENTS` as a child until it ends.

    The child gets a process group of its own: a Ctrl-C in the terminal reaches the parent alone,
    which forwards it once, so that the child's second-Ctrl-C rule counts right. What is ignored
    here (nohup, a job in the background) is ignored there.
    """
    lifeline_read, lifeline_write = os.pipe()
    status_read, status_write = os.pipe()
    environment = {
        **os.environ,
        PARENT: str(os.getpid()),
        LIFELINE: str(lifeline_read),
        STATUS: str(status_write),
    }
    kills_before = memory_kills()
    child: subprocess.Popen[bytes] | None = None
    waiting: list[int] = []

    def forward(number: int, _: object) -> None:
        if child is None:
            waiting.append(number)
        else:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def suspend(_number: int, _frame: object) -> None:
        if child is not None:
            child.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if child is not None:
            child.send_signal(signal.SIGCONT)

    heard = [number for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        child = subprocess.Popen(
            [sys.executable, "-m", "tsugiki", *arguments],
            env=environment,
            pass_fds=(lifeline_read, status_write),
            process_group=0,
        )
        os.close(lifeline_read)
        os.close(status_write)
        for number in waiting:
            child.send_signal(number)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(lifeline_write)
    said = b""
    os.set_blocking(status_read, False)  # whoever else may hold the other end is not waited for
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(status_read, 4096):
            said += piece
    os.close(status_read)
    told: dict[str, Any] = {}
    for line in said.splitlines():
        told |= json.loads(line)
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return Outcome(
        code=code if code >= 0 else 128 - code,
        killed=code == -signal.SIGKILL,
        out_of_memory=memory_kills() > kills_before,
        peak=held if sys.platform == "darwin" else held << 10,
        told=told,
    )


def become_worker() -> None:
    """Called first in the child, before anything heavy is imported: die with the parent."""
    parent = int(os.environ[PARENT])
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    lifeline = int(os.environ[LIFELINE])
    os.set_inheritable(lifeline, False)
    os.set_inheritable(int(os.environ[STATUS]), False)

    def wait_for_parent() -> None:
        os.read(lifeline, 1)  # returns only when the parent's end is closed
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_parent, daemon=True, name="lifeline").start()


def tell_parent(**what: object) -> None:
    """What the parent shall know of this process when it is killed; nothing when unsupervised.

    The parent reads it at the end, so that all of it together must fit a pipe (64 KB on Linux).
    """
    if is_worker():
        os.write(int(os.environ[STATUS]), json.dumps(what).encode() + b"\n")


def memory_left() -> int:
    """Bytes that the machine, or the container around this process, has left."""
    import psutil  # not at the top: it would be a fifth of the parent's start

    left = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            left = min(left, int(limit) - used)
    return left


def memory_kills() -> int:
    """How many processes the kernel has killed for memory here (cgroup v2, else the machine)."""
    for place, key in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        try:
            for line in Path(place).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value)
        except (OSError, ValueError):
            continue
    return 0
