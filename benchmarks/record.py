"""Writes a proof's figures as a dated file that the suite's promises check reads."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(
    name: str, command: str, figures: dict[str, float], bounds: dict[str, str], **more: Any
) -> bool:
    """Write `results/NAME.json`; returns whether every bound holds.

    bounds: figure name → '<= 0.02', '>= 0.9' or '== 50'.
    """
    compare = {"<=": float.__le__, ">=": float.__ge__, "==": float.__eq__}
    holds = True
    for key, bound in bounds.items():
        sign, limit = bound.split()
        good = compare[sign](float(figures[key]), float(limit))
        print(
            f"{'ok  ' if good else 'FAIL'} {key} = {figures[key]:.4g} (bound {bound})", flush=True
        )
        holds = holds and good
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
        cwd=RESULTS.parent,
    ).stdout.strip()  # fmt: skip
    content = {
        "command": command,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "figures": figures,
        "bounds": bounds,
        "holds": holds,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return holds
