"""Decides once, with the reason, which device, compute types, threads and allocator a run uses.

A timing probe may choose otherwise on another day, so a run keeps its `Decisions` in
`decisions.json` and replays them on resume. Knows nothing of models beyond their hidden size.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsugiki.errors import RunError, UsageError

# Below this width a step is bound by overhead, not arithmetic, and fp32 costs nothing
# (at 256, sprout's, bf16 trains half as fast again, to the same scores).
NARROW = 256
# bf16 must win by this much in the probe before rounding is taken on.
WORTHWHILE = 1.3
DTYPES = ("float32", "bfloat16", "float16")
ROUNDS = 20  # of a probe: on a busy machine a few are all cut into
KEEPING = "keeps freed pages"
TENSOR_CORES = (7, 0)  # compute capability; before, fp16 is no faster than fp32, often slower


Speedup = Callable[[int, torch.dtype], float]


@dataclass(frozen=True)
class Decisions:
    """What was decided, and why; JSON both ways."""

    device: str
    dtype: str
    threads: int
    reasons: dict[str, str] = field(default_factory=dict)
    compute: str = "bf16"  # of the frozen products: in dtype, or int8
    # family of operations → torch, compiled or triton; kernels/backend.py fills it
    operations: dict[str, str] = field(default_factory=dict)
    allocator: str = KEEPING  # or the system's

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute type as torch names it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `decisions.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Decisions:
        """Read back what `to_json` wrote.

        Raises:
            RunError: a key is missing or unknown, or not what this version decides.
        """
        try:
            found = cls(**raw)
        except TypeError as error:
            raise RunError(f"decisions.json does not fit this version: {error}") from None
        if found.dtype not in DTYPES or type(found.threads) is not int or found.threads < 1:
            raise RunError(
                "decisions.json does not fit this version",
                got=f"dtype {found.dtype}, threads {found.threads}",
                allowed=f"{', '.join(DTYPES)}; threads from 1 on",
            )
        return found

    def apply(self) -> None:
        """Set threads and allocator; called once per process, before the model is loaded.

        Raises:
            UsageError: a run is resumed where its device is not.
        """
        _device(self.device)
        use_threads(self.threads)
        if self.device == "cpu" and self.allocator == KEEPING:
            keep_pages()


def decide(
    device: str = "auto",
    dtype: str = "auto",
    *,
    hidden_size: int,
    stored_dtype: str | None = None,
    compute: str = "bf16",
    int8_speedup: Speedup | None = None,
) -> Decisions:
    """Choose device, dtype, threads, allocator and the type of the frozen products.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16.
        hidden_size: of the base; narrow models stay in fp32.
        stored_dtype: type of the checkpoint, for the reason only.
        compute: bf16 (that is, in dtype) or int8, which is taken only where it is faster.
        int8_speedup: how many times faster int8 is here, by width and dtype; asked where int8 is.

    Raises:
        UsageError: a device that is not there.
    """
    chosen, why_device = _device(device)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    given = int(asked) if asked.isdecimal() else 0
    threads = given or usable_cores()
    use_threads(threads)
    if dtype != "auto":
        kind, why_dtype = dtype, "asked for with --dtype"
    else:
        kind, why_dtype = _dtype(chosen, hidden_size, stored_dtype)
    why_threads = "OMP_NUM_THREADS" if given else f"{threads} usable cores"
    reasons = {"device": why_device, "dtype": why_dtype, "threads": why_threads}
    if compute == "int8":
        assert int8_speedup is not None
        compute, reasons["compute"] = choose_compute(chosen, kind, hidden_size, int8_speedup)
    allocator, reasons["allocator"] = _allocator(chosen)
    return Decisions(chosen, kind, threads, reasons, compute, allocator=allocator)


def _allocator(device: str) -> tuple[str, str]:
    if device != "cpu":
        return "the system's", "tensors are on the GPU"
    if _mallopt() is None:
        return "the system's", "no glibc to tell"
    return KEEPING, "fresh pages cost as much as the arithmetic on them"


def use_threads(count: int) -> None:
    """Compute with so many threads, and take numbers below 1e-38 for zero in all of them.

    Processors take a hundred times longer over each such number, and a run at too high a rate is
    full of them. Threads inherit this when they begin: it is set before torch's first product.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(count)


