"""Renders a chat template that may be hostile: refused constructs, a limit on time, a fixed date.

transformers renders in Jinja's sandbox, which keeps templates from reading attributes and files but
lets them compute for ever. Knows no conversations: a render is a function without arguments.
"""

from __future__ import annotations

import ctypes
import datetime
import json
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
IDLE_LOOKS = 20  # looks at nothing after which the watching thread ends
CLOCK = "strftime_now"  # what transformers gives to templates that print the day
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


def today() -> datetime.date:
    """The day by this machine's clock."""
    return datetime.date.today()


@lru_cache(maxsize=32)
def with_date(source: str, date: datetime.date) -> str:
    """The template with a clock that stands still at the beginning of a day.

    A macro of the same name hides transformers' function. (transformers 5 takes no functions as
    variables of a template.) Its line end is one that Jinja drops, so nothing else is printed.
    """
    fixed = datetime.datetime(date.year, date.month, date.day)
    words = {"%%": "\0"}  # a percent sign until the end
    words |= {f"%{letter}": fixed.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyYzZ"}
    words |= {
        f"%-{letter}": fixed.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dmHIMSj"
    }
    words |= {"%e": f"{date.day:2}", "%F": date.isoformat(), "%T": "00:00:00", "%R": "00:00"}
    words["\0"] = "%"
    return (
        f"{{%- macro {CLOCK}(form) -%}}{{%- set out = namespace(text=form) -%}}"
        f"{{%- for short, long in {json.dumps(words)}.items() -%}}"
        "{%- set out.text = out.text.replace(short, long) -%}{%- endfor -%}"
        f"{{{{- out.text -}}}}{{%- endmacro %}}\n{source}"
    )


class Watch:
    """Stops renders that run too long, from a thread of its own that ends when idle.

    An exception raised in the rendering thread works on every system and in every thread.
    Processor time counts beside the clock, so that a machine that was put to sleep does not make
    a row look hostile. One thread for all renders: starting one each costs more than rendering.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._running: dict[int, tuple[float, float]] = {}  # thread → clock, processor at start
        self._watcher: threading.Thread | None = None

    def bounded(self, render: Callable[[], object]) -> object:
        """What `render` gives.

        Raises:
            DataError: it ran for more than `seconds`.
        """
        thread = threading.get_ident()
        with self._lock:
            self._running[thread] = time.monotonic(), time.process_time()
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
        try:
            try:
                return render()
            finally:
                with self._lock:
                    self._running.pop(thread, None)
        except _OutOfTime:
            raise DataError(
                f"the chat template did not finish within {self.seconds:g} s", fix=WAY_OUT
            ) from None

    def _watch(self) -> None:
        idle = 0
        while idle < IDLE_LOOKS:
            time.sleep(self.seconds / 8)
            with self._lock:
                idle = 0 if self._running else idle + 1
                now, spent = time.monotonic(), time.process_time()
                for thread, (clock, processor) in list(self._running.items()):
                    if min(now - clock, spent - processor) >= self.seconds * 0.8:
                        del self._running[thread]
                        _raise_in(thread, _OutOfTime)
                if idle >= IDLE_LOOKS:
                    self._watcher = None  # under the lock: the next render starts another


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
