"""What a GPU runs once one is there: kernels judged, products timed, a LoRA step beside its peers.

    python -m benchmarks.gpu [--shape llama3-8b] [--against peft,peft-tuned,peft-nf4] [--record]
    python -m benchmarks.gpu --device cpu --shape tiny      # the same road with the plain bodies

Correctness first: every family of Triton kernels in bf16, fp16 and fp32, then adapter gradients and
50 steps of loss against fp32. Then each contestant in fresh processes, in turn (about a minute each
at 8B; --rounds 1 for a short lease); random weights, all tokens labelled; medians. The peak is the
best rate of the model's very products in any of these processes, and a step's share of it counts
4·N·T. A contestant that cannot run says why. Knows no contestant's inside
(`benchmarks/gpu_contestants.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parent.parent
DESCRIPTIONS = {
    "ours": "tsugiki, dropout 0.05",
    "ours-dry": "tsugiki, dropout 0",
    "ours-nf4": "tsugiki on an NF4 base, dropout 0.05",
    "ours-fp16": "tsugiki in float16 with a scaled loss, as on a T4",
    "peft": "PEFT as a user gets it: fp32 adapters, dropout 0.05",
    "peft-dry": "the same with dropout 0",
    "peft-tuned": "PEFT tuned: bf16 adapters, dropout 0, layers compiled",
    "peft-nf4": "PEFT on bitsandbytes' NF4 with double quantisation, dropout 0.05",
}
PEERS = {"peft": "ours", "peft-dry": "ours-dry", "peft-tuned": "ours-dry", "peft-nf4": "ours-nf4"}
TARGET = 0.6  # of the peak; the best published figure found is 0.41


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    made.add_argument("--against", default="peft,peft-tuned,peft-nf4", help="peers, by commas")
    made.add_argument("--ours", default="ours,ours-dry,ours-nf4,ours-fp16", help="rows of ours")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--rows", type=int, default=2)
    made.add_argument("--length", type=int, default=2048)
    made.add_argument("--rounds", type=int, default=2, help="processes of each contestant")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    made.add_argument("--budget", type=float, default=0.4, help="seconds for each timed product")
    made.add_argument("--json", action="store_true")
    made.add_argument("--record", action="store_true", help="write benchmarks/results/gpu.json")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    """All parts in turn; 1 where something is wrong."""
    options = parser().parse_args(arguments)
    names = [n for n in f"{options.ours},{options.against}".split(",") if n]
    unknown = [name for name in names if name not in DESCRIPTIONS]
    if unknown:
        sys.exit(f"unknown contestant {', '.join(unknown)}: one of {', '.join(DESCRIPTIONS)}")
    if options.worker:
        from benchmarks.gpu_contestants import run

        print("RESULT " + json.dumps(run(options)), flush=True)
        return 0
    machine = record.machine()
    if options.device == "cuda" and machine["gpu"] is None:
        sys.exit("no GPU here: --device cpu --shape tiny runs the same road with the plain bodies")
    kernels = _worker("kernels", options)
    gates = _worker("gates", options)
    products = _worker("products", options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names:
            result = _worker(name, options)
            runs[name].append(result)
            if not options.json:
                said = result.get("failed") or ", ".join(f"{s:.3f}" for s in result["seconds"])
                print(f"  round {turn + 1} {name}: {said}", flush=True)
    report = {
        "device": options.device, "machine": {**machine, "load_after": os.getloadavg()[0]},
        "kernels": kernels, "gates": gates, "products": products, **summarise(runs, options),
    }  # fmt: skip
    print(json.dumps(report, indent=1) if options.json else table(report))
    figures = figures_of(report)
    if options.record:
        command = "python -m benchmarks.gpu " + " ".join(sys.argv[1:])
        bounds = {"kernels wrong": "== 0", "gates failed": "== 0", "share of peak": f">= {TARGET}"}
        return 0 if record.write("gpu", command, figures, bounds, report=report) else 1
    return 0 if figures["kernels wrong"] == figures["gates failed"] == 0 else 1


def _worker(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", name]
    for key in ("device", "shape", "layers", "rows", "length", "steps", "budget"):
        value = getattr(options, key)
        if value is not None:
            command += [f"--{key}", str(value)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    paths = [str(ROOT / "src"), str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip() or f"ended with {done.returncode}")[-2000:]}
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert isinstance(result, dict)
    return result


def summarise(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Rows by name (medians), the peak, and the ratios between rows."""
    tokens = options.rows * options.length
    done = {name: [r for r in results if "failed" not in r] for name, results in runs.items()}
    half = [r for name, results in done.items() if name != "ours-fp16" for r in results]
    peak = max((max(r["rates"].values()) for r in half), default=0.0)
    rows: dict[str, Any] = {}
    for name, results in done.items():
        if not results:
            rows[name] = {"what": DESCRIPTIONS[name], "failed": runs[name][-1]["failed"]}
            continue
        every = [s for result in results for s in result["seconds"]]
        step = statistics.median(every)
        rows[name] = {
            "what": DESCRIPTIONS[name],
            "step": step,
            "spread": (max(every) - min(every)) / step,
            "all": every,
            "tokens_per_second": tokens / step,
            "share_of_peak": 4 * results[0]["weights"] * tokens / step / peak,
            "full_share": results[0]["full_flops"] / step / peak,
            **{
                key: max(result[key] for result in results)
                for key in ("allocated", "reserved", "loaded")
            },
            "note": results[0]["note"],
        }
    ratios = {}
    for name, ours in PEERS.items():
        if "step" in rows.get(name, {}) and "step" in rows.get(ours, {}):
            ratios[f"{name}/{ours}"] = rows[name]["step"] / rows[ours]["step"]
            ratios[f"memory {ours}/{name}"] = rows[ours]["allocated"] / rows[name]["allocated"]
    for one, other in (("ours", "ours-dry"), ("ours-nf4", "ours")):
        if "step" in rows.get(one, {}) and "step" in rows.get(other, {}):
            ratios[f"{one}/{other}"] = rows[one]["step"] / rows[other]["step"]
    return {"shape": options.shape, "tokens": tokens, "peak": peak, "rows": rows, "ratios": ratios}


