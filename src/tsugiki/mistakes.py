"""What is wrong with settings, in one line each, with the key that was meant.

Knows pydantic's errors; which sections, keys and flags there are is told by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tsugiki.errors import did_you_mean

Place = tuple[str, ...]


def explain(
    error: ValidationError, flags: Mapping[Place, str], sections: Mapping[str, list[str]]
) -> str:
    """Every mistake.

    Args:
        flags: where a value lives → its flag.
        sections: the keys of each; those at the top under "".
    """
    return "\n".join(_line(dict(item), flags, sections) for item in error.errors())


def _line(
    item: dict[str, Any], flags: Mapping[Place, str], sections: Mapping[str, list[str]]
) -> str:
    place = tuple(str(part) for part in item["loc"])
    dotted = ".".join(place)
    if item["type"] == "extra_forbidden":
        return f"unknown setting {dotted!r}; {_hint(place, flags, sections)}"
    if place[0] in sections and len(place) == 1:
        given = str(item["input"])
        first = sections[place[0]][0]
        return f"{dotted} is a section of settings (got {given!r}); did you mean {dotted}.{first}?"
    flag = next((flags[place[:n]] for n in (2, 1) if place[:n] in flags), None)
    shown = f"{flag} ({dotted})" if flag else dotted
    message = item["msg"].removeprefix("Value error, ")
    return f"{shown}: {message} (got {item['input']!r})"


def _hint(place: Place, flags: Mapping[Place, str], sections: Mapping[str, list[str]]) -> str:
    """The key that was meant: of that name elsewhere, near in its section, near anywhere."""
    inside = place[0] if len(place) > 1 and place[0] in sections else ""
    word = place[-1].strip("-").replace("-", "_").lower()
    anywhere: dict[str, str] = {}
    for there, flag in flags.items():
        anywhere.setdefault(there[-1], ".".join(there))
        anywhere[flag.strip("-").replace("-", "_")] = ".".join(there)
    if word in anywhere:
        return f"did you mean {anywhere[word]}?"
    near = did_you_mean(word, sections[inside])
    if near:
        return f"did you mean {near!r}?"
    near = did_you_mean(word, list(anywhere))
    if near:
        return f"did you mean {anywhere[near]}?"
    return f"known: {', '.join(sections[inside])}"
