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


def kills_in_saves(place: Path, most: int | None) -> bool:
    """One run killed at each step inside its saves, or at some of every kind."""
    import runs

    runs.make_place(place, runs.forked)
    fail_points.go_on_stopped(place)
    points = [p for start in ("fresh", "again") for p in fail_points.all_points(place, start)]
    chosen = points if most is None else fail_points.spread(points, most)
    print(f"{len(points)} steps inside saves, {len(chosen)} of them to be killed at", flush=True)
    good: collections.Counter[str] = collections.Counter()
    for point in chosen:
        try:
            fail_points.survive(place, point)
            good[point.kind] += 1
            print(f"ok   {point}", flush=True)
        except AssertionError as error:
            print(f"LOST {point}: {str(error)[:2000]}", flush=True)
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
    parser.add_argument("--fail-points", type=int, help="at most; 0: none; default: every one")
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    holds = True
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.kills:
            holds = random_kills(Path(temporary) / "random", arguments.kills)
        if arguments.fail_points != 0:
            holds = kills_in_saves(Path(temporary) / "saves", arguments.fail_points) and holds
    return holds


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
