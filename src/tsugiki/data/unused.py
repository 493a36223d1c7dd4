"""What rows hold and training does not read: columns, keys of turns, and how to use a column.

Knows rows one at a time; reads no files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tsugiki.data.columns import answers, is_numbering, is_thought
from tsugiki.data.layouts import LISTS, PAIRS, SYSTEM, turns_of
from tsugiki.data.turns import holds, unread_keys

MOST_NAMED = 6


@dataclass
class Unused:
    """Names of columns and keys, each once, in the order in which they came."""

    columns: dict[str, None] = field(default_factory=dict)
    keys: dict[str, None] = field(default_factory=dict)
    hint: str = ""

    def see(self, value: Mapping[str, Any], used: Sequence[str], layout: str) -> None:
        """Note what one row, read by `layout` from the columns `used`, leaves."""
        for name, held in value.items():
            if name in used or not holds(held):
                continue
            self.columns[str(name)] = None
            if not self.hint and type(held) in (str, int, float) and not is_numbering(str(name)):
                self.hint = _flags(str(name), used, layout)
        if layout in LISTS:
            self.keys |= dict.fromkeys(unread_keys(turns_of(value, layout)))

    def notes(self) -> list[str]:
        """One sentence for columns, one for keys of turns."""
        told = []
        if self.columns:
            to_use = f" (to use one: {self.hint})" if self.hint else ""
            told.append(f"columns not used: {_named(self.columns)}{to_use}")
        if self.keys:
            told.append(f"keys of turns not used: {_named(self.keys)}")
        return told


def _flags(name: str, used: Sequence[str], layout: str) -> str:
    """Flags that put a column behind the prompt, or learn it from a text; '' where none can."""
    if layout == "text" and answers(name) and not set("{}[],=") & set(name):
        return f"--columns prompt=text,answer={shlex.quote(name)}"
    if layout not in PAIRS or "history" in used or any(set("{}[]") & set(n) for n in (name, *used)):
        return ""
    answer = PAIRS[layout][1]
    asked, answered = used[: used.index(answer)], [answer]
    if is_thought(name):
        answered = [name, answer]
    else:
        asked = [*asked, name]
    prompt, learnt = ("\\n".join(f"{{{column}}}" for column in p) for p in (asked, answered))
    named = next((column for column in used if column in SYSTEM), None)
    system = f" --columns system={named}" if named else ""
    return (
        f"--prompt-template {shlex.quote(prompt)} --answer-template {shlex.quote(learnt)}{system}"
    )


def _named(names: Mapping[str, None]) -> str:
    shown = [name[:40] for name in list(names)[:MOST_NAMED]]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"… {more} more"] if more else [])])