def keep_pages() -> bool:
    """Tell glibc to keep freed memory; returns whether there was a glibc to tell.

    By default every tensor above 32 MiB is mapped anew and unmapped when freed, and filling fresh
    pages costs more than the arithmetic on them: a product into fresh memory takes twice the time
    of one into memory used before.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def _mallopt() -> Any:
    """glibc's function, if this is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return None


def usable_cores() -> int:
    """Cores this process may use (an affinity mask or container limit counts)."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = core_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def core_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that a container may use; None without a limit.

    Threads beyond it do not run slower but stop all together until the next period.
    """
    for limit, period in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / limit).read_text().split()
            if period is not None:
                words += (root / period).read_text().split()
            allowed, whole = (int(word) for word in words)
        except (OSError, ValueError):  # no such file, or 'max'
            continue
        if allowed > 0 and whole > 0:
            return allowed / whole
    return None


def _device(asked: str) -> tuple[str, str]:
    have = ["cpu"]
    if torch.cuda.is_available():
        have += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        have.append("mps")
    if asked == "auto":
        if "cuda" in have:
            return "cuda", torch.cuda.get_device_name(0)
        if "mps" in have:
            return "mps", "Apple GPU"
        return "cpu", "no GPU found"
    if asked not in have:
        raise UsageError(
            "that device is not on this machine",
            got=f"--device {asked}",
            allowed=", ".join(have),
            fix="leave --device out",
        )
    return asked, "asked for with --device"


def _dtype(device: str, hidden_size: int, stored: str | None) -> tuple[str, str]:
    suffix = f" (checkpoint: {stored})" if stored else ""
    if hidden_size < NARROW:
        return "float32", f"hidden size {hidden_size} < {NARROW}: fp32 costs little{suffix}"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", f"native on this GPU{suffix}"
        if torch.cuda.get_device_capability(device) >= TENSOR_CORES:
            return "float16", f"this GPU has no native bf16: fp16 with a scaled loss{suffix}"
        return "float32", f"this GPU has neither bf16 nor fast fp16{suffix}"
    ratio = bf16_speedup(device, hidden_size)
    if ratio >= WORTHWHILE:
        return "bfloat16", f"a probe ran {ratio:.1f}× faster in bf16 than in fp32{suffix}"
    return "float32", f"bf16 is not faster here (probe: {ratio:.1f}×){suffix}"


def choose_compute(device: str, dtype: str, hidden_size: int, speedup: Speedup) -> tuple[str, str]:
    """int8 or bf16 (that is, in dtype) where int8 is asked for, and why."""
    own = f"products stay in {dtype}"
    if device != "cpu":
        return "bf16", f"int8 products are written for CPUs; {own}"
    if hidden_size < NARROW:
        return "bf16", f"hidden size {hidden_size} < {NARROW}: int8 would not be faster; {own}"
    try:
        ratio = speedup(hidden_size, getattr(torch, dtype))
    except (RuntimeError, AttributeError) as error:
        return "bf16", f"this torch has no int8 product ({str(error).splitlines()[0]}); {own}"
    if ratio >= WORTHWHILE:
        return "int8", f"a probe ran {ratio:.1f}× faster in int8 than in {dtype}"
    return "bf16", f"int8 is not faster here (probe: {ratio:.1f}×); {own}"


def bf16_speedup(device: str, width: int) -> float:
    """How many times faster a (256, width)·(width, 2·width) product is in bf16 than in fp32."""
    x, w = torch.randn(256, width, device=device), torch.randn(2 * width, width, device=device).T
    pairs = ((x, w), (x.bfloat16(), w.bfloat16()))
    outs = [torch.matmul(*pair) for pair in pairs]

    def product(which: int) -> None:
        torch.matmul(*pairs[which], out=outs[which])
        if outs[which].device.type == "mps":
            torch.mps.synchronize()

    wide, narrow = shortest(lambda: product(0), lambda: product(1))
    return wide / narrow


def shortest(*runs: Callable[[], object]) -> list[float]:
    """The least seconds of each; they take turns, so that other work meets all."""
    best = [math.inf] * len(runs)
    for _ in range(ROUNDS):
        for which, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[which] = min(best[which], time.perf_counter() - start)
    return best
