"""`python -m benchmarks.quantise_speed`: quantising against llama.cpp's own, with equal threads.

A Llama of 142 million random weights in F16, quantised by both in turn, several times; the best of
each counts. Ours is the whole call: the process's start, fsync, rename and reading back included.
Theirs is llama_model_quantize alone, in a process that is already there, and without fsync.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.quantise_mix import TESTS, quantise_by_llama_cpp

sys.path.insert(0, str(TESTS))


def cpu_seconds() -> float:
    """Processor time of all ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> bool:
    """Both, in turn; write the ratios."""
    from gguf_tiny import Tiny, write_tiny

    from tsugiki.device import usable_cores
    from tsugiki.formats.mixes import KINDS
    from tsugiki.formats.quantise import quantise_file

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    bounds: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        source, target = place / "source.gguf", place / "target.gguf"
        write_tiny(source, Tiny("llama", 1024, 2816, 12, 16, 8, dtype="F16"))
        figures["source MB"] = source.stat().st_size / 1e6
        for kind in ("q8_0", "q6_k", "q4_k_m"):
            ours, theirs, our_cpu, their_cpu = [], [], [], []
            for _ in range(arguments.rounds):
                began, used = time.monotonic(), cpu_seconds()
                quantise_file(source, target, kind, arguments.threads)
                ours.append(time.monotonic() - began)
                our_cpu.append(cpu_seconds() - used)
                target.unlink()
                used = cpu_seconds()
                job = [str(source), str(target), KINDS[kind].file_type, arguments.threads]
                theirs += quantise_by_llama_cpp([job])
                their_cpu.append(cpu_seconds() - used)
                target.unlink()
            figures |= {
                f"{kind} s": min(ours), f"{kind} s, llama.cpp": min(theirs),
                f"{kind} ratio": min(ours) / min(theirs),
                f"{kind} processor time ratio": min(our_cpu) / min(their_cpu),
            }  # fmt: skip
            bounds[f"{kind} ratio"] = "<= 1.05"
    command = f"python -m benchmarks.quantise_speed --rounds {arguments.rounds}"
    return record.write("quantise_speed", command, figures, bounds, threads=arguments.threads)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