def figures_of(report: dict[str, Any]) -> dict[str, float]:
    """What the bounds are about."""
    kernels, gates, rows = report["kernels"], report["gates"], report["rows"]
    wrong = ["failed"] if "failed" in kernels else kernels["wrong"]
    failed = ["failed"] if "failed" in gates else [n for n, g in gates.items() if not g["holds"]]
    shares = [row["share_of_peak"] for name, row in rows.items()
              if name in ("ours", "ours-dry") and "step" in row]  # fmt: skip
    return {
        "kernels wrong": float(len(wrong)),
        "gates failed": float(len(failed)),
        "share of peak": max(shares, default=0.0),
        **report["ratios"],
    }


def table(report: dict[str, Any]) -> str:
    """All parts for a terminal."""
    machine = report["machine"]
    on = machine["gpu"] if report["device"] == "cuda" else machine["cpu"]
    lines = [f"{on}, torch {machine['torch']}, shape {report['shape']}, {report['tokens']} tokens"]
    kernels = report["kernels"]
    for type_, families in kernels.get("reasons", {}).items():
        lines += [f"  {type_} {family}: {said or 'proven'}" for family, said in families.items()]
    for name, gate in report["gates"].items():
        if isinstance(gate, dict):
            lines.append(f"gate {name}: {'holds' if gate['holds'] else 'FAILS'} {gate['figures']}")
    lines += [f"{part}: {report[part]['failed']}" for part in ("kernels", "gates", "products")
              if "failed" in report[part]]  # fmt: skip
    lines.append(f"{'product (out x in)':20s} {'plain':>9s} {'+ term':>9s} {'fused':>9s}  ms")
    for size, times in report["products"].get("rows", {}).items():
        fused = f"{times['fused']:9.3f}" if times["fused"] is not None else f"{'–':>9s}"
        lines.append(f"{size:20s} {times['plain']:9.3f} {times['term']:9.3f} {fused}")
    lines.append(f"peak {report['peak'] / 1e12:.1f} TFLOP/s")
    lines.append(f"{'':12s} {'step':>9s} {'spread':>7s} {'tokens/s':>9s} {'of peak':>8s}"
                 f" {'allocated':>10s} {'reserved':>9s}")  # fmt: skip
    for name, row in report["rows"].items():
        if "failed" in row:
            last = row["failed"].strip().splitlines()[-1]
            lines.append(f"{name:12s} did not run: {last[:150]}")
            continue
        lines.append(f"{name:12s} {row['step']:8.3f}s {row['spread']:6.0%}"
                     f" {row['tokens_per_second']:9.0f} {row['share_of_peak']:7.0%}"
                     f" {row['allocated'] / 1e9:8.2f}GB {row['reserved'] / 1e9:7.2f}GB"
                     f"  {row['what']} {row['note']}")  # fmt: skip
    lines += [f"{name} = {value:.2f}" for name, value in report["ratios"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
