"""Config + model shapes + row counts + machine → a plan with a reason for every chosen value.

Touches no weights. Everything that `None` left open in the config is chosen here, so that the
run folder's `config.yaml` holds no open value. Knows nothing of how training is carried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from tsugiki.config import LoraConfig, RunConfig
from tsugiki.device import Decisions
from tsugiki.errors import MemoryLimitError, UsageError
from tsugiki.files import human_bytes
from tsugiki.models.spec import ModelSpec

# Measured once on a bare process: interpreter, torch, transformers, tokenizer.
PROCESS_BYTES = 450 << 20
# Rows of one forward pass stop growing here: beyond it a CPU gains nothing.
PASS_TOKENS = 4096
INT8_SCRATCH = 64 << 20
ADAM_BYTES = 16  # fp32 master, gradient and two moments of one trained parameter


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of the rows: counts after lengths were fitted."""

    rows: int
    labelled_tokens: int
    tokens: int
    longest: int
    held_out: int


@dataclass(frozen=True)
class Plan:
    """A config without open values, the reason of each chosen one, and what it will cost."""

    config: RunConfig
    reasons: dict[str, str]
    steps: int
    rows_per_step: int
    memory: dict[str, int]
    disk: int

    @property
    def memory_total(self) -> int:
        """Predicted peak bytes (RSS on a CPU, allocated on a GPU)."""
        return sum(self.memory.values())


def lora_learning_rate(hidden_size: int, lora: LoraConfig) -> float:
    """Peak rate for a LoRA run by width and scale: 5e-5 · 10 · (2000 / H)^0.78 · 32 / (scale · r).

    The first three factors are the rule published with "LoRA Without Regret" (Thinking Machines,
    2025; `get_lr` of its cookbook) for alpha 32 with scale alpha/r, under which the best rate does
    not depend on the rank; the last carries it to other alphas and to rsLoRA.
    """
    rate = 5e-5 * 10 * (2000 / hidden_size) ** 0.78 * 32 / (lora.scale * lora.r)
    return float(f"{rate:.2g}")


def full_learning_rate(hidden_size: int) -> float:
    """Peak rate for full fine-tuning: the LoRA rule without its factor of ten (same source)."""
    return float(f"{5e-5 * (2000 / hidden_size) ** 0.78:.2g}")


def choose_rows_per_step(rows: int) -> int:
    """Rows of one optimiser step: small data needs steps more than smooth gradients."""
    return next(count for limit, count in ((200, 4), (1000, 8), (math.inf, 16)) if rows < limit)


def choose_epochs(rows: int) -> float:
    """Passes over the rows; the best held-out state is kept, so too many cost only time."""
    return next(
        count for limit, count in ((200, 8), (1000, 6), (10000, 4), (math.inf, 2)) if rows < limit
    )


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
        available: bytes that may be used; the free memory of the machine when None.

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

    memory_left = available if available is not None else free_memory(decisions.device)
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
        while micro > 1 and (
            micro * mean > PASS_TOKENS
            or sum(predict_memory(spec, config, facts, decisions, micro, trainable).values())
            > 0.8 * memory_left
        ):
            micro = (micro + 1) // 2
        accumulation = math.ceil(rows_per_step / micro)
        if accumulation > 1:
            why += f", {micro} at a time"
        reasons["train.batch_size"] = why
        reasons["train.gradient_accumulation_steps"] = why
    per_step = micro * accumulation
    epochs = asked.epochs
    if epochs is None:
        epochs = choose_epochs(facts.rows)
        reasons["train.epochs"] = f"{facts.rows} rows; the best held-out state is kept"
    per_epoch = max(1, math.ceil(facts.rows / per_step))
    steps = max(1, math.ceil(per_epoch * epochs))
    if asked.max_steps is not None:
        steps = min(steps, asked.max_steps)

    filled: dict[str, object] = {
        "epochs": epochs,
        "batch_size": micro,
        "gradient_accumulation_steps": accumulation,
    }

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
    choose("eval_every", max(1, math.ceil(steps / 10)), "about ten times")
    choose("save_every", max(1, min(500, math.ceil(steps / 10))), "about ten times")
    train = asked.model_copy(update=filled)
    resolved = config.model_copy(update={"lora": lora, "train": train})
    memory = predict_memory(spec, resolved, facts, decisions, micro, trainable)
    plan = Plan(resolved, reasons, steps, per_step, memory, predict_disk(spec, resolved, trainable))
    if plan.memory_total > memory_left:
        raise MemoryLimitError(
            f"this run needs about {human_bytes(plan.memory_total)}",
            got=f"{human_bytes(memory_left)} free; "
            + ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items()),
            fix="; ".join(ways_out(resolved, facts)),
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
    """Bytes by part at the peak of a step.

    Activations per token and layer follow the saved set of the unfused path: inputs of the
    projections, queries, keys, values, attention output, three MLP streams and the norms' fp32
    copies; the head keeps one chunk of logits.
    """
    width = 2 if decisions.dtype in ("bfloat16", "float16") else 4
    longest = facts.longest
    mean = facts.tokens / max(1, facts.rows)
    tokens = min(micro * longest, int(micro * mean * 1.5) + longest)
    k, kv, m = spec.hidden_size, spec.kv_heads * spec.head_dim, spec.intermediate_size
    per_token = width * (12 * k + 6 * kv + 6 * m) + 4 * 4 * k
    full = config.train.method == "full"
    codes = {"int8 codes": spec.parameters + INT8_SCRATCH} if decisions.compute == "int8" else {}
    return {
        "process": PROCESS_BYTES,
        "weights": spec.parameters * (4 if full else width),
        **codes,
        "trained": trainable * (ADAM_BYTES - 4 if full else ADAM_BYTES),
        "activations": int(tokens * spec.layers * per_token),
        "head": min(tokens, 1024) * spec.vocab_size * 12,
    }


def predict_disk(spec: ModelSpec, config: RunConfig, trainable: int) -> int:
    """Bytes a run writes at most: two checkpoints and one being written, the best, the rest."""
    per_checkpoint = trainable * 12
    return 3 * per_checkpoint + 2 * trainable * 4 + (16 << 20)


def ways_out(config: RunConfig, facts: Facts) -> list[str]:
    """What to do about too little memory, strongest first, as flags."""
    ways = []
    if (config.train.batch_size or 2) > 1:
        ways.append("--batch-size 1 --gradient-accumulation-steps 16")
    if facts.longest > 256:
        ways.append(f"--max-length {facts.longest // 2}")
    if config.train.method == "full":
        ways.append("--method lora")
    if config.lora.targets != "minimal":
        ways.append("--targets minimal")
    if config.lora.r > 8:
        ways.append("--lora-r 8")
    ways.append("a smaller base")
    return ways


def free_memory(device: str) -> int:
    """Bytes that a run may use: free GPU memory, or what the machine or container has left."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    left = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            left = min(left, int(limit) - used)
    except (OSError, ValueError):
        pass
    return left
