"""What a user reads before a run: the rows as the model sees them, and the plan with its reasons.

Knows rich and what was read and decided; reads and decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tsugiki.adapters.targets import left_out, resolve_targets
from tsugiki.data.dataset import Prepared
from tsugiki.data.formats import Rows
from tsugiki.data.report import counts_table, show
from tsugiki.files import human_bytes
from tsugiki.fitting import facts_of
from tsugiki.kernels.backend import describe
from tsugiki.models.spec import ModelSpec
from tsugiki.planning import compare_memory, projection_bytes
from tsugiki.terminal import Terminal

if TYPE_CHECKING:
    from tsugiki.pipelines import Session

SHOWN_SKIPS = 8


def show_rows(
    rows: Rows, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, terminal: Terminal
) -> None:
    """Kept and skipped rows, and two of them as the model sees them."""
    terminal.heading("Rows")
    terminal.say("rows", counts_table(prepared), layout=rows.layout, counts=prepared.counts)
    for skip in prepared.skipped[:SHOWN_SKIPS]:
        terminal.say(
            "skipped",
            Text(f"  skipped {skip.source}: {skip.reason}", style="yellow"),
            source=skip.source,
            reason=skip.reason,
        )
    if len(prepared.skipped) > SHOWN_SKIPS:
        more = len(prepared.skipped) - SHOWN_SKIPS
        terminal.say("note", f"  … and {more} more (tsugiki data check lists all)", text="")
    for example in prepared.train[:2]:
        plain = not terminal.console.color_system
        terminal.say(
            "example",
            show(example, tokenizer, plain=plain),
            source=example.source,
            ids=list(example.ids),
            labels=list(example.labels),
        )


def _without(spec: ModelSpec, targets: object) -> Iterator[tuple[str, str]]:
    """What `all-linear` goes without: last name and why, once each."""
    found = left_out(spec.meta_model()) if targets == "all-linear" else {}
    yield from {path.rsplit(".", 1)[-1]: reason for path, reason in found.items()}.items()


def show_plan(session: Session, terminal: Terminal) -> None:
    """What will be trained, why each value was chosen, and what it will cost."""
    plan, config = session.plan, session.plan.config
    terminal.heading("Plan")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    values = {**_flat("train", config.train), **_flat("lora", config.lora)}
    table.add_row("base", f"{session.resolved.name} ({session.spec.parameters:,} parameters)", "")
    trainable = plan.trainable
    share = (
        100 * trainable / (session.spec.parameters + trainable * (config.train.method == "lora"))
    )
    if config.train.method == "lora":
        targets = resolve_targets(session.spec.meta_model(), config.lora.targets)
        by_name: dict[str, list[int]] = {}
        for target in targets:
            by_name.setdefault(target.path.rsplit(".", 1)[-1], []).append(
                target.count(config.lora.r)
            )
        for name, sizes in by_name.items():
            table.add_row(f"  {name}", f"{len(sizes)} × {sizes[0]:,} = {sum(sizes):,}", "")
        for name, reason in _without(session.spec, config.lora.targets):
            table.add_row(f"  {name}", "not adapted", reason)
    table.add_row("trained", f"{trainable:,} parameters ({share:.2f} %)", "")
    if config.model.quantize != "none":
        kept, of = projection_bytes(session.spec, config.model.quantize, session.decisions)
        table.add_row(
            "quantize", config.model.quantize,
            f"projections in {human_bytes(kept)} instead of {human_bytes(of)}",
        )  # fmt: skip
    for name in ("device", "dtype", "threads"):
        reason = session.decisions.reasons.get(name, "")
        table.add_row(name, str(getattr(session.decisions, name)), reason)
    device = torch.device(session.decisions.device)
    table.add_row("kernels", *describe(device, session.decisions.torch_dtype))
    if session.decisions.compute == "int8":
        table.add_row("compute", "int8", session.decisions.reasons.get("compute", ""))
    for name, value in values.items():
        if value is not None and name != "train.sample_prompt":
            table.add_row(name.split(".")[1], str(value), plan.reasons.get(name, ""))
    why = plan.reasons.get("data.max_length", "")
    table.add_row("max_length", f"{plan.longest:,} tokens", why)
    table.add_row("steps", f"{plan.steps:,} of {plan.rows_per_step} rows", "")
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.memory.items())
    table.add_row("memory", f"about {human_bytes(plan.memory_total)}", parts)
    ways = compare_memory(session.spec, config, facts_of(session.prepared), session.decisions)
    shown = " : ".join(f"{name} {human_bytes(size)}" for name, size in ways.items())
    table.add_row("", shown, "what this run would need either way")
    table.add_row("disk", f"up to {human_bytes(plan.disk)}", "")
    terminal.say(
        "plan",
        table,
        config=config.model_dump(mode="json"),
        reasons=plan.reasons,
        decisions=session.decisions.to_json(),
        steps=plan.steps,
        max_length=plan.longest,
        trainable=trainable,
        memory=plan.memory,
        memory_by_method=ways,
        disk=plan.disk,
    )


def _flat(section: str, values: object) -> dict[str, object]:
    return {f"{section}.{name}": value for name, value in values.__dict__.items()}
