"""Reads docs/promises.md and says which promises have no proof. Knows no pytest.

A row is `| promise | proof | measured |`. A proof is one of
  suite: tests/test_x.py::test_y     all its cases ran and passed in this session, or were skipped
                                    with a reason, one at least passed (a file, too: all its tests)
  prove: COMMAND → FILE             a result under benchmarks/results/ that says it holds
  device: COMMAND → FILE            the same on a GPU; FILE may be `not yet measured`
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

RESULT_KEYS = ("command", "commit", "date", "machine", "figures", "bounds", "holds")


@dataclass(frozen=True)
class Promise:
    text: str
    kind: str
    proof: str
    result: str | None
    line: int


def read_promises(page: Path) -> list[Promise]:
    """Every row of every table of the page; a row whose proof cannot be read is an error."""
    found = []
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 3 or cells[0] == "promise" or set(cells[0]) <= {"-", ":"}:
            continue
        for proof in cells[1].split("<br>"):
            match = re.fullmatch(r"(suite|prove|device): `([^`]+)`(?: → (.+))?", proof.strip())
            if match is None:
                raise ValueError(f"{page.name}:{number}: cannot read the proof {proof!r}")
            kind, command, result = match.groups()
            found.append(
                Promise(cells[0], kind, command, result.strip("`") if result else None, number)
            )
    return found


@dataclass
class Session:
    """What became of every case of a test session: collected, passed, failed, skipped and why."""

    collected: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)


def unproven(promises: list[Promise], session: Session, root: Path) -> list[str]:
    """What is promised and not proven, one line each."""
    problems = []
    for promise in promises:
        where = f"line {promise.line}: {promise.text[:60]}"
        if promise.kind == "suite":
            problems.extend(f"{where}: {why}" for why in unproven_by_suite(promise.proof, session))
        elif promise.result == "not yet measured":
            if promise.kind != "device":
                problems.append(f"{where}: only a device may be not yet measured")
        else:
            problems.extend(f"{where}: {why}" for why in check_result(promise.result, root))
    return problems


def unproven_by_suite(proof: str, session: Session) -> list[str]:
    """Why a test proves nothing; empty when it does."""
    known = session.collected | session.passed | session.failed | set(session.skipped)
    mine = {one for one in known if one == proof or one.startswith((proof + "[", proof + "::"))}
    failed = sorted(mine & session.failed)
    if failed:
        return [f"{proof} failed ({len(failed)} of {len(mine)} cases, first {failed[0]})"]
    if not mine & session.passed:
        return [f"{proof} did not run and pass"]
    left = sorted(one for one in mine - session.passed if not session.skipped.get(one))
    if left:
        return [f"{proof}: {len(left)} of {len(mine)} cases did not pass, first {left[0]}"]
    return []


def check_result(name: str | None, root: Path) -> list[str]:
    """Why a committed result does not prove anything; empty when it does."""
    if not name:
        return ["names no result file"]
    path = root / "benchmarks" / "results" / name
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{name}: {error}"]
    missing = [key for key in RESULT_KEYS if key not in result]
    if missing:
        return [f"{name} lacks {', '.join(missing)}"]
    outside = [
        f"{name}: {key} is {result['figures'].get(key)}, bound {bound}"
        for key, bound in result["bounds"].items()
        if not within(result["figures"].get(key), bound)
    ]
    if not result["holds"]:
        outside.append(f"{name} says it does not hold")
    return outside


def within(value: object, bound: str) -> bool:
    """Whether a figure keeps a bound such as '<= 0.02' or '== 50'."""
    if not isinstance(value, int | float):
        return False
    operator, limit = bound.split()
    compare = {
        "<=": value <= float(limit),
        ">=": value >= float(limit),
        "==": value == float(limit),
    }
    return compare[operator]
