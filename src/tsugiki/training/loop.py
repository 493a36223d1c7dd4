"""The training loop: one function, read from top to bottom, that tells what it does as events.

LoRA or full fine-tuning, alone or as one of several ranks; the arithmetic of a step is step.py's.
Knows no command line and prints nothing.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tsugiki.adapters.attach import attach, training_mode
from tsugiki.config import RunConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.example import Example
from tsugiki.data.loader import Loader
from tsugiki.device import Decisions
from tsugiki.errors import Interrupted, RunError
from tsugiki.files import RunLock, atomic_write, sweep_temporary, write_json
from tsugiki.models.checkpointing import checkpoint_layers
from tsugiki.models.load import Base
from tsugiki.training import metrics
from tsugiki.training.checkpoint import newest_whole, refuse_changes, save_checkpoint
from tsugiki.training.events import (
    Advice,
    Evaluated,
    Event,
    Finished,
    Logged,
    Noted,
    Resumed,
    Sampled,
    Saved,
    TrainResult,
)
from tsugiki.training.gradients import few_passes, settle, told_by
from tsugiki.training.keeping import (
    base_identity,
    keep_state,
    report,
    run_identity,
    told,
)
from tsugiki.training.objective import held_out_loss, summed_loss
from tsugiki.training.place import refuse_used
from tsugiki.training.ranks import ranks
from tsugiki.training.samples import answer_all, choose_prompts
from tsugiki.training.scaling import needs_scaling
from tsugiki.training.schedule import learning_rate
from tsugiki.training.signals import Signals, Stopped
from tsugiki.training.state import Progress, pack, unpack
from tsugiki.training.step import make_optimizer, not_finite, optimiser_step
from tsugiki.training.watch import Watch


def train(
    config: RunConfig,
    decisions: Decisions,
    base: Base,
    prepared: Prepared,
    chat: ChatFormat,
    folder: Path,
    *,
    total_steps: int,
    resume: bool = False,
    info: dict[str, Any] | None = None,
) -> Iterator[Event]:
    """Train `base` in place and keep the best state in `folder`.

    Args:
        config: without open values (`planning.make_plan`).
        decisions: device, dtype, threads; stored, and replayed on resume by the caller.
        total_steps: optimiser steps of the whole run.
        resume: go on from the newest whole checkpoint of `folder`.
        info: more for training_info.json.

    Yields:
        Events; the last is `Finished`.

    Raises:
        RunError: the folder holds a run already or is being written; a resume of another run.
        NonFiniteError: NaN or inf in loss or gradients, before the update.
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
        DiskError: a save failed; the state before it is intact.
    """
    settings = config.train
    model, device = base.model, base.device
    among = ranks(device)
    if among.first and not resume:
        refuse_used(folder)
    with RunLock(folder) if among.first else contextlib.nullcontext():
        torch.manual_seed(settings.seed + among.rank)  # dropout differs between ranks
        if settings.method == "lora":
            generator = torch.Generator().manual_seed(settings.seed)
            attach(model, config.lora, generator=generator)
            yield Noted(base.make_fast())
            if decisions.compute == "int8":
                yield Noted(base.use_int8())
        else:
            model.requires_grad_(True)
        if settings.gradient_checkpointing == "always":
            checkpoint_layers(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(
            trained, settings.weight_decay or 0.0, device, settings.optimizer
        )
        assert settings.batch_size is not None
        assert settings.gradient_accumulation_steps is not None
        loader = Loader(
            prepared.train,
            micro_batch=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps * among.world,
            seed=settings.seed,
        )
        identity, names = base_identity(base), base.names()
        same = run_identity(config, prepared, identity.exact, total_steps, among.world)
        progress = Progress()
        if resume:
            found, notes = newest_whole(folder / "checkpoints")
            if found is not None:
                refuse_changes(found.state["identity"], same)
                progress = unpack(
                    found.tensors, found.state, trained, optimizer, loader, str(device), among
                )
            else:
                notes.append("no whole checkpoint yet: beginning again from step 0")
            yield Resumed(progress.step, tuple(notes))
        if among.first:
            sweep_temporary(folder)
            if not resume:
                atomic_write(folder / "config.yaml", config.to_yaml())
            write_json(folder / "decisions.json", decisions.to_json())
            progress.segment = metrics.next_segment(folder)
        began, tokens_before = time.monotonic(), progress.tokens
        seconds_before = progress.seconds
        saved = _done(progress) if progress.step else None
        scaling = progress.scaling if needs_scaling(model) else None
        skipped_before = progress.scaling.skipped
        if base.int8 is not None:
            base.int8.use(progress.int8_level)
        watch = Watch(total_steps, config)
        prompts = choose_prompts(settings.sample_prompt, prepared, chat)

        def write(name: str, kind: str, **values: Any) -> None:
            """A line of the run's own records."""
            if among.first:
                metrics.write(folder, name, progress.segment, kind, step=progress.step, **values)

        def keep() -> None:
            """The present state becomes the run's result."""
            if among.first:
                keep_state(
                    base, folder, config, chat, identity, names, progress, prepared, info or {}
                )

        def save() -> Iterator[Event]:
            nonlocal saved
            now = _done(progress)
            if saved == now:
                return
            progress.seconds = seconds_before + time.monotonic() - began
            tensors, state = pack(trained, optimizer, loader, progress, str(device), among)
            state["identity"] = same
            if among.first:
                path = save_checkpoint(folder / "checkpoints", progress.step, tensors, state)
                report(folder, f"at step {progress.step} of {total_steps}")
                yield Saved(progress.step, path)
            saved = now

        def evaluate() -> Iterator[Event]:
            with breaking_off():
                loss = among.sum(held_out_loss(base, prepared.held_out) if among.first else 0.0)
            if not math.isfinite(loss):
                raise not_finite(progress.step, "the held-out loss", [])
            if progress.first_held_out is None:
                progress.first_held_out = loss
            best = progress.best_loss is None or loss < progress.best_loss
            if best:
                progress.best_loss, progress.best_step, progress.since_best = loss, progress.step, 0
                keep()
            else:
                progress.since_best += 1
            progress.evaluated = progress.step
            write(metrics.METRICS, "held_out", loss=loss, best=best)
            yield Evaluated(progress.step, loss, best)
            for text in watch.evaluated(loss):
                yield Advice(text)

        def sample() -> Iterator[Event]:
            with breaking_off():
                answers = answer_all(base, chat, prompts) if among.first else []
            progress.sampled = progress.step
            for prompt, text in answers:
                write(metrics.SAMPLES, "sample", prompt=prompt, text=text)
                yield Sampled(progress.step, prompt, text)

        def prove_int8() -> Iterator[Event]:
            assert base.int8 is not None
            fresh = Loader(prepared.train, micro_batch=loader.micro_batch, accumulation=1,
                           seed=settings.seed)  # fmt: skip
            try:
                with breaking_off():
                    passes = few_passes(fresh, base.spec.parameters)
                    settled = settle(model, base.int8, loss_of, passes, draw=progress.step == 0)
            except RunError as error:
                yield from save()
                again = f"tsugiki train --resume {folder} --compute bf16"
                raise RunError(
                    error.problem, got=error.got, allowed=error.allowed, fix=again
                ) from None
            progress.proven, progress.int8_level = progress.step, settled.level
            for proof in told_by(settled, progress.step):
                record = {key: value for key, value in asdict(proof).items() if key != "step"}
                write(metrics.METRICS, "gradients", **record)
                yield proof

        def patience_is_out() -> bool:
            return 0 < (settings.early_stopping or 0) <= progress.since_best

        def loss_of(examples: Sequence[Example], factor: float) -> tuple[Tensor, int]:
            return summed_loss(base, examples, factor)

        with told(folder, among.first), Signals() as signals:
            # Ranks break nothing off by themselves: the others would wait for them for ever.
            breaking_off = signals.breaking_off if among.world == 1 else contextlib.nullcontext
            while True:
                # What is due at this step. A run that was stopped here does what it had not done.
                step = progress.step
                over = step >= total_steps
                with contextlib.suppress(Stopped):
                    due = over or step % (settings.eval_every or total_steps) == 0
                    if due and prepared.held_out and progress.evaluated < step:
                        yield from evaluate()
                    over = over or patience_is_out()
                    due = over or step in (0, total_steps // 2)
                    if due and progress.sampled < step:
                        yield from sample()
                    due = not over and step in (0, math.ceil(total_steps / 10))
                    if due and base.int8 is not None and progress.proven < step:
                        yield from prove_int8()
                over = over and progress.sampled == step
                stop = among.sum(signals.received or 0) > 0
                if over or stop or step % (settings.save_every or total_steps) == 0:
                    yield from save()
                if over:
                    break
                if stop:
                    raise Interrupted(
                        f"stopped at step {step} of {total_steps}; everything is saved",
                        signals.received or signal.SIGTERM,
                        f"tsugiki train --resume {folder}",
                    )
                # One optimiser step.
                step += 1
                data = next(loader)
                rate = learning_rate(
                    step, total_steps, settings.learning_rate or 0.0,
                    settings.warmup_ratio or 0.0, settings.scheduler or "constant",
                )  # fmt: skip
                logs = step % (settings.log_every or 1) == 0 or step in (1, total_steps)
                training_mode(model, True)
                done = optimiser_step(
                    step, data.passes, loss_of, trained, optimizer, rate=rate, ranks=among,
                    max_grad_norm=settings.max_grad_norm,
                    all_norms=settings.show_grad_norms and logs, scaling=scaling,
                )  # fmt: skip
                progress.step = step
                progress.tokens += data.tokens
                if done.skipped:
                    write(metrics.METRICS, "skipped", loss_scale=progress.scaling.value)
                    if progress.scaling.skipped == skipped_before + 1:
                        yield Advice(
                            f"step {step} overflowed in float16 and was skipped; a few at the "
                            "start are normal: the loss is scaled by less until none does"
                        )
                    continue
                progress.last_loss = done.loss
                progress.log_loss += done.loss * done.labels
                progress.log_labels += done.labels
                for text in watch.step(step, done.loss):
                    yield Advice(text)
                if logs:
                    seconds = max(time.monotonic() - began, 1e-9)
                    speed = (progress.tokens - tokens_before) / seconds
                    each = progress.tokens / step
                    eta = (total_steps - step) * each / speed if speed > 0 else None
                    mean = progress.log_loss / progress.log_labels
                    progress.log_loss, progress.log_labels = 0.0, 0
                    memory = memory_in_use(device)
                    write(
                        metrics.METRICS, "train", epoch=data.epoch, loss=mean, lr=rate,
                        grad_norm=done.norm, tokens_per_second=speed, memory_bytes=memory,
                        **({} if done.norms is None else {"grad_norms": done.norms}),
                        **({} if scaling is None else {"loss_scale": scaling.value}),
                    )  # fmt: skip
                    yield Logged(
                        step, total_steps, data.epoch, mean, rate, done.norm, speed, memory, eta,
                        done.norms,
                    )  # fmt: skip
            stopped_by = "all steps done"
            if patience_is_out():
                stopped_by = f"early stopping: no better held-out loss {progress.since_best} times"
            training_mode(model, False)
            if not prepared.held_out:
                progress.best_step = progress.step
                keep()
            if progress.scaling.skipped:
                yield Advice(
                    f"{progress.scaling.skipped} of {progress.step} steps overflowed in float16 "
                    "and were skipped"
                )
            if progress.first_held_out is not None and progress.best_step == 0:
                yield Advice(
                    "training never improved the held-out loss: the kept state is the start"
                )
        yield Finished(
            TrainResult(
                progress.step,
                progress.best_step,
                progress.best_loss,
                progress.first_held_out,
                progress.last_loss,
                folder / ("adapter" if settings.method == "lora" else "model"),
                seconds_before + time.monotonic() - began,
                progress.tokens,
                stopped_by,
            )
        )


def _done(progress: Progress) -> tuple[int, ...]:
    return progress.step, progress.evaluated, progress.sampled, progress.proven


def memory_in_use(device: torch.device) -> int:
    """Bytes: peak allocated on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
