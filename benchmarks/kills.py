"""`python -m benchmarks.kills`: 50 kill −9 at random moments, and what the resumed run gives.

Each run of a tiny model is killed twice, at the parent, the child or the whole group, then resumed
to its end, by real commands; its adapter must equal the uninterrupted run's byte for byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import record

TESTS = Path(__file__).parent.parent / "tests"


def main() -> bool:
    """Run the suite's own kill test with many seeds."""
    import pytest

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import test_training_resume as tests

    good = 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        tests.make_place(place)
        for seed in range(1000, 1000 + arguments.kills // 2):
            try:
                tests.kill_twice(place, seed, tests.command)
                good += 2
            except (AssertionError, pytest.fail.Exception) as error:
                print(f"seed {seed}: {error}")
            print(f"{good} kills recovered to the same bytes", flush=True)
    figures = {"kills": float(arguments.kills), "recovered to the same bytes": float(good)}
    bounds = {"recovered to the same bytes": f"== {arguments.kills}"}
    command = f"python -m benchmarks.kills --kills {arguments.kills}"
    return record.write("kills", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
