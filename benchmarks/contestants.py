"""The contestants of `benchmarks.step`, each alone in its process, and the correctness gates.

Equal for all: weights, rank, scale, targets, tokens, labels, AdamW, clipping at 1. Knows no
comparison between processes.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks import step as clockwork
from benchmarks.parts import int8_share, parts_of
from benchmarks.rates import best_int8_rate, product_rates
from benchmarks.shapes import SHAPES, Shape, make_config, make_model, products
from tsugiki.adapters.attach import attach, lora_modules, training_mode
from tsugiki.config import LoraConfig
from tsugiki.data.example import Example
from tsugiki.device import keep_pages
from tsugiki.kernels.backend import ON_CPU, hold_plain
from tsugiki.kernels.loss import CHUNK
from tsugiki.models.flat import flat_loss, use_flat_attention
from tsugiki.models.int8 import LEVELS, Int8Products
from tsugiki.models.quantized import quantize_modules
from tsugiki.models.tune import Tuned, tune
from tsugiki.training.gradients import BATCHES, settle
from tsugiki.training.objective import flatten
from tsugiki.training.ranks import ranks
from tsugiki.training.scaling import LossScale
from tsugiki.training.step import LossOf, make_optimizer, optimiser_step

RANK, ALPHA, RATE = 16, 16, 1e-4
WET = ("ours", "ours-torch", "ours-int8", "ours-nf4")  # with dropout
Step = Callable[[], float]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One contestant (or the gates) in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.worker == "gates":
        return gates(SHAPES[options.shape])
    shape = SHAPES[options.shape]
    config = make_config(shape, options.layers, options.vocab)
    name = options.worker
    if name.startswith("ours"):
        keep_pages()
    if name == "ours-torch":
        hold_plain(ON_CPU)
    model = make_model(config, torch.float32 if name == "peft-fp32" else torch.bfloat16)
    counts = products(model)
    rows = random_rows(config.vocab_size, options.rows, options.length)
    make = {"ours": ours, "peft": theirs, "products": bare}[name.partition("-")[0]]
    if name == "ours-nf4":
        quantize_modules(model, "nf4")
    if name == "ours-int8":
        step, note = ours_int8(name, model, shape, rows, config.vocab_size)
    else:
        step, note = make(name, model, shape, rows)
    clock = clockwork.clock_of(options.clock)
    if options.parts:
        return {"parts": parts_of(step, options.steps), "int8_share": int8_share(model)}
    loaded = clockwork.peak_rss()
    step()
    seconds, faults = [], []
    for _ in range(options.steps):
        began, before = clock(), clockwork.page_faults()
        step()
        seconds.append(clock() - began)
        faults.append(clockwork.page_faults() - before)
    peak = clockwork.peak_rss()
    tokens = options.rows * options.length
    seen = {f"{n}x{k}": product_rates(n, k, tokens, clock) for n, k in counts}
    rates = {size: max(every) for size, every in seen.items()}
    return {
        "seconds": seconds,
        "page_faults": statistics.median(faults),
        "peak_rss": peak,
        "loaded_rss": loaded,
        "rates": rates,
        "usual_rates": {size: statistics.median(every) for size, every in seen.items()},
        "int8_rates": {f"{n}x{k}": best_int8_rate(n, k, tokens, clock) for n, k in counts}
        if name == "ours-int8"
        else {},
        "counts": {f"{n}x{k}": count for (n, k), count in counts.items()},
        "weights": sum(n * k * count for (n, k), count in counts.items()),
        "full_flops": full_flops(counts, config, options.rows, options.length),
        "note": note,
    }


def random_rows(vocab: int, rows: int, length: int) -> list[Example]:
    """All tokens labelled."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(2, vocab, (rows, length), generator=generator).tolist()
    return [Example(tuple(row), tuple(row), "random") for row in ids]


def ours(
    name: str,
    model: nn.Module,
    shape: Shape,
    rows: list[Example],
    scaling: LossScale | None = None,
) -> tuple[Step, str]:
    """A step as `tsugiki train` makes it; scaling: for float16."""
    step, tuned, _ = _ours(name, model, shape, rows, scaling)
    return step, "" if tuned is None else tuned.note


