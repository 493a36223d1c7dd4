"""What is printed for people is what was said: paths and commands with brackets and colons too."""

from __future__ import annotations

import pytest
from rich.table import Table

from tsugiki.terminal import Terminal


def test_brackets_and_colons_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    path = "models/[v2]/m:dog:[/x]"
    terminal, table = Terminal(), Table("file")
    table.add_row(path)
    terminal.heading(path)
    terminal.say("path", f"wrote {path}")
    terminal.say("table", table)
    assert capsys.readouterr().out.count(path) == 3
