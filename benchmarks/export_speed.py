"""`python -m benchmarks.export_speed`: time and memory of exporting a large random model as f16.

A bf16 Llama of the asked size in 1 GB shards, alone and with an adapter of rank 16 on every
projection, each in a process of its own whose anonymous memory is watched; against copying the
same bytes (read, write, fsync), with the base in the page cache as far as it fits.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import merge_memory, record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

EXPORT = """
import json, sys, time
from pathlib import Path
began = time.monotonic()
from tsugiki.adapters.joined import join
from tsugiki.exporting.gguf import plan_export, write_gguf
adapter = Path(sys.argv[3]) if len(sys.argv) > 3 else None
loaded = time.monotonic()
joined = join(Path(sys.argv[1]), adapter)
known = time.monotonic()
plan = plan_export(joined, "model")
planned = time.monotonic()
write_gguf(plan, "f16", Path(sys.argv[2]))
print(json.dumps({"import": loaded - began, "join": known - loaded, "plan": planned - known,
                  "write": time.monotonic() - planned}))
"""


def export_watched(base: Path, output: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Export in a child; seconds of its parts, and the most anonymous memory it had, in bytes."""
    command = [sys.executable, "-c", EXPORT, str(base), str(output)]
    return merge_memory.watched([*command, str(adapter)] if adapter else command, output.parent)


def main() -> bool:
    """Make, export, copy; write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, default=None, help="a place with 3 × the size free")
    arguments = parser.parse_args()
    from tokenizers_for_tests import tiny_tokenizer

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = Path(temporary)
        total = merge_memory.make_model(place / "base", arguments.gigabytes, 1_000_000_000)
        tiny_tokenizer().save_pretrained(place / "base")
        merge_memory.make_adapter(place / "base", place / "adapter")
        runs: dict[str, list[tuple[float, float, dict[str, Any]]]] = {"model": [], "adapter": []}
        for name, adapter in (("model", None), ("adapter", place / "adapter")) * 2:
            copied = merge_memory.copy_seconds(place / "base", place / "copy")
            shutil.rmtree(place / "copy")
            done = export_watched(place / "base", place / "a.gguf", adapter)
            (place / "a.gguf").unlink()
            runs[name].append(((done["plan"] + done["write"]) / copied, copied, done))
    largest = 4 * merge_memory.VOCABULARY * merge_memory.HIDDEN
    figures: dict[str, float] = {"model GB": total / 1e9}
    bounds = {}
    for name, tries in runs.items():
        ratio, copied, done = min(tries, key=lambda run: run[0])
        most = max(run[2]["anonymous"] for run in tries)
        figures |= {
            f"{name}: export / copy": ratio,
            f"{name}: write s": done["write"],
            f"{name}: plan s": done["plan"],
            f"{name}: copy s": copied,
            f"{name}: import s": done["import"],
            f"{name}: join s": tries[0][2]["join"],
            f"{name}: anonymous MB": most / 1e6,
            f"{name}: anonymous / bound": most / (3 * largest + 300e6),
        }
        bounds |= {f"{name}: export / copy": "<= 1.5", f"{name}: anonymous / bound": "<= 1"}
    command = f"python -m benchmarks.export_speed --gigabytes {arguments.gigabytes:g}"
    return record.write("export_speed", command, figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
