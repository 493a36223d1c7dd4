"""What needs several stages: from a config to a trained adapter, told as it goes.

The CLI, the demo and `tsugiki.train` call `run_training`. Knows the order of the stages and what
a user wants to read between them; each stage's work is in its own room.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tsugiki import supervise
from tsugiki.adapters.targets import resolve_targets
from tsugiki.config import RunConfig, Section
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared, prepare
from tsugiki.data.formats import Rows, read_rows
from tsugiki.data.report import counts_table, show
from tsugiki.device import Decisions, decide
from tsugiki.errors import DataError, UsageError, ran_out
from tsugiki.files import human_bytes, read_json, require_space
from tsugiki.kernels.backend import describe, replay
from tsugiki.models.load import (
    Base,
    ResolvedModel,
    load_base,
    load_tokenizer,
    origin_of,
    resolve_model,
)
from tsugiki.models.spec import ModelSpec
from tsugiki.planning import (
    Facts,
    Plan,
    check_context,
    compare_memory,
    make_plan,
    out_of_memory,
    projection_bytes,
)
from tsugiki.terminal import Terminal
from tsugiki.training.events import TrainResult
from tsugiki.training.loop import train
from tsugiki.watching import tell

SHOWN_SKIPS = 8


@dataclass(frozen=True)
class Session:
    """What was read and decided before weights are loaded."""

    resolved: ResolvedModel
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    spec: ModelSpec
    prepared: Prepared
    decisions: Decisions
    plan: Plan


def run_training(
    config: RunConfig,
    terminal: Terminal,
    *,
    resume: Path | None = None,
    dry_run: bool = False,
) -> TrainResult | None:
    """Read, plan, show, train.

    Args:
        config: what was asked; open values are chosen by the planner.
        resume: a run folder to go on with; its config is already merged into `config`.
        dry_run: stop before weights are loaded.

    Raises:
        TsugikiError: anything a user can mend, before the first step where possible.
    """
    session = prepare_session(config, terminal, resume)
    show_plan(session, terminal)
    if dry_run:
        terminal.say("dry_run", "dry run: nothing was trained")
        return None
    folder = resume or session.plan.config.output or _run_folder(session)
    return run_prepared(session, folder, terminal, resumed=resume is not None)[1]


def run_prepared(
    session: Session,
    folder: Path,
    terminal: Terminal,
    *,
    resumed: bool = False,
    random_init: bool = False,
) -> tuple[Base, TrainResult]:
    """Load the weights and train; the base comes back with its last state attached.

    Args:
        random_init: the base's shape with fresh weights (a control for proofs).
    """
    require_space(folder, session.plan.disk, "the run")
    full = session.plan.config.train.method == "full"
    base = load_base(
        session.resolved,
        dtype=torch.float32 if full else session.decisions.torch_dtype,
        device=session.decisions.device,
        trust_remote_code=session.plan.config.model.trust_remote_code,
        random_init=random_init,
        quantize=session.plan.config.model.quantize,
    )
    for note in base.notes:
        terminal.say("note", Text(note, style="dim"), text=note)
    supervise.name_run(folder.absolute())
    return base, _train(session, base, folder, terminal, resumed=resumed)


def prepare_session(config: RunConfig, terminal: Terminal, resume: Path | None) -> Session:
    """Everything before weights: base found, rows read and proven, values chosen."""
    if config.train.method == "full" and config.model.quantize != "none":
        raise UsageError(
            "full fine-tuning changes every weight, and weights in few bits cannot be changed",
            got=f"--method full --quantize {config.model.quantize}",
            fix="leave one of them out",
        )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": find_data(config)})}
    )
    resolved = resolve_model(config.model.name, config.model.revision)
    if config.model.name is None:
        text = "no --model given: training sprout, the small practice model that comes with tsugiki"
        terminal.say("note", Text(text, style="dim"), text=text)
    origin = origin_of(resolved.folder, config.model.quantize)
    if origin is not None:
        kept = config.model.model_copy(update={"quantize": origin.method})
        config = config.model_copy(update={"model": kept})
    spec = ModelSpec.from_folder(resolved.folder, trust_remote_code=config.model.trust_remote_code)
    check_context(config.data.max_length, spec)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.model.trust_remote_code)
    chat = ChatFormat.of(tokenizer, config.data.template)
    asked = config.model
    if asked.compute == "int8" and config.train.method == "full":
        raise UsageError("--compute int8 is for a frozen base", fix="--method lora")
    if resume is not None and (resume / "decisions.json").exists():
        decisions = Decisions.from_json(read_json(resume / "decisions.json"))
        if asked.compute == "bf16":  # the way out of a run whose int8 gradients were refused
            decisions = dataclasses.replace(decisions, compute="bf16")
    else:
        decisions = decide(
            asked.device, asked.dtype, hidden_size=spec.hidden_size, compute=asked.compute
        )
    if asked.compute != decisions.compute:
        why = decisions.reasons.get("compute", "a run keeps the products that it began with")
        terminal.warn(f"--compute {asked.compute}: {why}")
    decisions.apply()
    place = torch.device(decisions.device)
    found, lost = replay(decisions.operations, place, decisions.torch_dtype)
    decisions = dataclasses.replace(decisions, operations=found)
    if lost:
        terminal.warn(lost)
    rows, prepared = prepare_rows(config, chat, spec.context)
    show_rows(rows, prepared, tokenizer, terminal)
    trainable = count_trainable(config, spec)
    stored = config.model_copy(update=absolute_paths(config))
    plan = make_plan(stored, spec, facts_of(prepared), decisions, trainable=trainable)
    return Session(resolved, tokenizer, chat, spec, prepared, decisions, plan)


def prepare_rows(config: RunConfig, chat: ChatFormat, context: int) -> tuple[Rows, Prepared]:
    """The rows that a run trains on and holds out.

    Args:
        context: tokens that the base can see.

    Raises:
        DataError: a file that cannot be read, or nothing to train on.
    """
    rows = _read(config)
    prepared = prepare(
        rows,
        chat,
        max_length=config.data.max_length or context,
        long=config.data.long,
        train_on=config.data.train_on,
        eval_rows=_read_eval(config),
        eval_ratio=config.data.eval_ratio,
        seed=config.train.seed,
        strict=config.data.strict,
    )
    return rows, prepared


def absolute_paths(config: RunConfig) -> dict[str, Section]:
    """Sections whose local paths hold from any folder, so that a resume finds them again."""
    data, name = config.data, config.model.name
    paths = {
        key: value.absolute()
        for key, value in (("path", data.path), ("eval_data", data.eval_data))
        if value is not None
    }
    if name is not None and Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().absolute())
    return {
        "data": data.model_copy(update=paths),
        "model": config.model.model_copy(update={"name": name}),
    }


def find_data(config: RunConfig) -> Path:
    """The data that was named, else the only file in `data/`.

    Raises:
        DataError: nothing named and not exactly one file there.
    """
    if config.data.path is not None:
        return config.data.path
    found = [p for p in sorted(Path("data").glob("*")) if p.is_file() and p.name[0] != "."]
    if len(found) != 1:
        raise DataError(
            "no data was named",
            got=f"{len(found)} files in data/" if found else "no file in data/",
            fix="tsugiki train my.jsonl",
        )
    return found[0]


def _read(config: RunConfig) -> Rows:
    assert config.data.path is not None
    return read_rows(
        config.data.path,
        columns=config.data.columns,
        prompt_template=config.data.prompt_template,
        answer_template=config.data.answer_template,
        strict=config.data.strict,
    )


def _read_eval(config: RunConfig) -> Rows | None:
    if config.data.eval_data is None:
        return None
    return read_rows(
        config.data.eval_data,
        columns=config.data.columns,
        prompt_template=config.data.prompt_template,
        answer_template=config.data.answer_template,
        strict=config.data.strict,
    )


def facts_of(prepared: Prepared) -> Facts:
    """The counts that planning needs."""
    examples = prepared.train
    return Facts(
        rows=len(examples),
        labelled_tokens=sum(sum(label != -100 for label in e.labels) for e in examples),
        tokens=sum(len(e.ids) for e in examples),
        longest=max(len(e.ids) for e in (*examples, *prepared.held_out)),
        held_out=len(prepared.held_out),
    )


def count_trainable(config: RunConfig, spec: ModelSpec) -> int:
    """Parameters that will be trained, from shapes alone."""
    if config.train.method == "full":
        return spec.parameters
    targets = resolve_targets(spec.meta_model(), config.lora.targets)
    return sum(config.lora.r * (t.in_features + t.out_features) for t in targets)


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


def show_plan(session: Session, terminal: Terminal) -> None:
    """What will be trained, why each value was chosen, and what it will cost."""
    plan, config = session.plan, session.plan.config
    terminal.heading("Plan")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    values = {**_flat("train", config.train), **_flat("lora", config.lora)}
    table.add_row("base", f"{session.resolved.name} ({session.spec.parameters:,} parameters)", "")
    trainable = count_trainable(config, session.spec)
    share = (
        100 * trainable / (session.spec.parameters + trainable * (config.train.method == "lora"))
    )
    if config.train.method == "lora":
        targets = resolve_targets(session.spec.meta_model(), config.lora.targets)
        by_name: dict[str, list[int]] = {}
        for target in targets:
            size = config.lora.r * (target.in_features + target.out_features)
            by_name.setdefault(target.path.rsplit(".", 1)[-1], []).append(size)
        for name, sizes in by_name.items():
            table.add_row(f"  {name}", f"{len(sizes)} × {sizes[0]:,} = {sum(sizes):,}", "")
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
        trainable=trainable,
        memory=plan.memory,
        memory_by_method=ways,
        disk=plan.disk,
    )


def _flat(section: str, values: object) -> dict[str, object]:
    return {f"{section}.{name}": value for name, value in values.__dict__.items()}


def _run_folder(session: Session) -> Path:
    name = session.resolved.name.rstrip("/").split("/")[-1]
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _train(
    session: Session, base: Base, folder: Path, terminal: Terminal, *, resumed: bool
) -> TrainResult:
    terminal.heading("Training")
    watch = f"watch it: tail -f {folder}/metrics.jsonl, or open {folder}/report.html"
    terminal.say("run", watch, folder=str(folder), resumed=resumed)
    events = train(
        session.plan.config,
        session.decisions,
        base,
        session.prepared,
        session.chat,
        folder,
        resume=resumed,
        total_steps=session.plan.steps,
        info={"reasons": session.plan.reasons, "memory": session.plan.memory},
    )
    told = (session.plan, session.spec, facts_of(session.prepared), session.decisions)
    try:
        return tell(events, terminal, folder)
    except (MemoryError, RuntimeError) as error:
        if ran_out(error):
            raise out_of_memory(*told, folder) from error
        raise
