"""`python -m benchmarks.attention`: attention of packed documents, forth and back, three ways.

The compiled bodies, the plain blocks of products that machines without a compiler take, and torch's
own fused attention one document after the other; each in turn, in one process, on the same inputs.
Knows no model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from tsugiki.device import keep_pages
from tsugiki.kernels.attention import packed_attention, reference_attention
from tsugiki.kernels.backend import hold_plain, operations
from tsugiki.kernels.batch import ForwardBatch

# heads, heads of keys, width, documents
SHAPES = (
    (8, 4, 8, (300,) * 7),
    (8, 8, 32, (300,) * 7),
    (14, 2, 64, (100,) * 10),
    (14, 2, 64, (512, 512)),
    (14, 2, 64, (2048,)),
    (8, 2, 128, (512, 512)),
    (4, 1, 256, (512, 512)),
)
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def torchs(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Torch's fused attention of each document."""
    parts, at = [], 0
    for length in lengths:
        a, b, c = (x[:, :, at : at + length] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True))
        at += length
    return torch.cat(parts, 2).transpose(1, 2)


def seconds(run: Run, inputs: list[Tensor], grad: Tensor) -> float:
    """One pass forth and back."""
    began = time.perf_counter()
    torch.autograd.grad(run(*inputs), inputs, grad)
    return time.perf_counter() - began


def main() -> bool:
    """Measure in turn, print, record."""
    parser = argparse.ArgumentParser(description="compiled attention against plain and torch's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    keep_pages()
    figures: dict[str, float] = {}
    print(f"{torch.get_num_threads()} threads; milliseconds: compiled, blocks, torch's")
    for name in options.dtype:
        dtype = getattr(torch, name)
        family = "attention" if dtype == torch.float32 else "tiles"
        if operations(torch.device("cpu"), dtype)[family] != "compiled":
            print(f"{name}: no compiled attention on this machine")
            continue
        for heads, keys, width, lengths in SHAPES:
            torch.manual_seed(0)
            tokens, scale, batch = sum(lengths), width**-0.5, ForwardBatch(lengths)
            inputs = [
                torch.randn(1, tokens, n, width).to(dtype).transpose(1, 2).requires_grad_()
                for n in (heads, keys, keys)
            ]
            grad = torch.randn(1, tokens, heads, width).to(dtype)

            def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return packed_attention(q, k, v, batch, scale=scale)  # noqa: B023

            def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                hold_plain(["attention", "tiles"])
                try:
                    return packed_attention(q, k, v, batch, scale=scale)  # noqa: B023
                finally:
                    hold_plain([])

            ways: list[Run] = [compiled, blocks, lambda q, k, v: torchs(q, k, v, lengths)]  # noqa: B023
            with torch.no_grad():
                q, k, v = (x.double() for x in inputs)
                exact = reference_attention(q, k, v, lengths, scale=scale)
                worst = max(float((way(*inputs).double() - exact).norm()) for way in ways)
            assert worst < 0.01 * float(exact.norm()), "the three compute the same"
            taken = [[seconds(way, inputs, grad) for way in ways] for _ in range(options.rounds)]
            shape = f"{name}, {heads}/{keys} heads of {width}, {len(lengths)} × {lengths[0]}"
            for other, place in (("blocks", 1), ("torch's", 2)):
                ratio = statistics.median(row[place] / row[0] for row in taken)
                figures[f"{other} / compiled: {shape}"] = ratio
            medians = [1e3 * statistics.median(column) for column in zip(*taken, strict=True)]
            print("  ".join(f"{ms:7.2f}" for ms in medians), f"  {shape}", flush=True)
    if len(figures) < 4 * len(SHAPES):
        print("not recorded: not both types were measured")
        return False
    bounds = dict.fromkeys(figures, ">= 1")
    return record.write("attention", "python -m benchmarks.attention", figures, bounds)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
