"""Config + model shapes + row counts + machine → a plan with a reason for every chosen value.

Touches no weights. Everything that `None` left open in the config is chosen here, so that the
run folder's `config.yaml` holds no open value. Knows nothing of how training is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from tsugiki.adapters.targets import resolve_targets
from tsugiki.config import RunConfig
from tsugiki.defaults import (
    choose_epochs,
    choose_looks,
    choose_rows_per_step,
    full_learning_rate,
    lora_learning_rate,
)
from tsugiki.device import Decisions
from tsugiki.errors import AdapterError, MemoryLimitError, UsageError
from tsugiki.files import human_bytes, parse_bytes
from tsugiki.memory import Pass, predict, shape_of, weight_bytes
from tsugiki.models.spec import ModelSpec
from tsugiki.supervise import memory_left

# Rows of one forward pass stop growing here: beyond it a CPU gains nothing.
PASS_TOKENS = 4096
# Of what may be used, what a run is planned for: predictions are right within a tenth.
SHARE = 0.9
CUDA_BYTES = 512 << 20  # a process's share of a GPU before it allocates; not yet measured


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of the rows: counts after lengths were fitted."""

    rows: int
    labelled_tokens: int
    tokens: int
    longest: int
    held_out: int

    def cut(self, longest: int) -> Facts:
        """At most what these become where no row is longer than so many tokens."""
        tokens = min(self.tokens, self.rows * longest)
        labelled = min(self.labelled_tokens, tokens)
        return replace(self, longest=longest, tokens=tokens, labelled_tokens=labelled)


@dataclass(frozen=True)
class Plan:
    """A config without open values, the reason of each chosen one, and what it will cost.

    longest: the limit of a row's tokens, chosen or asked for.
    """

    config: RunConfig
    reasons: dict[str, str]
    steps: int
    rows_per_step: int
    trainable: int
    memory: dict[str, int]
    disk: int
    longest: int

    @property
    def memory_total(self) -> int:
        """Predicted peak bytes (RSS on a CPU, allocated on a GPU)."""
        return sum(self.memory.values())


