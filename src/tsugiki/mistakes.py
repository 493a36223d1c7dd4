"""What is wrong with settings, each with where it was written, what was meant, and what works.

Knows pydantic's errors and the names that other toolkits use; which sections, keys and flags there
are is told by the caller.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tsugiki.errors import UsageError
from tsugiki.spellings import OTHERWISE, USUAL_NAMES, USUAL_VALUES

Place = tuple[str, ...]
# A guess further off than this is wrong more often than right: rank is no train, sgd no seed.
NEAR = 0.75
KINDS = {"int": "takes a whole number", "float": "takes a number", "bool": "takes true or false",
         "string": "takes a text", "path": "takes a path"}  # fmt: skip
SHORT = reprlib.Repr()  # YAML can say a billion words in six lines
SHORT.maxstring = SHORT.maxother = 120
SHORT.maxlevel = 3


@dataclass(frozen=True)
class Known:
    """What settings there are.

    Args:
        flags: where a value lives → its flag.
        sections: the keys of each; those at the top under "".
        working: what a field takes in place of a value: that value if it can be.
    """

    flags: Mapping[Place, str]
    sections: Mapping[str, list[str]]
    working: Callable[[Place, Any], Any]


class FromFile(dict[str, Any]):
    """The settings of a YAML file, which knows the line of each.

    Args:
        lines: where a value lives → its line, from 1.
    """

    def __init__(self, values: dict[str, Any], path: Path, lines: dict[Place, int]) -> None:
        super().__init__(values)
        self.path = path
        self.lines = lines


def lines_of(text: str) -> dict[Place, int]:
    """Where a value of some YAML lives → the line of its key, for the first two levels."""
    lines: dict[Place, int] = {}
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in top.value if isinstance(top, yaml.MappingNode) else ():
        lines[(str(key.value),)] = key.start_mark.line + 1
        for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            lines[str(key.value), str(inner.value)] = inner.start_mark.line + 1
    return lines


def origin(layers: Sequence[Mapping[str, Any]], place: Place) -> str | None:
    """FILE:LINE of a value, if the last layer that holds it is a file."""
    for layer in reversed(layers):
        held: Any = layer
        for key in place[:2]:
            held = held.get(key, ...) if isinstance(held, Mapping) else ...
        if held is not ...:
            if not isinstance(layer, FromFile):
                return None
            line = layer.lines.get(place[:2]) or layer.lines.get(place[:1])
            return f"{layer.path}:{line}" if line else str(layer.path)
    return None


def plain(word: str) -> str:
    """A flag or key in one form: --Lora-R → lora_r."""
    return word.strip("-").replace("-", "_").lower()


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a misspelt word is near to, or None where a guess would be a bet."""
    near = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=NEAR)
    return near[0] if near else None


@dataclass(frozen=True)
class _Mistake:
    problem: str
    got: object = None
    allowed: str | None = None
    fix: str | None = None

    def line(self) -> str:
        """All but the fix, where one of several."""
        more = [
            f"{k} {v}" for k, v in (("got", self.got), ("allowed:", self.allowed)) if v is not None
        ]
        return f"{self.problem} ({'; '.join(more)})" if more else self.problem


def refusal(
    error: ValidationError, known: Known, written: Callable[[Place], str | None]
) -> UsageError:
    """Every mistake in one error.

    Args:
        written: FILE:LINE of a value, if it came from a file.
    """
    found: dict[Place, _Mistake] = {}
    for item in error.errors():
        place = tuple(str(part) for part in item["loc"])
        # Of a union each part complains: one is enough.
        if place[:2] not in found:
            tell = _misplaced if _is_misplaced(item["type"], place, known) else _bad_value
            found[place[:2]] = tell(dict(item), place, known, written(place))
    fixes = [m.fix for m in found.values() if m.fix]
    fix = "; ".join(fixes) or "tsugiki train --help lists every setting"
    if len(found) > 1:
        return UsageError("\n".join(m.line() for m in found.values()), fix=fix)
    (one,) = found.values()
    return UsageError(one.problem, got=one.got, allowed=one.allowed, fix=fix)


