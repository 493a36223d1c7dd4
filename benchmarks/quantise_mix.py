"""`python -m benchmarks.quantise_mix`: our quantised files against `llama_model_quantize`'s.

Random models of every architecture at shapes where the mixes take their turns; every file must be
the same byte for byte, header and all. What llama.cpp wrote is recorded as one digest a file, so
that the suite holds our choice of types to it where llama-cpp-python is not installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import oracles, record

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
ORACLE = Path(__file__).parent / "llama_cpp_python.py"
THREADS = 2


def quantise_by_llama_cpp(jobs: list[list[Any]]) -> list[float]:
    """Run the oracle on [source, target, ftype, threads]; seconds of each."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        json.dump(jobs, request)
        request.flush()
        done = subprocess.run(
            [str(oracles.llama_cpp_python()), str(ORACLE), "quantise", request.name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the oracle failed: {done.stderr[-2000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> bool:
    """Quantise every case in every type with both; write the figures and the oracle's digests."""
    from gguf_tiny import NUMBERS, data_digest, mix_cases, types_digest, write_tiny

    from tsugiki.formats.gguf_file import open_gguf
    from tsugiki.formats.mixes import KINDS
    from tsugiki.formats.quantise import quantise_file

    types: dict[str, dict[str, str]] = {}
    numbers: dict[str, str] = {}
    equal: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    cases = mix_cases() | {"numbers": NUMBERS}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for case, tiny in cases.items():
            source = place / "source.gguf"
            write_tiny(source, tiny)
            theirs = {name: place / f"theirs.{name}.gguf" for name in KINDS}
            quantise_by_llama_cpp(
                [
                    [str(source), str(theirs[n]), kind.file_type, THREADS]
                    for n, kind in KINDS.items()
                ]
            )
            types[case] = {}
            for name in KINDS:
                ours = place / "ours.gguf"
                quantise_file(source, ours, name, THREADS)
                same = ours.read_bytes() == theirs[name].read_bytes()
                written = open_gguf(theirs[name])
                found = {n: info.type.name for n, info in written.tensors.items()}
                types[case][name] = types_digest(found)
                if case == "numbers":
                    numbers[name] = data_digest(written)
                equal[tiny.arch, name] += same
                total[tiny.arch, name] += 1
                if not same:
                    print(f"DIFFERENT: {case} in {name}: {Counter(found.values())}")
                del written
                ours.unlink()
                theirs[name].unlink()
            print(f"{case}: {len(KINDS)} types", flush=True)
    figures = {"files": float(total.total()), "byte-identical files": float(equal.total())}
    figures["share"] = equal.total() / total.total()
    return record.write(
        "quantise_mix", "python -m benchmarks.quantise_mix", figures, {"share": ">= 1"},
        table={
            arch: {n: f"{equal[arch, n]} of {total[arch, n]}" for n in KINDS}
            for arch in dict.fromkeys(tiny.arch for tiny in cases.values())
        },
        types=types, numbers=numbers,
        oracle=f"llama-cpp-python {oracles.LLAMA_CPP_PYTHON}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
