"""`python -m benchmarks.kills`: kill −9 in training, and what the run gives that goes on after it.

50 at random moments: each run of a tiny model is killed twice, at the parent, the child or the
whole group, by real commands (kills.json). And before every step of writing inside its saves, of
an adapter and of checkpoints, new ones and replaced ones (fail_points.json). What a run ends with,
weights, optimiser and records, must equal the uninterrupted run's byte for byte.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import fail_points, record

TESTS = Path(__file__).parent.parent / "tests"


def random_kills(place: Path, kills: int) -> bool:
    """The suite's own kill test with many seeds."""
    import pytest
    import test_training_resume as tests

    good = 0
    tests.make_place(place)
    for seed in range(1000, 1000 + kills // 2):
        try:
            tests.kill_twice(place, seed, tests.command)
            good += 2
        except (AssertionError, pytest.fail.Exception) as error:
            print(f"seed {seed}: {error}")
        print(f"{good} kills recovered to the same bytes", flush=True)
    figures = {"kills": float(kills), "recovered to the same bytes": float(good)}
    bounds = {"recovered to the same bytes": f"== {kills}"}
    command = f"python -m benchmarks.kills --kills {kills} --fail-points 0"
    return record.write("kills", command, figures, bounds)


def kills_in_saves(place: Path, most: int | None, jobs: int) -> bool:
    """One run killed at each step inside its saves, or at some of every kind."""
    points = fail_points.make_place(place)
    chosen = points if most is None else fail_points.spread(points, most)
    print(f"{len(points)} steps inside saves, {len(chosen)} of them to be killed at", flush=True)

    def survives(point: fail_points.Point) -> bool:
        try:
            fail_points.survive(place, point)
        except AssertionError as error:
            print(f"LOST {point}: {str(error)[:2000]}", flush=True)
            return False
        print(f"ok   {point}", flush=True)
        return True

    with ThreadPoolExecutor(jobs) as pool:  # each waits for processes of its own
        kept = list(pool.map(survives, chosen))
    good = collections.Counter(p.kind for p, whole in zip(chosen, kept, strict=True) if whole)
    figures = {
        "steps inside saves": float(len(points)),
        "fail points": float(len(chosen)),
        "fail points recovered": float(good.total()),
        **{f"recovered, {kind}": float(good[kind]) for kind in sorted({p.kind for p in chosen})},
    }
    bounds = {"fail points": ">= 20", "fail points recovered": f"== {len(chosen)}"}
    command = "python -m benchmarks.kills --kills 0"
    command += "" if most is None else f" --fail-points {most}"
    where = [f"{p.start} {p.save}: {p.kind} {p.nth}, {p.what}" for p in chosen]
    return record.write("fail_points", command, figures, bounds, killed_at=where)


def main() -> bool:
    """What was asked for; both by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="at random moments; 0: none")
    parser.add_argument("--jobs", type=int, default=2, help="fail points at a time")
    parser.add_argument("--fail-points", type=int, help="at most; 0: none; default: every one")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    holds = True
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.kills:
            holds = random_kills(Path(temporary) / "random", arguments.kills)
        if arguments.fail_points != 0:
            place = Path(temporary) / "saves"
            holds = kills_in_saves(place, arguments.fail_points, arguments.jobs) and holds
    return holds


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