def _is_misplaced(kind: str, place: Place, known: Known) -> bool:
    return kind == "extra_forbidden" or (len(place) == 1 and place[0] in known.sections)


def _misplaced(item: dict[str, Any], place: Place, known: Known, written: str | None) -> _Mistake:
    """A key that there is not, or a value where a section belongs."""
    at, given, dotted = f"{written}: " if written else "", item["input"], ".".join(place)
    if item["type"] != "extra_forbidden":
        meant: Place | None = (place[0], known.sections[place[0]][0])
        said = f"{at}{dotted} is a section of settings (got {SHORT.repr(given)})"
    else:
        meant = _meant(place, known)
        said = f"{at}unknown setting {dotted!r}"
    if meant is None:
        inside = place[0] if len(place) > 1 else ""
        return _Mistake(f"{said}; known: {', '.join(known.sections[inside])}")
    word = plain(place[-1])
    if isinstance(given, bool | int):
        given = USUAL_VALUES.get((word, given), given)
    works = None if word in OTHERWISE else given
    fix = _as_yaml(meant, works, known)
    return _Mistake(f"{said}; did you mean {'.'.join(meant)}?", fix=fix)


def _bad_value(item: dict[str, Any], place: Place, known: Known, written: str | None) -> _Mistake:
    """A value that the field does not take."""
    field = next((place[:n] for n in (2, 1) if place[:n] in known.flags), place)
    flag, given, dotted = known.flags.get(field), item["input"], ".".join(field)
    choices: list[str] = []
    near = None
    if item["type"] == "literal_error":
        expected = item["ctx"]["expected"]
        choices = re.findall(r"'([^']*)'", expected) or [expected]
        near = nearest(given, choices) if isinstance(given, str) else None
        said = "no such value" + (f"; did you mean {near!r}?" if near else "")
    else:
        kind = KINDS.get(item["type"].split("_")[0])
        said = kind or item["msg"].removeprefix("Value error, ")
    works = known.working(field, near or given) if flag else None
    if works is None and choices:
        works = choices[0]
    if written or flag is None:
        named = f"{written}: {dotted}" if written else dotted
        fix = None if works is None or flag is None else _as_yaml(field, works, known)
    else:
        named = f"{flag} ({dotted})"
        shown = format(works, "g") if isinstance(works, float) else str(works)
        fix = None if works is None else f"{flag} {shlex.quote(shown)}"
    return _Mistake(f"{named}: {said}", SHORT.repr(given), ", ".join(choices) or None, fix)


def _as_yaml(place: Place, value: Any, known: Known) -> str:
    """The setting as it is written in a file, with the value that was given if it takes that."""
    *section, key = place
    works = known.working(place, value) if place in known.flags and value is not None else None
    same = works is value or (isinstance(value, str | int | float) and works == str(value))
    if works is None or isinstance(works, dict) or not same:
        shown = f"{{{key}: …}}" if section else f"{key}: …"
    else:
        shown = yaml.safe_dump(
            {key: works}, default_flow_style=bool(section), allow_unicode=True, width=10_000
        ).strip()
    return f"{section[0]}: {shown}" if section else shown


def _meant(place: Place, known: Known) -> Place | None:
    """Where what was meant lives: of that name elsewhere, by the name that others give it, near in
    its section, near anywhere."""
    word = plain(place[-1])
    every: dict[str, Place] = {
        name: tuple(dotted.split(".")) for name, dotted in USUAL_NAMES.items()
    }
    for there, flag in known.flags.items():
        every |= {".".join(there): there, plain(flag): there}
    for there in reversed(list(known.flags)):
        every[there[-1]] = there
    inside = place[0] if len(place) > 1 and place[0] in known.sections else ""
    for name in (f"{inside}.{word}", word):
        if name in every:
            return every[name]
    near = nearest(word, known.sections[inside])
    if near:
        return (inside, near) if inside else (near,)
    near = nearest(word, every)
    return every[near] if near else None
