"""Times one LoRA step: ours, PEFT as a user gets it, PEFT tuned by hand, and the floor of products.

    python -m benchmarks.step --shape qwen2.5-0.5b --against peft,peft-tuned,floor [--json]

Every contestant runs in fresh processes, in turn (A B A B), on random weights with all tokens
labelled; medians. Correctness gates come first. The floor is 4·N·T over the best rate that any of
the model's very products reaches, warm and written with out=, in any of these processes; a step
that beats it fails the benchmark. Knows no data and no training loop.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parent.parent
CONTESTANTS = (
    "ours", "ours-dry", "ours-torch", "ours-plain", "ours-int8", "ours-nf4",
    "peft", "peft-dry", "peft-tuned", "peft-fp32", "products",
)  # fmt: skip
DROPOUT = 0.05
FLOORS = ("floor", "floor-int8")
DESCRIPTIONS = {
    "ours": f"tsugiki, bf16, dropout {DROPOUT}",
    "ours-dry": "tsugiki, bf16, dropout 0",
    "ours-torch": f"tsugiki without a compiler: plain torch kernels, dropout {DROPOUT}",
    "ours-plain": "tsugiki without replaced modules, bf16, dropout 0",
    "ours-nf4": f"tsugiki --quantize nf4, dropout {DROPOUT}",
    "ours-int8": f"tsugiki --compute int8, dropout {DROPOUT}",
    "peft": f"PEFT as a user gets it: bf16 base, fp32 adapters, dropout {DROPOUT}",
    "peft-dry": "the same with dropout 0",
    "peft-tuned": "PEFT tuned: bf16 adapters, dropout 0, pages kept, layers compiled",
    "peft-fp32": f"PEFT in fp32, dropout {DROPOUT}",
    "products": "nothing but the frozen products of a step, by torch, with out=",
}

# What this project set itself for Qwen2.5-0.5B's shape on two cores; missed ones are printed too.
TARGETS = {
    "ours-dry/floor": "<= 1.25", "peft/ours": ">= 2.5", "peft-tuned/ours": ">= 1.2",
    "peft-fp32/ours": ">= 5", "rss ours/peft": "<= 0.45", "dropout/dry": "<= 1.05",
    "ours-nf4/ours": "<= 1.12", "ours-int8/ours": "<= 0.75", "ours-int8/floor": "<= 1",
}  # fmt: skip


def main() -> int:
    """Parse, run the gates, then the contestants in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument(
        "--against",
        default="products,ours-torch,ours-nf4,ours-int8,peft,peft-tuned,peft-fp32,floor",
        help="peers, by commas",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: with --threads 1, what a busy machine cannot blur",
    )
    parser.add_argument(
        "--no-tile-registers",
        action="store_true",
        help="as on a CPU with bf16 in vectors alone (AVX512-BF16), for all contestants",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", help="write the figures to benchmarks/results/NAME.json")
    parser.add_argument("--no-gates", action="store_true", help="skip the correctness gates")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        sys.exit("--clock cpu counts the waiting of threads: use --threads 1 with it")
    if options.worker:
        from benchmarks.contestants import run

        print("RESULT " + json.dumps(run(options)), flush=True)
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    """All contestants in turn; the table or JSON; 1 where a gate or the floor fails."""
    peers = [name for name in options.against.split(",") if name and name != "floor"]
    names = list(dict.fromkeys(["ours", "ours-dry", *peers]))
    for name in names:
        if name not in CONTESTANTS:
            sys.exit(f"unknown contestant {name}: one of {', '.join(CONTESTANTS)}, floor")
    quiet = options.json
    before = record.machine()
    if not quiet:
        print(f"{before['cpu']}, {options.threads} threads of {before['cores']}, "
              f"torch {before['torch']}, {options.clock} time, load {before['load']:.1f} before",
              flush=True)  # fmt: skip
    gates = {} if options.no_gates else _worker("gates", options)
    failed = [name for name, gate in gates.items() if not gate["holds"]]
    if not quiet:
        for name, gate in gates.items():
            print(f"gate {name}: {'holds' if gate['holds'] else 'FAILS'} {gate['figures']}")
    if failed:
        print(f"correctness first: {', '.join(failed)} failed", file=sys.stderr)
        return 1
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            result = _worker(name, options)
            runs[name].append(result)
            if not quiet:
                seconds = ", ".join(f"{s:.2f}" for s in result["seconds"])
                print(f"  round {turn + 1} {name}: {seconds} s", flush=True)
    report = summarise(runs, options)
    report["parts"] = where_it_goes(names, options)
    report["machine"] = {**before, "load_after": os.getloadavg()[0]}
    report["gates"] = gates
    beaten = [
        name for name, row in report["rows"].items()
        if name not in FLOORS and min(row["all"]) < report["rows"][floor_of(name)]["step"]
    ]  # fmt: skip
    if quiet:
        print(json.dumps(report, indent=1))
    else:
        print(table(report))
        print(f"load {os.getloadavg()[0]:.1f} after")
    if beaten:
        print(f"faster than the floor, so something is wrong: {beaten}", file=sys.stderr)
        return 1
    if options.record:
        command = f"python -m benchmarks.step {' '.join(sys.argv[1:])}"
        record.write(options.record, command, report["ratios"], {}, targets=TARGETS, report=report)
    return 0


def where_it_goes(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by part, for those of ours that compute in compiled bodies; and what int8
    could save at most: its products in half of the time, and rounding for nothing."""
    found: dict[str, Any] = {}
    for name in names:
        if name in ("ours", "ours-dry", "ours-int8"):
            found[name] = _worker(name, options, "--parts")
    if "ours-int8" in found:
        parts, share = found["ours"]["parts"], found["ours-int8"]["int8_share"]
        products = parts["frozen products"] + parts["head and loss"]
        found["ours-int8"]["at best / ours"] = 1 - share / 2 * products / parts["step"]
    return found


def _worker(name: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.step", "--worker", name, *more]
    for key in ("shape", "layers", "vocab", "rows", "length", "steps", "threads", "clock"):
        value = getattr(options, key)
        if value is not None:
            command += [f"--{key}", str(value)]
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if options.no_tile_registers:
        env["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"  # torch's products
        env["TSUGIKI_CXXFLAGS"] = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    if name == "peft-tuned":  # what tcmalloc would give: memory that is kept
        env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert isinstance(result, dict)
    return result


def summarise(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Rows by name (medians) and the ratios between them."""
    tokens = options.rows * options.length
    any_run = next(iter(runs.values()))[0]
    rates = {
        size: max(result["rates"][size] for results in runs.values() for result in results)
        for size in any_run["rates"]
    }
    rate = max(rates.values())
    usual = {
        size: statistics.median(
            r["usual_rates"][size] for results in runs.values() for r in results
        )
        for size in rates
    }
    flops = 4 * any_run["weights"] * tokens
    floor = flops / rate
    parts = {
        size: {
            "count": any_run["counts"][size],
            "gflops": rates[size] / 1e9,
            "usual_gflops": usual[size] / 1e9,
            "seconds": 4 * tokens * any_run["counts"][size] * _cells(size) / rates[size],
        }
        for size in rates
    }
    rows: dict[str, Any] = {}
    for name, results in runs.items():
        every = [s for result in results for s in result["seconds"]]
        step = statistics.median(every)
        rows[name] = {
            "what": DESCRIPTIONS[name],
            "step": step,
            "spread": (max(every) - min(every)) / step,
            "all": every,
            "peak_rss": max(result["peak_rss"] for result in results),
            "loaded_rss": max(result["loaded_rss"] for result in results),
            "page_faults": statistics.median(result["page_faults"] for result in results),
            "tokens_per_second": tokens / step,
            "note": results[0].get("note", ""),
        }
    rows["floor"] = {
        "what": f"4·N·T over {rate / 1e9:.0f} GFLOP/s",
        "step": floor,
        "tokens_per_second": tokens / floor,
        "parts": parts,
        "sum_of_parts": sum(p["seconds"] for p in parts.values()),
        # where a processor is lent by the moment, its best moment says little of a minute
        "at_usual_rates": sum(
            4 * tokens * p["count"] * _cells(n) / usual[n] for n, p in parts.items()
        ),
        "full_flops_share": any_run["full_flops"] / flops,
    }
    ratios = {}
    for name in runs:
        ratios[f"{name}/floor"] = rows[name]["step"] / floor
        if name.startswith("peft"):
            ours = "ours-dry" if name in ("peft-tuned", "peft-dry") else "ours"
            ratios[f"{name}/ours"] = rows[name]["step"] / rows[ours]["step"]
    ratios["dropout/dry"] = rows["ours"]["step"] / rows["ours-dry"]["step"]
    if "peft" in rows:
        ratios["rss ours/peft"] = rows["ours"]["peak_rss"] / rows["peft"]["peak_rss"]
    if "products" in rows:
        ratios["ours-dry/products"] = rows["ours-dry"]["step"] / rows["products"]["step"]
        if "ours-int8" in rows:
            ratios["ours-int8/products"] = rows["ours-int8"]["step"] / rows["products"]["step"]
    if "ours-nf4" in rows:
        ratios["ours-nf4/ours"] = rows["ours-nf4"]["step"] / rows["ours"]["step"]
    if "ours-torch" in rows:
        ratios["ours-torch/ours"] = rows["ours-torch"]["step"] / rows["ours"]["step"]
    if "ours-int8" in rows:
        ratios["ours-int8/ours"] = rows["ours-int8"]["step"] / rows["ours"]["step"]
        best = max(max(result["int8_rates"].values()) for result in runs["ours-int8"])
        rows["floor-int8"] = {
            "what": f"4·N·T over {best / 1e9:.0f} GOP/s of int8 codes",
            "step": flops / best,
            "tokens_per_second": tokens * best / flops,
        }
    return {"shape": options.shape, "layers": options.layers, "vocab": options.vocab,
            "tokens": tokens, "clock": options.clock, "rows": rows, "ratios": ratios}  # fmt: skip


def floor_of(name: str) -> str:
    """Which floor a contestant cannot beat; fp32 is far above either."""
    return "floor-int8" if name == "ours-int8" else "floor"


def _cells(size: str) -> int:
    out, width = size.split("x")
    return int(out) * int(width)


def table(report: dict[str, Any]) -> str:
    """The rows and ratios for a terminal."""
    lines = [
        f"{'':12s} {'step':>8s} {'spread':>7s} {'tokens/s':>9s} {'peak RSS':>9s} {'faults':>9s}"
    ]
    for name, row in report["rows"].items():
        if name == "floor-int8":
            lines.append(f"{name:12s} {row['step']:7.2f}s {'':7s} {row['tokens_per_second']:9.0f}"
                         f"   {row['what']}")  # fmt: skip
        elif name == "floor":
            lines.append(f"{name:12s} {row['step']:7.2f}s {'':7s} {row['tokens_per_second']:9.0f}"
                         f"   {row['what']}; sum of parts {row['sum_of_parts']:.2f}s;"
                         f" at median rates {row['at_usual_rates']:.2f}s;"
                         f" full FLOPs {row['full_flops_share']:.2f}×")  # fmt: skip
        else:
            lines.append(f"{name:12s} {row['step']:7.2f}s {row['spread']:6.0%}"
                         f" {row['tokens_per_second']:9.0f} {row['peak_rss'] / 1e9:7.2f}GB"
                         f" {row['page_faults']:9.0f}   {row['what']} {row['note']}")  # fmt: skip
    for size, part in report["rows"]["floor"]["parts"].items():
        lines.append(f"  {part['count']:4d} × {size:14s} {part['gflops']:6.0f} GFLOP/s"
                     f" (median {part['usual_gflops']:.0f})"
                     f" {part['seconds']:7.2f}s")  # fmt: skip
    for name, found in report["parts"].items():
        parts = sorted(found["parts"].items(), key=lambda part: -part[1])
        said = ", ".join(
            f"{part} {value:.2f}" for part, value in parts if value >= 0.01 and part != "step"
        )
        lines.append(f"where {name}'s seconds go: {said}")
        if "at best / ours" in found:
            lines.append(f"  int8 for {found['int8_share']:.0%} of the frozen products: at best"
                         f" {found['at best / ours']:.2f} of ours, were rounding free")  # fmt: skip
    for name, value in report["ratios"].items():
        aim = TARGETS.get(name)
        lines.append(f"{name} = {value:.2f}" + (f"   (aim {aim})" if aim else ""))
    return "\n".join(lines)


def peak_rss() -> int:
    """Bytes: the most this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page_faults() -> int:
    """Pages touched for the first time since they were mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def clock_of(kind: str) -> Callable[[], float]:
    """Seconds of wall time, or of this process's own work."""
    return time.process_time if kind == "cpu" else time.perf_counter


if __name__ == "__main__":
    sys.exit(main())
