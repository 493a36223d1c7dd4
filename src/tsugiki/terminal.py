"""The one place that writes to the user: rich on a terminal, plain lines elsewhere, JSON lines.

Each thing said has a kind and data (for `--json`) and a text or renderable (for people). Knows
nothing of what is said.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text


class Terminal:
    """Where output goes; made once by the CLI.

    Args:
        as_json: every message is one JSON object on a line of stdout, with its `kind`.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # Paths and commands are shown as they are, brackets and colons too.
        as_it_is: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self.console = Console(soft_wrap=not sys.stdout.isatty(), **as_it_is)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not as_json
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, kind: str, show: RenderableType, **data: Any) -> None:
        """Print `show` for people, or `{"kind": kind, **data}` for machines."""
        if self.as_json:
            print(json.dumps({"kind": kind, **data}, ensure_ascii=False, default=str), flush=True)
        else:
            self.console.print(show)

    def heading(self, text: str) -> None:
        """A title between parts; nothing in JSON."""
        if not self.as_json:
            self.console.print(f"\n{text}", style="bold")

    def note(self, text: str, *, loud: bool = False) -> None:
        """Something worth knowing; loud: of what is being written, for whoever will use it."""
        shown = Text(f"note: {text}", "yellow") if loud else Text(text, "dim")
        self.say("note", shown, text=text)

    def warn(self, text: str, **data: Any) -> None:
        """Something the user should know but that stops nothing; to stderr."""
        if self.as_json:
            self.say("warning", "", text=text, **data)
        else:
            self.errors.print(f"warning: {text}", style="yellow", markup=False)

    def step(self, kind: str, text: str, done: int, total: int, **data: Any) -> None:
        """Progress of a long work: a bar on a terminal, a line elsewhere."""
        if not self.live:
            self.say(kind, text, done=done, total=total, **data)
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=done, total=total, description=text)

    def end_steps(self) -> None:
        """Close the progress bar, if one is open."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._task = None
