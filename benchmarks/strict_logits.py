"""`python -m benchmarks.strict_logits`: logits of our llama.cpp process against llama-cpp-python's.

Random models of every architecture, plain and quantised, with and without an adapter; the same
strict settings on both sides, and two builds of llama.cpp with the same instruction sets: equal to
the bit. (Rank 8: with ranks 2 and 4, shorter than a vector register, the two compilers sum a dot
product's tail in another order, 5e-6 of the logits' spread in F32.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import oracles, record

TESTS = Path(__file__).parent.parent / "tests"
sys.path.insert(0, str(TESTS))
ORACLE = Path(__file__).parent / "llama_cpp_python.py"
KINDS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


def main() -> bool:
    """Both sides on the same files; write the largest differences."""
    from gguf_tiny import ARCHITECTURES, VOCABULARY, Tiny, write_lora, write_tiny

    from tsugiki.formats.llama_cpp.process import LlamaCpp
    from tsugiki.formats.quantise import quantise_file

    random = np.random.default_rng(0)
    prompts = [[int(i) for i in random.integers(0, VOCABULARY, n)] for n in (1, 7, 40, 200)]
    requests: list[dict[str, Any]] = []
    names: list[tuple[str, str]] = []
    ours: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as temporary, LlamaCpp(threads=2) as llama:
        place = Path(temporary)
        for arch in ARCHITECTURES:
            source, lora = place / f"{arch}.gguf", place / f"{arch}.lora.gguf"
            tiny = Tiny(arch, hidden=256, inner=512, layers=3, tied=arch.startswith("gemma"))
            tensors = write_tiny(source, tiny, spread=0.1)
            inner = {n: w.shape for n, w in tensors.items() if w.ndim == 2 and "blk" in n}
            write_lora(lora, arch, inner, rank=8)
            for kind in KINDS:
                path = place / f"{arch}.{kind}.gguf"
                quantise_file(source, path, kind, threads=2)
                for adapter in (None, lora):
                    requests.append({
                        "gguf": str(path), "lora": str(adapter) if adapter else None,
                        "scale": 0.1, "prompts": prompts, "threads": 2,
                    })  # fmt: skip
                    names.append((arch, kind + (" + adapter" if adapter else "")))
                    ours.append(
                        np.concatenate(llama.logits(path, prompts, lora=adapter, scale=0.1))
                    )
        request = place / "requests.json"
        request.write_text(json.dumps(requests))
        subprocess.run(
            [str(oracles.llama_cpp_python()), str(ORACLE), "logits", str(request), str(place)],
            check=True, stderr=subprocess.DEVNULL, env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )  # fmt: skip
        table: dict[str, dict[str, float]] = {arch: {} for arch in ARCHITECTURES}
        same, spreads = 0, []
        for number, ((arch, name), found) in enumerate(zip(names, ours, strict=True)):
            theirs = np.load(place / f"{number}.npy")
            difference = float(np.abs(found - theirs).max() / theirs.std())
            table[arch][name] = float(f"{difference:.3g}")
            same += int(np.array_equal(found, theirs))
            spreads.append(float(theirs.std()))
    worst = max(max(row.values()) for row in table.values())
    figures = {
        "files": float(len(names)), "equal to the bit": float(same),
        "smallest spread of logits": min(spreads),
        "largest difference / spread": worst,
    }  # fmt: skip
    bounds = {
        "equal to the bit": f">= {len(names)}", "smallest spread of logits": ">= 1",
    }  # fmt: skip
    return record.write(
        "strict_logits", "python -m benchmarks.strict_logits", figures, bounds, table=table,
        oracle=f"llama-cpp-python {oracles.LLAMA_CPP_PYTHON}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
