"""`tsugiki doctor`: what this machine is, what a run would decide on it, and what would be faster.

Looks and advises; changes nothing. The decisions are `device.py`'s own, made as a run makes them.
Knows no rows and loads no weights.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tsugiki.files import cache_folder, human_bytes
from tsugiki.flags import Json
from tsugiki.terminal import Terminal

WIDTH = 1024  # hidden size that is decided for when no base is named
BUSY = 0.5  # load of others per core from which a step is visibly slower
FEW_FAULTS = 16  # page faults per MB; memory that is not kept takes 256
GPU_DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("torch", "transformers", "triton", "bitsandbytes")
SWITCHES = ("TSUGIKI_COMPILED", "TSUGIKI_CXXFLAGS")  # of kernels/cpu/build.py
INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx2")


@dataclass(frozen=True)
class Machine:
    """What was seen.

    cores: that this process may use, of `present`. load: mean of running processes over a minute.
    free, total: bytes of memory; swapped: bytes swapped out. faults: page faults per MB when
    memory is freed and taken again; None where nobody counts them. instructions: of
    `INSTRUCTIONS`. gpus: name and bytes. driver: an NVIDIA driver is there. cuda: version that
    torch was built for. governor, huge_pages: the kernel's words. omp: OMP_NUM_THREADS. plain: why
    CPU kernels are not compiled; '' where they are.
    """

    system: str
    cpu: str
    cores: int
    present: int
    load: float | None
    free: int
    total: int
    swapped: int
    disk: int
    faults: float | None
    instructions: tuple[str, ...]
    gpus: tuple[tuple[str, int], ...]
    driver: bool
    cuda: str | None
    governor: str | None
    huge_pages: str | None
    on_battery: bool
    omp: str | None
    plain: str
    packages: dict[str, str | None]


@dataclass(frozen=True)
class Advice:
    """What holds the machine back, what it costs, and what to do."""

    problem: str
    cost: str
    fix: str


def doctor(
    model: Annotated[
        str | None, typer.Option(help=f"decide for this base; default: one of width {WIDTH}")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    as_json: Json = False,
) -> None:
    """Show what a run would decide on this machine and why, and what would make it faster."""
    from rich.table import Table
    from rich.text import Text

    from tsugiki.device import choose_compute, decide
    from tsugiki.kernels.backend import describe, operations
    from tsugiki.kernels.int8 import int8_speedup

    terminal = Terminal(as_json=as_json)
    width, stored, name = WIDTH, None, f"a base of width {WIDTH}"
    if model is not None:
        from tsugiki.models.hub import resolve_model
        from tsugiki.models.spec import ModelSpec, stored_dtype

        spec = ModelSpec.from_folder(resolve_model(model).folder)
        width, stored, name = spec.hidden_size, stored_dtype(spec.config), model
    decisions = decide(device, hidden_size=width, stored_dtype=stored)
    decisions.apply()
    compute, why = choose_compute(decisions.device, decisions.dtype, width, int8_speedup)
    machine = look()
    place = _torch_device(decisions.device)
    kernels, built = describe(place, decisions.torch_dtype)
    taken = operations(place, decisions.torch_dtype)
    decisions = dataclasses.replace(decisions, operations=taken)
    advice = list(advise(machine, decisions.device, decisions.dtype))

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for row in machine_rows(machine):
        table.add_row(*row)
    for part in ("device", "dtype", "threads", "allocator"):
        reason = decisions.reasons.get(part, "")
        table.add_row(part, str(getattr(decisions, part)), reason)
    table.add_row("--compute int8", "would be used" if compute == "int8" else "not used", why)
    table.add_row("kernels", kernels, built)
    for kind in sorted(set(taken.values())):
        table.add_row(f"  {kind}", ", ".join(name for name, by in taken.items() if by == kind), "")
    terminal.heading(f"This machine, for {name}")
    terminal.say(
        "machine", table,
        machine=asdict(machine), decisions=decisions.to_json(), width=width,
        kernels={"taken": kernels, "reason": built},
        int8={"used": compute == "int8", "reason": why},
    )  # fmt: skip
    terminal.heading("What would make it faster")
    if not advice:
        terminal.say("advice", Text("nothing that can be seen from here", "green"), advice=[])
        return
    lines = Text()
    for one in advice:
        lines.append(f"{one.problem}", "yellow").append(f": {one.cost}\n  {one.fix}\n")
    lines.rstrip()
    terminal.say("advice", lines, advice=[asdict(one) for one in advice])


def look() -> Machine:
    """See what is there; 64 MB are taken and given back, nothing else is touched."""
    import psutil
    import torch

    from tsugiki.device import usable_cores
    from tsugiki.kernels.cpu.build import library
    from tsugiki.planning import free_memory

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=usable_cores(),
        present=os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        free=free_memory("cpu"),
        total=int(psutil.virtual_memory().total),
        swapped=int(psutil.swap_memory().used),
        disk=shutil.disk_usage(Path.cwd()).free,
        faults=page_faults(),
        instructions=_instructions(),
        gpus=tuple(
            (torch.cuda.get_device_name(n), torch.cuda.get_device_properties(n).total_memory)
            for n in range(torch.cuda.device_count())
        ),
        driver=GPU_DRIVER.exists() or shutil.which("nvidia-smi") is not None,
        cuda=torch.version.cuda,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        huge_pages=_bracketed(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
        on_battery=battery is not None and not battery.power_plugged,
        omp=os.environ.get("OMP_NUM_THREADS"),
        plain=library()[1] if library()[0] is None else "",
        packages={name: _version(name) for name in PACKAGES},
    )


def advise(machine: Machine, device: str, dtype: str) -> Iterator[Advice]:
    """What would make this machine faster, what matters most first."""
    on_gpu = device.startswith("cuda")
    if machine.driver and not machine.gpus:
        yield Advice(
            "an NVIDIA driver is there, but torch sees no GPU",
            f"torch {machine.packages['torch']} is built for "
            + (f"CUDA {machine.cuda}" if machine.cuda else "CPUs only"),
            "install the torch build for this CUDA (pytorch.org/get-started), or update the driver",
        )
    if on_gpu:
        for name, gain in (
            ("triton", "plain torch kernels run instead of fused ones"),
            ("bitsandbytes", "8-bit optimisers fall back to fp32 state"),
        ):
            if machine.packages[name] is None:
                yield Advice(f"{name} is not installed", gain, "pip install 'tsugiki[cuda]'")
    if machine.omp and machine.omp.isdigit() and int(machine.omp) < machine.cores:
        yield Advice(
            f"OMP_NUM_THREADS={machine.omp}",
            f"{machine.cores} cores may be used",
            "unset OMP_NUM_THREADS",
        )
    if machine.load is not None and machine.load > BUSY * machine.present:
        yield Advice(
            f"a load of {machine.load:.1f} on {machine.present} cores",
            "other processes take the cores that a step waits for",
            "end what is not needed; or give a run fewer cores: OMP_NUM_THREADS=1 tsugiki train …",
        )
    if machine.swapped > machine.total // 20:
        yield Advice(
            f"{human_bytes(machine.swapped)} are swapped out",
            f"{human_bytes(machine.free)} of {human_bytes(machine.total)} are free",
            "end what is not needed; --max-memory keeps a run inside what is left",
        )
    if not on_gpu and machine.faults is not None and machine.faults > FEW_FAULTS:
        yield Advice(
            f"memory is given back and taken anew ({machine.faults:.0f} page faults per MB)",
            "a product into fresh memory takes about twice as long",
            "this C library cannot be told to keep pages: preload another allocator, "
            "LD_PRELOAD=libtcmalloc_minimal.so.4 tsugiki train …",
        )
    if not on_gpu and machine.huge_pages == "never":
        yield Advice(
            "transparent huge pages are off",
            "each MB of new memory takes 256 page faults instead of one",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if machine.governor == "powersave" and not _self_driven():
        yield Advice(
            "the CPU's governor is powersave",
            "cores stay at their lowest frequency",
            "sudo cpupower frequency-set -g performance",
        )
    if machine.on_battery:
        yield Advice("this computer runs on its battery", "cores are slowed down", "plug it in")
    if device == "cpu" and machine.plain:
        yield Advice(
            f"CPU kernels are plain torch ({machine.plain})",
            "elementwise work passes over memory several times; a step takes about a tenth longer",
            _way_to_kernels(machine.plain),
        )
    if device == "cpu" and dtype == "float32" and not _has_fast_bf16(machine):
        yield Advice(
            "this CPU multiplies bf16 no faster than fp32",
            "a run takes fp32: about twice the memory of bf16, and its speed",
            "--quantize nf4 keeps frozen weights small; CPUs with AMX or AVX512-BF16 are faster",
        )


def _way_to_kernels(why_plain: str) -> str:
    named = [name for name in SWITCHES if name in why_plain]
    if named:
        return f"unset {named[0]}"
    if str(cache_folder("kernels").parent) in why_plain:
        return f"make {cache_folder('kernels')} writable, or set TSUGIKI_CACHE to a folder that is"
    return "install a C++ compiler, for instance: sudo apt install g++"


def machine_rows(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Name, value, remark."""
    of = f" of {machine.present}" if machine.cores != machine.present else ""
    load = "" if machine.load is None else f"load {machine.load:.1f}"
    yield "system", machine.system, f"Python {platform.python_version()}"
    yield "cpu", machine.cpu, ", ".join(machine.instructions)
    yield "cores", f"{machine.cores}{of}", load
    yield "memory", f"{human_bytes(machine.free)} free", f"of {human_bytes(machine.total)}"
    yield "disk", f"{human_bytes(machine.disk)} free", "in this folder"
    for name, size in machine.gpus:
        yield "gpu", name, human_bytes(size)
    faults = "not counted here" if machine.faults is None else f"{machine.faults:.1f} per MB"
    yield "page faults", faults, "when memory is freed and taken again"
    for name, version in machine.packages.items():
        yield name, version or "not installed", ""


def page_faults() -> float | None:
    """Page faults per MB of memory that is freed and taken again; None without a counter."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    import torch

    size, counted = 64 << 20, []
    for _ in range(4):  # the first one grows the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size, dtype=torch.uint8).fill_(1)
        counted.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counted) / (size >> 20)


def _has_fast_bf16(machine: Machine) -> bool:
    return bool({"amx_bf16", "avx512_bf16"} & set(machine.instructions))


def _self_driven() -> bool:
    """Intel's own driver raises the frequency under powersave too."""
    driver = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    return driver in ("intel_pstate", "amd-pstate-epp")


def _cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instructions() -> tuple[str, ...]:
    """Those that matter here, as Linux names them; none where the system does not say."""
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("flags"):
            return tuple(name for name in INSTRUCTIONS if name in line.split())
    return ()


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _bracketed(text: str | None) -> str | None:
    """The chosen one of 'always [madvise] never'."""
    return None if text is None else text.partition("[")[2].partition("]")[0] or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_device(name: str) -> Any:
    import torch

    return torch.device(name)


__all__ = ["Advice", "Machine", "advise", "doctor", "look"]
