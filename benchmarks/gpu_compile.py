"""Compiles every Triton kernel for GPUs that are not here, and asks how much it spills.

    python -m benchmarks.gpu_compile

Each launch of the wrappers in kernels/gpu/, at the shapes of Llama-3-8B and at ragged ones, is
compiled to machine code for compute capability 8.0 and 9.0, those without products for 7.5 too (a
T4), and checked against the shared memory of the smallest GPU of its kind. In fp32, and at ragged
shapes, which no vector instruction loads, spilling is recorded and allowed. Says nothing of speed
and nothing of numbers. Needs triton, and no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from benchmarks import record
from tsugiki.kernels.gpu import activations, loss, lowrank, nf4, norms, product

# Bytes of shared memory that a program may have: T4, RTX 30 and 40 (8.6, 8.9), H100.
SHARED = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TOKENS, HIDDEN, WIDE, VOCAB, RANK = 8192, 4096, 14_336, 128_256, 16


class Absent(DriverBase):
    """Stands for a GPU that is not here: takes binaries, looks at them, launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.kernels: list[dict[str, Any]] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED[capability]},
            load_binary=self._load,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *given, **named: None

    def _load(self, name: str, binary: bytes, shared: int, _: int) -> tuple[Any, ...]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            said = subprocess.run(
                [TOOL, "--dump-resource-usage", file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        spilled = found["STACK"] + found["LOCAL"]
        self.kernels.append(
            {"kernel": name, "registers": found["REG"], "spilled": spilled, "shared": shared}
        )
        return object(), object(), found["REG"], spilled, 1024


def products(dtype: torch.dtype, tokens: int, hidden: int, wide: int) -> None:
    """Every wrapper that multiplies."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, s, grad = empty(tokens, hidden), empty(tokens, 3 * RANK), empty(tokens, wide)
    a, b = empty(3 * RANK, hidden), empty(wide, RANK)
    for rate in (0.0, 0.05):
        lowrank.shrink(x, a, rate, 5)
        lowrank.add_product(x, s, a.T, 1.0, rate, 5)
        lowrank.grad_of_a(s, x, rate, 5)
        product.product(grad, empty(wide, hidden), out=x, add=True, term=(s, a), rate=rate, seed=5)
    lowrank.add_product(grad, s[:, :RANK], b, 0.5, 0.0, 0)
    lowrank.pair_gradients(grad, s[:, :RANK], b, 0.5, s[:, :RANK].contiguous())
    product.product(x, empty(wide, hidden).T, term=(s[:, :RANK], b.T), scale=0.5)
    packed = _packed(wide, hidden)
    if hidden % 64 == 0:
        for rows in (1, 40):
            nf4.matmul(x[:rows], packed, wide)


def others(dtype: torch.dtype, tokens: int, hidden: int, wide: int) -> None:
    """Every wrapper that does not."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    x, e, g, d = empty(tokens, hidden), *(empty(tokens, wide) for _ in range(3))
    norms.norm_rows(x, empty(hidden), 1e-5, 0.0)
    norms.norm_rows_back(x, x, empty(hidden), torch.empty(tokens, 1), 0.0)
    heads = empty(tokens, hidden // 128 or 1, 128)
    norms.turn(heads, empty(tokens, 128), empty(tokens, 128), torch.empty_like(heads), 1)
    for kind in activations.KINDS:
        activations.gate(e, g, kind)
        activations.gate_back(d, e, g, kind, e, g, d)
    for cap in (None, 30.0):
        logits = empty(min(tokens, 64), VOCAB if tokens == TOKENS else 301)
        targets = torch.zeros(len(logits), dtype=torch.long)
        loss.softmax_rows(logits, targets, 1.0, cap, 1.0, True)
    nf4.unpack(_packed(wide, hidden), empty(wide, hidden))


def _packed(out: int, width: int) -> nf4.Packed:
    blocks = -(-out * width // 64)
    tables = [torch.empty(n) for n in (-(-blocks // 256), 1, 16, 256)]
    codes = [torch.empty(n, dtype=torch.uint8) for n in (32 * blocks, blocks)]
    return nf4.Packed(*codes, *tables)


def main() -> int:
    """Compile for each GPU; 1 where something does not compile, fit, or stay in registers."""
    half = (torch.bfloat16, torch.float16)
    plan: list[tuple[int, Callable[..., None], torch.dtype]] = [
        *((capability, work, dtype) for capability in (80, 90) for work in (products, others)
          for dtype in (half[0], torch.float32)),
        (75, others, half[1]),
    ]  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {}
    for capability, work, dtype in plan:
        driver = Absent(capability)
        triton.runtime.driver.set_active(driver)
        # one GPU after the other: what was compiled for the last must not be taken for this one
        for module in (activations, loss, lowrank, nf4, norms, product):
            for thing in vars(module).values():
                if isinstance(thing, triton.JITFunction):
                    thing.device_caches.clear()
        work(dtype, TOKENS, HIDDEN, WIDE)
        full = len(driver.kernels)
        work(dtype, 70, 200, 136)
        for number, kernel in enumerate(driver.kernels):
            kernel["ragged"], kernel["half"] = number >= full, dtype in half
        name = f"sm_{capability} {work.__name__} {str(dtype).removeprefix('torch.')}"
        rows[name] = driver.kernels
        spilling = [kernel for kernel in driver.kernels[:full] if kernel["spilled"]]
        print(f"{name}: {len(driver.kernels)} kernels; spilling: {spilling or 'none'}", flush=True)
    every = [kernel for kernels in rows.values() for kernel in kernels]
    figures = {
        "kernels": float(len(every)),
        "spilling": float(sum(k["spilled"] > 0 for k in every if k["half"] and not k["ragged"])),
    }
    bounds = {"kernels": ">= 100", "spilling": "== 0"}
    told = {
        name: {
            "kernels": len(kernels),
            "most registers": max(k["registers"] for k in kernels),
            "most shared memory": max(k["shared"] for k in kernels),
            "spilling": [k for k in kernels if k["spilled"]],
        }
        for name, kernels in rows.items()
    }
    holds = record.write(
        "gpu_compile", "python -m benchmarks.gpu_compile", figures, bounds,
        triton=triton.__version__, kernels=told,
    )  # fmt: skip
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