def ours_int8(
    name: str, model: nn.Module, shape: Shape, rows: list[Example], vocab: int
) -> tuple[Step, str]:
    """The same with `--compute int8`, at the level that this very model's gradients allow."""
    step, tuned, loss_of = _ours(name, model, shape, rows)
    assert tuned is not None
    products = Int8Products(model, tuned)
    passes = [[row] for row in random_rows(vocab, BATCHES, len(rows[0].ids))]
    settled = settle(model, products, loss_of, passes, draw=True)
    training_mode(model, True)
    return step, f"{LEVELS[settled.level]}; {settled.verdict.note}; {tuned.note}"


def _ours(
    name: str,
    model: nn.Module,
    shape: Shape,
    rows: list[Example],
    scaling: LossScale | None = None,
) -> tuple[Step, Tuned | None, LossOf]:
    dropout = clockwork.DROPOUT if name in WET else 0.0
    config = LoraConfig(r=RANK, alpha=ALPHA, dropout=dropout, targets=list(shape.targets))
    attach(model, config, generator=torch.Generator().manual_seed(0))
    use_flat_attention(model)
    tuned = None if name == "ours-plain" else tune(model)
    training_mode(model, True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    device = place_of(model)
    optimizer = make_optimizer(trained, 0.0, device)
    alone = ranks(device)

    def loss_of(examples: Any, factor: float) -> tuple[Tensor, int]:
        ids, batch, places, targets = flatten(examples, device)
        head = None if tuned is None else tuned.head_of(model)
        loss = flat_loss(model, ids, batch, places, targets, head=head, factor=factor)
        return loss, len(targets)

    def step() -> float:
        return optimiser_step(
            1, [rows], loss_of, trained, optimizer, rate=RATE, max_grad_norm=1.0, ranks=alone,
            scaling=scaling,
        ).loss  # fmt: skip

    return step, tuned, loss_of


def bare(_: str, model: nn.Module, shape: Shape, rows: list[Example]) -> tuple[Step, str]:
    """A step's frozen products alone by torch: in order and back again, with out=."""
    keep_pages()
    tokens = sum(len(row.ids) for row in rows)
    matrices = [
        m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach()
        for m in model.modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    head = matrices.pop()
    size = -(-tokens // max(1, -(-tokens * len(head) // CHUNK)))
    widths = {width for matrix in [*matrices, head] for width in matrix.shape} - {len(head)}
    given = {width: torch.randn(tokens, width).bfloat16() for width in widths}
    taken = {width: torch.empty(tokens, width).bfloat16() for width in widths}
    logits = torch.empty(size, len(head)).bfloat16()

    def step() -> float:
        for w in matrices:
            torch.mm(given[w.shape[1]], w.T, out=taken[w.shape[0]])
        for begin in range(0, tokens, size):
            part = slice(begin, min(begin + size, tokens))
            some = logits[: part.stop - begin]
            torch.mm(given[head.shape[1]][part], head.T, out=some)
            torch.mm(some, head, out=taken[head.shape[1]][part])
        for w in reversed(matrices):
            torch.mm(given[w.shape[0]], w, out=taken[w.shape[1]])
        return 0.0

    return step, ""


def theirs(name: str, model: nn.Module, shape: Shape, rows: list[Example]) -> tuple[Step, str]:
    """A plain torch loop over PEFT's model."""
    import peft

    tuned = name == "peft-tuned"
    dropout = clockwork.DROPOUT if name in ("peft", "peft-fp32") else 0.0
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(shape.targets),
        task_type="CAUSAL_LM", fan_in_fan_out=shape.transposed,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=not tuned)
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    note = f"adapters {trained[0].dtype}"
    if tuned:
        body = model.base_model
        layers = body.h if shape.kind == "gpt2" else body.layers
        for layer in layers:
            layer.compile()
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    ids = torch.tensor([row.ids for row in rows], device=place_of(model))

    def step() -> float:
        optimizer.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return step, note


def full_flops(counts: dict[tuple[int, int], int], config: Any, rows: int, length: int) -> float:
    """4·N·T with LoRA and causal attention on top (performance: 6·Σr(n+k)·T, 7·s̄·H·D·L·T)."""
    tokens = rows * length
    base = sum(4 * n * k * count for (n, k), count in counts.items())
    vocab = config.vocab_size
    lora = sum(6 * RANK * (n + k) * count for (n, k), count in counts.items() if n != vocab)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 7 * length * heads * width * config.num_hidden_layers
    return float(tokens * (base + lora + attention))


def gates(shape: Shape, device: str = "cpu") -> dict[str, Any]:
    """Gradients against fp32, and 50 steps of loss, on two layers of this shape."""
    config = make_config(shape, 2, 2048)
    rows = random_rows(2048, 2, 96)
    errors = {
        kind: gradient_errors(shape, config, rows, kind, device)
        for kind in ("ours-dry", "peft-dry")
    }
    worst = max(
        errors["ours-dry"][n] / max(errors["peft-dry"][n], 1e-6) for n in errors["ours-dry"]
    )
    middle = statistics.median(
        errors["ours-dry"][n] / max(errors["peft-dry"][n], 1e-6) for n in errors["ours-dry"]
    )
    curves = {
        kind: curve(shape, config, rows, kind, device)
        for kind in ("ours-dry", "peft-dry", "peft-fp32-dry")
    }
    exact = curves["peft-fp32-dry"]
    gaps = {
        kind: max(abs(a - b) for a, b in zip(curves[kind], exact, strict=True))
        for kind in ("ours-dry", "peft-dry")
    }
    return {
        "gradients against fp32 / PEFT's": {
            "figures": {"median": middle, "worst": worst},
            "holds": middle <= 1.2 and worst <= 2.0,
        },
        "50 steps of loss": {
            "figures": {"first": exact[0], "last": exact[-1], **gaps},
            "holds": exact[-1] < exact[0] and gaps["ours-dry"] <= max(0.02, 1.2 * gaps["peft-dry"]),
        },
    }


def gradient_errors(
    shape: Shape, config: Any, rows: list[Example], kind: str, device: str
) -> dict[str, float]:
    """Relative error of every adapter gradient in bf16 against PEFT in fp32; B is not zero."""
    exact = adapter_gradients(shape, config, rows, "peft-fp32-dry", device)
    got = adapter_gradients(shape, config, rows, kind, device)
    return {n: float((got[n] - g).norm() / g.norm()) for n, g in exact.items()}


def adapter_gradients(
    shape: Shape, config: Any, rows: list[Example], kind: str, device: str
) -> dict[str, Tensor]:
    """Name of each A and B → its gradient in fp32."""
    # fp32 copies of the very bf16 weights, so that only the arithmetic differs
    model = make_model(config, torch.bfloat16).to(device)
    widen(model)
    if "fp32" in kind:
        model = model.float()
    (ours if kind.startswith("ours") else theirs)(kind, model, shape, rows)
    pairs = adapter_pairs(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(pairs):
            values = torch.randn(pairs[name].shape, generator=generator) * 0.02
            pairs[name].copy_(values.to(pairs[name].dtype))
    ids = torch.tensor([row.ids for row in rows], device=place_of(model))
    if kind.startswith("ours"):
        tuned = tune(model)
        flat, batch, places, targets = flatten(rows, place_of(model))
        loss = flat_loss(
            model, flat, batch, places, targets, head=tuned.head_of(model), factor=1 / len(targets)
        )
    else:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {name: p.grad.float() for name, p in pairs.items() if p.grad is not None}


def place_of(model: nn.Module) -> torch.device:
    """Where its weights are."""
    return next(model.parameters()).device


def widen(model: nn.Module) -> None:
    """Matrices wide enough that attention and logits are far from uniform."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2.0)


def adapter_pairs(model: nn.Module) -> dict[str, nn.Parameter]:
    """'path.A' and 'path.B' → parameter, whichever library attached it."""
    found = {}
    for path, module in lora_modules(model):
        found[f"{path}.A"], found[f"{path}.B"] = module.lora_A, module.lora_B
    if found:
        return found
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found[f"{path}.A"] = module.lora_A["default"].weight
            found[f"{path}.B"] = module.lora_B["default"].weight
    return found


def curve(shape: Shape, config: Any, rows: list[Example], kind: str, device: str) -> list[float]:
    """50 losses from the same start."""
    model = make_model(config, torch.bfloat16).to(device)
    if "fp32" in kind:
        model = model.float()
    step, _ = (ours if kind.startswith("ours") else theirs)(kind, model, shape, rows)
    pairs = adapter_pairs(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in sorted(pairs):
            if name.endswith(".A"):
                values = torch.randn(pairs[name].shape, generator=generator) / 30
                pairs[name].copy_(values.to(pairs[name].dtype))
    return [step() for _ in range(50)]
