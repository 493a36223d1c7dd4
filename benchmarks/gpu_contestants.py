"""The parts of `benchmarks.gpu`, each alone in its process; the contestants are `contestants.py`'s.

Knows no comparison between processes.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import contestants
from benchmarks import step as clockwork
from benchmarks.shapes import SHAPES, make_config, make_model, products
from tsugiki.kernels.backend import FAMILIES, judged, unsuited
from tsugiki.kernels.lowrank import add_product, shrink
from tsugiki.training.scaling import LossScale

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One part."""
    warnings.simplefilter("ignore")
    device, shape = torch.device(options.device), SHAPES[options.shape]
    if options.worker == "kernels":
        return kernels(device)
    if options.worker == "gates":
        return contestants.gates(shape, options.device)
    config = make_config(shape, options.layers)
    if options.worker == "products":
        with torch.device("meta"):
            sizes = products(make_model(config, torch.bfloat16))
        return {"rows": times(sizes, options.rows * options.length, device, options.budget)}
    return timed_step(options, config, device)


def kernels(device: torch.device) -> dict[str, Any]:
    """What is wrong with each family of GPU bodies in each type; '' where they are proven."""
    if device.type != "cuda":
        return {"reasons": {"any type": {"all": "plain torch: not a GPU"}}, "wrong": []}
    reasons: dict[str, dict[str, str]] = {}
    wrong = []
    for dtype in TYPES:
        told = reasons[str(dtype).removeprefix("torch.")] = {}
        for family in FAMILIES:
            chosen_against = unsuited(device, dtype, family)
            if chosen_against and family != "product":
                told[family] = chosen_against
                continue
            told[family] = judged(device, dtype, family)  # the fused product even where not taken
            if told[family]:
                wrong.append(f"{dtype} {family}: {told[family]}")
    return {"reasons": reasons, "wrong": wrong}


def times(
    sizes: dict[tuple[int, int], int], tokens: int, device: torch.device, budget: float
) -> dict[str, dict[str, float | None]]:
    """'OUTxIN' → milliseconds of the library's product, of it and a term, of the fused one."""
    rows: dict[str, dict[str, float | None]] = {}
    rank = contestants.RANK
    for out, width in sizes:
        x, w = (torch.randn(n, width, device=device).bfloat16() for n in (tokens, out))
        a, b = (torch.randn(*s, device=device).bfloat16() for s in ((rank, width), (out, rank)))
        y, s = torch.empty(tokens, out, device=device).bfloat16(), shrink(x, a)

        def plain(x: Tensor = x, w: Tensor = w, y: Tensor = y) -> None:
            torch.mm(x, w.T, out=y)

        def with_term(s: Tensor = s, b: Tensor = b, y: Tensor = y, plain: Any = plain) -> None:
            plain()
            add_product(y, s, b, 0.5)

        rows[f"{out}x{width}"] = {
            "plain": 1e3 * best_seconds(plain, device, budget),
            "term": 1e3 * best_seconds(with_term, device, budget),
            "fused": _fused(x, w, s, b, device, budget),
        }
    return rows


def _fused(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, device: torch.device, budget: float
) -> float | None:
    """Milliseconds, the best of some tiles; None where Triton does not run."""
    if device.type != "cuda":
        return None
    from tsugiki.kernels.gpu.product import HALF, Tiles, product

    best: float | None = None
    for tiles in (HALF, Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 32, 4, 4)):
        try:
            spent = 1e3 * best_seconds(
                lambda t=tiles: product(x, w.T, term=(s, b.T), scale=0.5, tiles=t), device, budget
            )
        except Exception:  # this GPU does not hold such tiles
            continue
        best = spent if best is None else min(best, spent)
    return best


def best_seconds(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """The shortest of repeated runs, after one to warm up."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    best, until = once(), time.perf_counter() + budget
    while time.perf_counter() < until:
        best = min(best, once())
    return best


def timed_step(options: argparse.Namespace, config: Any, device: torch.device) -> dict[str, Any]:
    """One contestant's step: times, memory, and the best rate of the model's products."""
    name, shape = options.worker, SHAPES[options.shape]
    dtype = torch.float16 if name == "ours-fp16" else torch.bfloat16
    try:
        with torch.device(device):
            model = make_model(config, dtype)
        counts = products(model)
        rows = contestants.random_rows(config.vocab_size, options.rows, options.length)
        if name.endswith("-nf4"):
            (our_nf4 if name.startswith("ours") else their_nf4)(model)
        step, note = begin(name, model, shape, rows)
        loaded = memory(device)[0]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step(), step()
        seconds = []
        for _ in range(options.steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        allocated, reserved = memory(device)
    except (ImportError, torch.OutOfMemoryError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    tokens = options.rows * options.length
    del step, model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "seconds": seconds,
        "allocated": allocated,
        "reserved": reserved,
        "loaded": loaded,
        "rates": {f"{n}x{k}": rate(n, k, tokens, device, dtype, options.budget) for n, k in counts},
        "weights": sum(n * k * count for (n, k), count in counts.items()),
        "full_flops": contestants.full_flops(counts, config, options.rows, options.length),
        "note": note,
    }


def begin(name: str, model: nn.Module, shape: Any, rows: Any) -> tuple[Callable[[], float], str]:
    """The contestant's step. NF4 is the model's affair, dropout and precision the name's."""
    if not name.startswith("ours"):
        return contestants.theirs(name.replace("-nf4", ""), model, shape, rows)
    scaling = LossScale() if name == "ours-fp16" else None
    dry = "ours-dry" if name == "ours-dry" else "ours"
    return contestants.ours(dry, model, shape, rows, scaling)


def our_nf4(model: nn.Module) -> None:
    """NF4 with double quantisation, our storage."""
    from tsugiki.models.quantized import quantize_modules

    quantize_modules(model, "nf4")


def their_nf4(model: nn.Module) -> None:
    """The same with bitsandbytes, marked as PEFT looks for it."""
    import bitsandbytes as bnb

    device = contestants.place_of(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        small = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None,
            compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        small.weight = bnb.nn.Params4bit(
            module.weight.data.cpu(), requires_grad=False, quant_type="nf4"
        )
        small.bias = module.bias
        model.set_submodule(path, small.to(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def memory(device: torch.device) -> tuple[int, int]:
    """Peak bytes allocated and reserved; of a CPU the peak resident set, twice."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return clockwork.peak_rss(), clockwork.peak_rss()


def rate(
    n: int, k: int, tokens: int, device: torch.device, dtype: torch.dtype, budget: float
) -> float:
    """FLOP/s of (T, k)·(k, n) or (T, n)·(n, k), whichever is faster."""
    x, w, y = (torch.randn(*s, device=device).to(dtype) for s in ((tokens, k), (n, k), (tokens, n)))
    ways = (lambda: torch.mm(x, w.T, out=y), lambda: torch.mm(y, w, out=x))
    return 2 * tokens * n * k / min(best_seconds(way, device, budget) for way in ways)
