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
from transformers import PreTrainedTokenizerBase

from tsugiki import supervise
from tsugiki.config import RunConfig, Section
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared, prepare
from tsugiki.data.formats import Rows
from tsugiki.device import Decisions, decide
from tsugiki.errors import UsageError, ran_out
from tsugiki.files import read_json, require_space
from tsugiki.fitting import check_ids, count_trainable, facts_of, fit_to_memory
from tsugiki.kernels import int8
from tsugiki.kernels.backend import replay
from tsugiki.models.fingerprint import fingerprint_folder
from tsugiki.models.load import (
    Base,
    ResolvedModel,
    load_base,
    load_tokenizer,
    origin_of,
)
from tsugiki.models.shards import whole_shards
from tsugiki.models.spec import ModelSpec
from tsugiki.planning import (
    Plan,
    check_context,
    make_plan,
    out_of_memory,
)
from tsugiki.showing import show_plan, show_rows
from tsugiki.sources import FEW_BITS, Sources, find_sources
from tsugiki.terminal import Terminal
from tsugiki.training.checkpoint import refuse_changes, saved_identity
from tsugiki.training.events import TrainResult
from tsugiki.training.keeping import run_identity
from tsugiki.training.loop import train
from tsugiki.training.place import refuse_used
from tsugiki.watching import tell


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
    sources: Sources | None = None,
) -> TrainResult | None:
    """Read, plan, show, train.

    Args:
        config: what was asked; open values are chosen by the planner.
        resume: a run folder to go on with; its config is already merged into `config`.
        dry_run: stop before weights are loaded.
        sources: what this config names, where it was read already.

    Raises:
        TsugikiError: anything a user can mend, before the first step where possible.
    """
    if resume is None and config.output is not None:
        refuse_used(config.output)
    session = prepare_session(config, terminal, resume, sources)
    if resume is not None:
        _refuse_another(session, resume)
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
        terminal.note(note)
    supervise.tell_parent(run=str(folder.absolute()))
    return base, _train(session, base, folder, terminal, resumed=resumed)


def _refuse_another(session: Session, run: Path) -> None:
    """Raises RunError: what goes on would be another run; told before its weights are loaded."""
    saved = saved_identity(run / "checkpoints")
    if saved is None:
        return
    folder, spec, plan = session.resolved.folder, session.spec, session.plan
    origin = origin_of(folder, None)
    if origin is None:
        whole_shards(folder)
    prints = origin.fingerprint if origin else fingerprint_folder(folder, spec.meta_model())
    ranks = saved.get("ranks", 1)  # known where they run
    now = run_identity(plan.config, session.prepared, prints.exact, plan.steps, ranks)
    refuse_changes(saved, now)


def prepare_session(
    config: RunConfig, terminal: Terminal, resume: Path | None, sources: Sources | None = None
) -> Session:
    """Everything before weights: base found, rows read and proven, values chosen."""
    sources = sources or find_sources(config, terminal, resumed=resume is not None)
    config, resolved = sources.config, sources.resolved
    origin = origin_of(resolved.folder, config.model.quantize)
    if origin is not None:
        kept = config.model.model_copy(update={"quantize": origin.method})
        config = config.model_copy(update={"model": kept})
        if config.train.method == "full":
            raise UsageError(
                FEW_BITS, got=f"--method full with {resolved.folder}, {origin.method}",
                fix=f"--model {origin.name or 'the base that it was made of'}",
            )  # fmt: skip
    spec = ModelSpec.from_folder(resolved.folder, trust_remote_code=config.model.trust_remote_code)
    check_context(config.data.max_length, spec)
    tokenizer = load_tokenizer(resolved, trust_remote_code=config.model.trust_remote_code)
    chat = ChatFormat.of(tokenizer, config.data.template, config.data.template_date)
    if chat.date is not None:  # kept with the run: it goes on with the day that it began with
        dated = config.data.model_copy(update={"template_date": chat.date})
        config = config.model_copy(update={"data": dated})
    asked = config.model
    if resume is not None and (resume / "decisions.json").exists():
        decisions = Decisions.from_json(read_json(resume / "decisions.json"))
        if asked.compute == "bf16":  # the way out of a run whose int8 gradients were refused
            decisions = dataclasses.replace(decisions, compute="bf16")
    else:
        decisions = decide(
            asked.device, asked.dtype, hidden_size=spec.hidden_size, compute=asked.compute,
            int8_speedup=int8.int8_speedup,
        )  # fmt: skip
    for name, value in (("device", decisions.device), ("dtype", decisions.dtype)):
        if getattr(asked, name) not in ("auto", value):
            terminal.warn(f"--{name} {getattr(asked, name)}: this run goes on as it began, {value}")
    if asked.compute != decisions.compute:
        why = decisions.reasons.get("compute", "a run keeps the products that it began with")
        terminal.warn(f"--compute {asked.compute}: {why}")
    decisions.apply()
    place = torch.device(decisions.device)
    found, lost = replay(decisions.operations, place, decisions.torch_dtype)
    decisions = dataclasses.replace(decisions, operations=found)
    if lost:
        terminal.warn(lost)
    rows, held_out = sources.rows, sources.held_out
    prepared = prepare_rows(config, rows, held_out, chat, spec.context)
    facts = facts_of(prepared)
    length = fit_to_memory(config, spec, facts, decisions, resumed=resume is not None)
    if length.cut:
        shorter = config.data.model_copy(update={"max_length": length.tokens})
        config = config.model_copy(update={"data": shorter})
        prepared = prepare_rows(config, rows, held_out, chat, spec.context)
    check_ids(prepared, chat, spec, config.train.sample_prompt)
    show_rows(rows, prepared, tokenizer, terminal)
    trainable = count_trainable(config, spec)
    stored = config.model_copy(update=lasting(config, resolved))
    plan = make_plan(stored, spec, facts_of(prepared), decisions, trainable=trainable)
    if length.reason:
        plan.reasons["data.max_length"] = length.reason
    return Session(resolved, tokenizer, chat, spec, prepared, decisions, plan)


def prepare_rows(
    config: RunConfig, rows: Rows, held_out: Rows | None, chat: ChatFormat, context: int
) -> Prepared:
    """The examples that a run trains on and holds out.

    Args:
        held_out: rows of `--eval-data`, if it was given.
        context: tokens that the base can see.

    Raises:
        DataError: nothing to train on.
    """
    return prepare(
        rows,
        chat,
        max_length=config.data.max_length or context,
        long=config.data.long,
        train_on=config.data.train_on,
        eval_rows=held_out,
        eval_ratio=config.data.eval_ratio,
        seed=config.train.seed,
        strict=config.data.strict,
    )


def lasting(config: RunConfig, resolved: ResolvedModel) -> dict[str, Section]:
    """Sections that mean the same data and base from any folder and on any day, for a resume."""
    data = config.data
    paths = {
        key: value.absolute()
        for key, value in (("path", data.path), ("eval_data", data.eval_data))
        if value is not None
    }
    name = None if config.model.name is None else resolved.lasting_name
    revision = resolved.commit or config.model.revision
    return {
        "data": data.model_copy(update=paths),
        "model": config.model.model_copy(update={"name": name, "revision": revision}),
    }


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
