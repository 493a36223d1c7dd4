"""`python -m benchmarks.hostile_gguf`: 10,000 damaged GGUF files, read by us and run by llama.cpp.

Mutants of small models of every architecture, plain and quantised, go through our reader with
every value decoded: each is read or refused by a ModelError, and the slowest and the greediest are
recorded. Of those that our reader lets pass, a sample goes on to llama.cpp in its process, where
whatever happens must come back as logits or as an error of ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks import record

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
MEGABYTE = 1 << 20


def peak_bytes() -> int:
    """The most memory this process has had at once since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this proof needs Linux")


def forget_peak() -> int:
    """Start counting anew; returns the memory of now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def good_files(place: Path) -> list[bytes]:
    """Small models of every architecture, as F32, F16 and K-quants."""
    from gguf_tiny import ARCHITECTURES, Tiny, write_tiny

    from tsugiki.formats.quantise import quantise_file

    found = []
    for number, arch in enumerate(ARCHITECTURES):
        plain, small = place / f"{arch}.gguf", place / f"{arch}.small.gguf"
        write_tiny(plain, Tiny(arch, hidden=256, inner=256, layers=1, dtype="F16"))
        quantise_file(plain, small, ("q4_k_m", "q2_k", "q5_0", "q8_0")[number % 4], threads=2)
        found += [plain.read_bytes(), small.read_bytes()]
    return found


def main() -> bool:
    """Read all, run a sample, write the figures."""
    from gguf_hostile import KINDS, at_the_limits, mutants

    from tsugiki.errors import TsugikiError
    from tsugiki.formats.gguf_file import open_gguf
    from tsugiki.formats.llama_cpp.process import LlamaCpp

    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--run", type=int, default=500, help="how many of them llama.cpp sees")
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    slowest = waited = greediest = 0.0
    passed: list[bytes] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        wholes = good_files(place)
        path = place / "mutant.gguf"
        each = -(-arguments.mutants // len(wholes))
        cases = [(m, None) for n, whole in enumerate(wholes) for m in mutants(whole, each, n)]
        limits = [(content, None) for content in at_the_limits()]
        for content, words in [*KINDS.values(), *limits, *cases[: arguments.mutants]]:
            path.write_bytes(content)
            before, began, used = forget_peak(), time.monotonic(), time.process_time()
            try:
                file = open_gguf(path)
                for key in file.metadata:
                    _ = file.metadata[key]
                for name in file.tensors:
                    file.values(name)
                del file
                outcomes["read"] += 1
                passed.append(content)
            except TsugikiError as error:
                outcomes["refused" if (words or "") in str(error) else "misnamed"] += 1
            except Exception as error:
                outcomes["broken"] += 1
                print(f"{type(error).__name__}: {error}")
            slowest = max(slowest, time.process_time() - used)
            waited = max(waited, time.monotonic() - began)
            greediest = max(greediest, peak_bytes() - before)
        chosen = np.random.default_rng(0).permutation(len(passed))[: arguments.run]
        longest = 0.0
        with LlamaCpp(threads=1, memory=1024 * MEGABYTE, silence=20) as llama:
            for index in chosen:
                path.write_bytes(passed[index])
                began = time.monotonic()
                try:
                    llama.logits(path, [[1, 5, 9]])
                    outcomes["ran"] += 1
                except TsugikiError as error:
                    crashed = "llama.cpp ended" in str(error)
                    outcomes["crashed, and said so" if crashed else "refused by llama.cpp"] += 1
                except Exception as error:
                    outcomes["broken"] += 1
                    print(f"{type(error).__name__}: {error}")
                longest = max(longest, time.monotonic() - began)
    figures = {
        "files": float(outcomes["read"] + outcomes["refused"] + outcomes["misnamed"]),
        "not an error of ours": float(outcomes["broken"]),
        "named otherwise": float(outcomes["misnamed"]),
        "slowest, processor s": slowest,
        "slowest s": waited,
        "greediest MB": greediest / 1e6,
        "run by llama.cpp": float(len(chosen)),
        "longest run s": longest,
    }
    bounds = {
        "files": f">= {arguments.mutants}", "not an error of ours": "== 0",
        "named otherwise": "== 0", "slowest, processor s": "<= 2", "greediest MB": "<= 200",
    }  # fmt: skip
    command = (
        f"python -m benchmarks.hostile_gguf --mutants {arguments.mutants} --run {arguments.run}"
    )
    return record.write("hostile_gguf", command, figures, bounds, outcomes=dict(outcomes))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(0 if main() else 1)
