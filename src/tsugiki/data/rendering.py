"""Renders a chat template that may be hostile: refused constructs, and a limit on time.

transformers renders in Jinja's sandbox, which keeps templates from reading attributes and files but
lets them compute for ever. Knows no conversations: a render is a function without arguments.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tsugiki.errors import DataError

SECONDS = 0.8  # of processor time for one conversation; real templates take milliseconds
LARGEST_TEMPLATE = 1 << 20  # characters; the longest known to us has 20,000
LARGEST_NUMBER = 100_000
WAY_OUT = "--template chatml uses a format of ours in place of the tokenizer's template"


class _OutOfTime(BaseException):
    """Raised inside a render that takes too long; not an Exception, so no template catches it."""


@lru_cache(maxsize=32)
def check_template(source: str) -> None:
    """Refuse what one uninterruptible operation could blow up: powers, huge repetitions.

    Syntax that this parser does not know is left for the rendering itself to judge.

    Raises:
        DataError: the template holds such an operation.
    """
    if len(source) > LARGEST_TEMPLATE:
        raise DataError(f"the chat template has {len(source):,} characters", fix=WAY_OUT)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return
    for _ in tree.find_all(nodes.Pow):
        raise DataError("the chat template computes a power, which may never end", fix=WAY_OUT)
    for node in tree.find_all(nodes.Mul):
        if not all(_small(side) for side in (node.left, node.right)):
            raise DataError("the chat template repeats a text or list", fix=WAY_OUT)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, int) and abs(constant.value) > LARGEST_NUMBER:
            raise DataError(f"the chat template holds the number {constant.value}", fix=WAY_OUT)


def _small(node: nodes.Expr) -> bool:
    """Whether a factor is surely no text, no list and no product of its own."""
    return not isinstance(
        node, nodes.Mul | nodes.List | nodes.Tuple | nodes.Concat | nodes.Filter | nodes.Add
    ) and not (isinstance(node, nodes.Const) and isinstance(node.value, str))


def bounded(render: Callable[[], object], seconds: float = SECONDS) -> object:
    """What `render` gives, stopped when it runs longer.

    A second thread raises an exception in this one, which works on every system and in every
    thread. Processor time counts beside the clock, so that a machine that was put to sleep does
    not make a row look hostile.

    Raises:
        DataError: the time is over.
    """
    thread = threading.get_ident()
    done, lock = threading.Event(), threading.Lock()
    spent = time.process_time()

    def watch() -> None:
        while not done.wait(seconds):
            if time.process_time() - spent >= seconds * 0.8:
                with lock:
                    if not done.is_set():
                        _raise_in(thread, _OutOfTime)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        try:
            return render()
        finally:
            with lock:
                done.set()
    except _OutOfTime:
        raise DataError(
            f"the chat template did not finish within {seconds:g} s", fix=WAY_OUT
        ) from None


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