def make_plan(
    config: RunConfig,
    spec: ModelSpec,
    facts: Facts,
    decisions: Decisions,
    *,
    trainable: int,
    available: int | None = None,
) -> Plan:
    """Fill in every open value.

    Args:
        config: as the user asked, presets and flags merged.
        spec: shapes of the base.
        facts: counts of the rows that will be trained on.
        decisions: device and dtype.
        trainable: parameters that will be trained.
        available: bytes that the process may hold; --max-memory or what is free when None.

    Raises:
        UsageError: a context that the base does not have.
        MemoryLimitError: even one row at a time does not fit.
    """
    asked = config.train
    reasons: dict[str, str] = {}
    lora = config.lora
    if lora.alpha is None:
        reasons["lora.alpha"] = "2·r"
        lora = lora.model_copy(update={"alpha": lora.resolved_alpha})
    check_context(config.data.max_length, spec)

    limit = available if available is not None else memory_limit(asked.max_memory, decisions.device)

    def need(micro: int, checkpointing: str) -> int:
        changed = asked.model_copy(update={"gradient_checkpointing": checkpointing})
        tried = config.model_copy(update={"train": changed})
        return sum(predict_memory(spec, tried, facts, decisions, micro, trainable).values())

    lean = "always" if asked.gradient_checkpointing == "always" else "never"
    rows_per_step = choose_rows_per_step(facts.rows)
    if asked.batch_size and asked.gradient_accumulation_steps:
        micro, accumulation = asked.batch_size, asked.gradient_accumulation_steps
    elif asked.batch_size:
        micro = asked.batch_size
        accumulation = max(1, round(rows_per_step / micro))
        reasons["train.gradient_accumulation_steps"] = f"about {rows_per_step} rows a step"
    elif asked.gradient_accumulation_steps:
        accumulation = asked.gradient_accumulation_steps
        micro = max(1, round(rows_per_step / accumulation))
        reasons["train.batch_size"] = f"about {rows_per_step} rows a step"
    else:
        micro, accumulation = rows_per_step, 1
        why = f"{facts.rows} rows: {rows_per_step} rows a step"
        mean = max(1, facts.tokens // max(1, facts.rows))
        while micro > 1 and (micro * mean > PASS_TOKENS or need(micro, lean) > SHARE * limit):
            micro = (micro + 1) // 2
        accumulation = math.ceil(rows_per_step / micro)
        if accumulation > 1:
            why += f", {micro} at a time"
        reasons["train.batch_size"] = why
        reasons["train.gradient_accumulation_steps"] = why
    if asked.gradient_checkpointing == "auto":
        without, with_it = need(micro, "never"), need(micro, "always")
        if without > SHARE * limit and with_it < without:
            lean = "always"
            reasons["train.gradient_checkpointing"] = (
                f"{human_bytes(without)} without it, {human_bytes(with_it)} with it, "
                f"{human_bytes(limit)} to use; a step takes about a third longer"
            )
        else:
            reasons["train.gradient_checkpointing"] = "not needed: there is memory enough"
    per_step = micro * accumulation
    per_epoch = max(1, math.ceil(facts.rows / per_step))
    epochs = asked.epochs
    if epochs is None:
        epochs, reasons["train.epochs"] = choose_epochs(facts.rows, facts.labelled_tokens)
        if asked.max_steps is not None and asked.max_steps > per_epoch * epochs:
            epochs = math.ceil(asked.max_steps / per_epoch)
            reasons["train.epochs"] = f"--max-steps {asked.max_steps} of {per_epoch} an epoch"
    steps = max(1, math.ceil(per_epoch * epochs))
    if asked.max_steps is not None:
        steps = min(steps, asked.max_steps)

    filled: dict[str, object] = {
        "epochs": epochs,
        "batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": lean,
    }
    if asked.optimizer != "adamw" and not decisions.device.startswith("cuda"):
        filled["optimizer"] = "adamw"
        reasons["train.optimizer"] = (
            f"{asked.optimizer} needs CUDA: AdamW with fp32 state instead, "
            f"{human_bytes(8 * trainable)} for {trainable:,} parameters"
        )

    def choose(name: str, value: object, why: str) -> None:
        if getattr(asked, name) is None:
            filled[name] = value
            reasons[f"train.{name}"] = why

    if asked.method == "lora":
        choose(
            "learning_rate",
            lora_learning_rate(spec.hidden_size, lora),
            f"5e-5·10·(2000/{spec.hidden_size})^0.78 at alpha {lora.scale * lora.r:g} "
            "(LoRA Without Regret)",
        )
    else:
        choose(
            "learning_rate",
            full_learning_rate(spec.hidden_size),
            f"5e-5·(2000/{spec.hidden_size})^0.78 for full fine-tuning",
        )
    choose("warmup_ratio", 0.05, "short: LoRA starts at zero change")
    choose("weight_decay", 0.01, "the guide's advice")
    choose("scheduler", "cosine", "falls to zero at the end")
    choose("log_every", max(1, steps // 50), "about 50 lines")
    passed = steps * per_step / max(1, facts.rows)  # epochs, also under --max-steps
    looks, why_looks = choose_looks(facts.rows, facts.held_out, passed)
    choose("eval_every", max(1, math.ceil(steps / looks)), why_looks)
    choose("save_every", max(1, min(500, math.ceil(steps / 10))), "about ten times")
    train = asked.model_copy(update=filled)
    resolved = config.model_copy(update={"lora": lora, "train": train})
    memory = predict_memory(spec, resolved, facts, decisions, micro, trainable)
    disk = predict_disk(trainable)
    longest = config.data.max_length or facts.longest
    plan = Plan(resolved, reasons, steps, per_step, trainable, memory, disk, longest)
    if plan.memory_total > limit:
        raise MemoryLimitError(
            f"this run needs about {human_bytes(plan.memory_total)}",
            got=f"{human_bytes(limit)} to use; "
            + ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items()),
            fix="; ".join(ways_out(spec, resolved, facts, decisions, trainable)),
        )
    return plan


def check_context(max_length: int | None, spec: ModelSpec) -> None:
    """Refuse rows longer than the base can see.

    Raises:
        UsageError: --max-length is above the base's context.
    """
    if max_length is not None and max_length > spec.context:
        raise UsageError(
            "--max-length is beyond the base's context",
            got=max_length,
            allowed=f"2…{spec.context}",
            fix=f"--max-length {spec.context}",
        )


def predict_memory(
    spec: ModelSpec,
    config: RunConfig,
    facts: Facts,
    decisions: Decisions,
    micro: int,
    trainable: int,
) -> dict[str, int]:
    """Bytes by part at the peak of a run whose passes hold `micro` rows (`tsugiki.memory`)."""
    # full fine-tuning holds its weights in fp32
    short = decisions.dtype in ("bfloat16", "float16") and config.train.method != "full"
    width = 2 if short else 4
    mean = facts.tokens / max(1, facts.rows)
    tokens = min(micro * facts.longest, int(micro * mean * 1.5) + facts.longest)
    labelled = math.ceil(tokens * facts.labelled_tokens / max(1, facts.tokens))
    batch = Pass(tokens, facts.longest, labelled)
    held_out = facts.held_out * facts.longest
    resident = CUDA_BYTES if decisions.device.startswith("cuda") else None
    int8 = decisions.compute == "int8" and config.train.method == "lora"
    fused = decisions.operations.get("tiles" if short else "attention") == "compiled"
    return predict(
        spec, config, batch, held_out, width, trainable, resident=resident, int8=int8, fused=fused
    )


def projection_bytes(spec: ModelSpec, quantize: str, decisions: Decisions) -> tuple[int, int]:
    """Bytes of the frozen projections in few bits, and in the compute type."""
    shape = replace(shape_of(spec), others=0)
    width = 2 if decisions.dtype in ("bfloat16", "float16") else 4
    return weight_bytes(shape, quantize, width), weight_bytes(shape, "none", width)


def compare_memory(
    spec: ModelSpec, config: RunConfig, facts: Facts, decisions: Decisions
) -> dict[str, int]:
    """Bytes at the peak of this run as full fine-tuning, LoRA, and LoRA on a base in four bits.

    The latter two are left out where --targets cannot be adapted: full fine-tuning needs none.
    """
    needs = {}
    for name, method, quantize in (
        ("full", "full", "none"), ("LoRA", "lora", "none"), ("QLoRA", "lora", "nf4"),
    ):  # fmt: skip
        changed = config.model_copy(
            update={
                "train": config.train.model_copy(update={"method": method}),
                "model": config.model.model_copy(update={"quantize": quantize}),
            }
        )
        count = spec.parameters
        if method == "lora":
            count = count_lora(spec, config.lora.r, config.lora.targets)
            if not count:
                continue
        micro = config.train.batch_size or 1
        parts = predict_memory(spec, changed, facts, decisions, micro, count)
        needs[name] = sum(parts.values())
    return needs


def predict_disk(trainable: int) -> int:
    """Bytes a run writes at most: two checkpoints and one being written, the best, the rest."""
    per_checkpoint = trainable * 12
    return 3 * per_checkpoint + 2 * trainable * 4 + (16 << 20)


def ways_out(
    spec: ModelSpec, config: RunConfig, facts: Facts, decisions: Decisions, trainable: int
) -> list[str]:
    """What to do about too little memory as flags, what saves most first, each with its need;
    nothing that saves nothing."""
    train, lora = config.train, config.lora
    ways: list[tuple[str, RunConfig, Facts, int]] = []

    def way(flags: str, section: str, changes: dict[str, object], **more: Any) -> None:
        part = getattr(config, section).model_copy(update=changes)
        changed = config.model_copy(update={section: part})
        ways.append((flags, changed, more.get("facts", facts), more.get("count", trainable)))

    if train.method == "full":
        lean = count_lora(spec, lora.r, "all-linear")
        way("--method lora", "train", {"method": "lora"}, count=lean)
    else:
        if config.model.quantize == "none":
            way("--quantize nf4", "model", {"quantize": "nf4"})
        if lora.r > 8:
            way("--lora-r 8", "lora", {"r": 8}, count=trainable * 8 // lora.r)
        if lora.targets != "minimal" and (few := count_lora(spec, lora.r, "minimal")):
            way("--targets minimal", "lora", {"targets": "minimal"}, count=few)
    if train.gradient_checkpointing != "always":
        flags = "--gradient-checkpointing always"
        way(flags, "train", {"gradient_checkpointing": "always"})
    if (train.batch_size or 1) > 1:
        rows = (train.batch_size or 1) * (train.gradient_accumulation_steps or 1)
        flags = f"--batch-size 1 --gradient-accumulation-steps {rows}"
        way(flags, "train", {"batch_size": 1})
    if facts.longest > 256:
        half = facts.longest // 2
        way(f"--max-length {half}", "data", {"max_length": half}, facts=facts.cut(half))

    def need(changed: RunConfig, seen: Facts, count: int) -> int:
        micro = changed.train.batch_size or 1
        return sum(predict_memory(spec, changed, seen, decisions, micro, count).values())

    now = need(config, facts, trainable)
    needs = sorted((need(changed, seen, count), flags) for flags, changed, seen, count in ways)
    less = [f"{flags} ({human_bytes(size)})" for size, flags in needs if size < now]
    return [*less, "a smaller base"]


def out_of_memory(
    plan: Plan, spec: ModelSpec, facts: Facts, decisions: Decisions, folder: Path
) -> MemoryLimitError:
    """What to raise where a run in a folder got no more memory: the ways out, and how to go on."""
    ways = "; ".join(ways_out(spec, plan.config, facts, decisions, plan.trainable))
    return MemoryLimitError(
        "out of memory",
        got=f"predicted {human_bytes(plan.memory_total)}",
        fix=f"{ways}; or free memory and go on: tsugiki train --resume {folder}",
    )


def count_lora(spec: ModelSpec, r: int, targets: str | Sequence[str]) -> int:
    """Parameters of an adapter from shapes alone; 0 where the targets cannot be adapted."""
    try:
        found = resolve_targets(spec.meta_model(), targets)
    except AdapterError:
        return 0
    return sum(target.count(r) for target in found)


def memory_limit(asked: str | None, device: str) -> int:
    """Bytes that the process may hold: what was asked for, else what it holds and what is free."""
    if asked is not None:
        return parse_bytes(asked)
    own = 0 if device.startswith("cuda") else int(psutil.Process().memory_info().rss)
    return free_memory(device) + own


def free_memory(device: str) -> int:
    """Bytes left: free GPU memory, or what the machine or container has."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return memory_left()
