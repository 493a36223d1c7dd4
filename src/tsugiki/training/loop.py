"""The training loop: one function, read from top to bottom, that tells what it does as events.

LoRA or full fine-tuning; the loss is summed and divided by the labelled tokens of the whole
optimiser step. Knows no command line and prints nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tsugiki.adapters.attach import attach, training_mode
from tsugiki.config import RunConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.loader import Loader
from tsugiki.device import Decisions
from tsugiki.errors import DiskError, Interrupted, NonFiniteError, RunError
from tsugiki.files import RunLock, atomic_write, sweep_temporary, write_json
from tsugiki.models.load import Base
from tsugiki.training import metrics
from tsugiki.training.checkpoint import newest_whole, refuse_changes, save_checkpoint
from tsugiki.training.events import (
    Advice,
    Evaluated,
    Event,
    Finished,
    Logged,
    Resumed,
    Sampled,
    Saved,
    TrainResult,
)
from tsugiki.training.keeping import base_identity, keep_state, run_identity
from tsugiki.training.objective import held_out_loss, summed_loss
from tsugiki.training.report import write_report
from tsugiki.training.samples import answer_all, choose_prompts
from tsugiki.training.schedule import learning_rate
from tsugiki.training.signals import Signals
from tsugiki.training.state import Progress, pack, unpack
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
    if not resume and folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise RunError(
            f"the output folder {folder} exists already",
            fix=f"--resume {folder} goes on with it; or choose another --output",
        )
    with RunLock(folder), Signals() as signals:
        torch.manual_seed(settings.seed)
        if settings.method == "lora":
            generator = torch.Generator().manual_seed(settings.seed)
            attach(model, config.lora, generator=generator)
        else:
            model.requires_grad_(True)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            decay_groups(trained, settings.weight_decay or 0.0),
            lr=0.0,
            fused=device.type in ("cpu", "cuda"),
        )
        assert settings.batch_size is not None
        assert settings.gradient_accumulation_steps is not None
        loader = Loader(
            prepared.train,
            micro_batch=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            seed=settings.seed,
        )
        identity, names = base_identity(base), base.names()
        same = run_identity(config, prepared, identity, total_steps)
        progress = Progress()
        if resume:
            sweep_temporary(folder)
            found, notes = newest_whole(folder / "checkpoints")
            if found is not None:
                refuse_changes(found.state["identity"], same)
                progress = unpack(
                    found.tensors, found.state, trained, optimizer, loader, str(device)
                )
            else:
                notes.append("no whole checkpoint yet: beginning again from step 0")
            yield Resumed(progress.step, tuple(notes))
        else:
            atomic_write(folder / "config.yaml", config.to_yaml())
            write_json(folder / "decisions.json", decisions.to_json())
        progress.segment = metrics.next_segment(folder)
        segment, began, tokens_before = progress.segment, time.monotonic(), progress.tokens
        seconds_before = progress.seconds
        watch = Watch(total_steps)
        prompts = choose_prompts(settings.sample_prompt, prepared, base.tokenizer)

        def keep(step: int) -> Path:
            """The present state as the run's result."""
            return keep_state(
                base, folder, config, chat, identity, names, progress, prepared, info or {}, step
            )

        def save() -> Saved:
            progress.seconds = seconds_before + time.monotonic() - began
            tensors, state = pack(trained, optimizer, loader, progress, str(device))
            state["identity"] = same
            try:
                path = save_checkpoint(folder / "checkpoints", progress.step, tensors, state)
            except DiskError as error:
                raise DiskError(
                    error.problem,
                    got=error.got,
                    fix=f"free some space, then: tsugiki train --resume {folder}",
                ) from None
            return Saved(progress.step, path)

        def evaluate() -> Iterator[Event]:
            loss = held_out_loss(base, prepared.held_out)
            if not math.isfinite(loss):
                _not_finite(progress.step, "the held-out loss", [], folder)
            first = progress.first_held_out is None
            if first:
                progress.first_held_out = loss
            best = progress.best_loss is None or loss < progress.best_loss
            if best:
                progress.best_loss, progress.best_step, progress.since_best = loss, progress.step, 0
                keep(progress.step)
            else:
                progress.since_best += 1
            metrics.write(
                folder, metrics.METRICS, segment, "held_out",
                step=progress.step, loss=loss, best=best,
            )  # fmt: skip
            yield Evaluated(progress.step, loss, best)
            for text in watch.evaluated(loss):
                yield Advice(text)

        def sample() -> Iterator[Event]:
            for prompt, text in answer_all(base, chat, prompts):
                metrics.write(
                    folder, metrics.SAMPLES, segment, "sample",
                    step=progress.step, prompt=prompt, text=text,
                )  # fmt: skip
                yield Sampled(progress.step, prompt, text)

        if progress.step == 0:
            if prepared.held_out:
                yield from evaluate()
            yield from sample()
            yield save()

        def patience_is_out() -> bool:
            return 0 < (settings.early_stopping or 0) <= progress.since_best

        while progress.step < total_steps and not patience_is_out():
            training_mode(model, True)
            step = progress.step + 1
            data = next(loader)
            rate = learning_rate(
                step, total_steps, settings.learning_rate or 0.0,
                settings.warmup_ratio or 0.0, settings.scheduler or "constant",
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=False)
            total_labels = max(1, count_targets(data.passes))
            step_loss = 0.0
            for examples in data.passes:
                loss, _ = summed_loss(base, examples)
                step_loss += float(loss.detach()) / total_labels
                if not math.isfinite(step_loss):
                    _not_finite(step, "the loss", [], folder)
                (loss / total_labels).backward()  # type: ignore[no-untyped-call]
            norm = gradient_norm(trained)
            if not math.isfinite(norm):
                wrong = [n for n, p in trained.items() if not _finite_grad(p)]
                _not_finite(step, "the gradient", wrong, folder)
            norms = None
            logs = step % (settings.log_every or 1) == 0 or step in (1, total_steps)
            if settings.show_grad_norms and logs:
                norms = {n: float(p.grad.norm()) for n, p in trained.items() if p.grad is not None}
            clip(trained, norm, settings.max_grad_norm)
            optimizer.step()

            progress.step = step
            progress.tokens += data.tokens
            progress.last_loss = step_loss
            progress.log_loss += step_loss * total_labels
            progress.log_labels += total_labels
            for text in watch.step(step, step_loss):
                yield Advice(text)
            if logs:
                seconds = max(time.monotonic() - began, 1e-9)
                speed = (progress.tokens - tokens_before) / seconds
                done = progress.tokens / step
                eta = (total_steps - step) * done / speed if speed > 0 else None
                mean = progress.log_loss / progress.log_labels
                progress.log_loss, progress.log_labels = 0.0, 0
                event = Logged(
                    step, total_steps, data.epoch, mean, rate, norm, speed,
                    memory_in_use(device), eta, norms,
                )  # fmt: skip
                metrics.write(
                    folder, metrics.METRICS, segment, "train", step=step, epoch=data.epoch,
                    loss=mean, lr=rate, grad_norm=norm, tokens_per_second=speed,
                    memory_bytes=event.memory_bytes,
                    **({} if norms is None else {"grad_norms": norms}),
                )  # fmt: skip
                yield event
            last = step == total_steps
            if prepared.held_out and (last or step % (settings.eval_every or total_steps) == 0):
                yield from evaluate()
                last = last or patience_is_out()
            if step == total_steps // 2 and not last:
                yield from sample()
            if last or step % (settings.save_every or total_steps) == 0 or signals.received:
                yield save()
            if last:
                break
            if signals.received:
                write_report(folder)
                raise Interrupted(
                    f"stopped at step {step} of {total_steps}; everything is saved",
                    signals.received,
                    f"tsugiki train --resume {folder}",
                )
        stopped_by = "all steps done"
        if patience_is_out():
            stopped_by = f"early stopping: no better held-out loss {progress.since_best} times"
        training_mode(model, False)
        if not prepared.held_out:
            progress.best_step = progress.step
            keep(progress.step)
        yield from sample()
        if progress.first_held_out is not None and progress.best_step == 0:
            yield Advice("training never improved the held-out loss: the kept state is the start")
        write_report(folder)
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


def decay_groups(trained: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, norms' weights and biases do not (all of LoRA decays)."""
    matrices = [p for p in trained.values() if p.dim() > 1]
    others = [p for p in trained.values() if p.dim() <= 1]
    groups = ({"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def count_targets(passes: tuple[tuple[Any, ...], ...]) -> int:
    """Labels that are predicted: a document's first token never is."""
    return sum(
        sum(label != -100 for label in example.labels[1:])
        for examples in passes
        for example in examples
    )


def gradient_norm(trained: dict[str, nn.Parameter]) -> float:
    """Global L2 norm of all gradients, in fp32."""
    grads = [p.grad for p in trained.values() if p.grad is not None]
    norms: list[Tensor] = list(torch._foreach_norm(grads))
    return float(torch.stack([n.float() for n in norms]).norm())


def clip(trained: dict[str, nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients in place so that their global norm is at most `limit` (0: never)."""
    if limit > 0 and norm > limit:
        factor = limit / (norm + 1e-6)
        torch._foreach_mul_([p.grad for p in trained.values() if p.grad is not None], factor)


def _finite_grad(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def _not_finite(step: int, what: str, names: list[str], folder: Path) -> None:
    raise NonFiniteError(
        f"{what} of step {step} is NaN or inf; nothing was updated with it",
        got=", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        if names
        else None,
        fix=f"a lower --learning-rate, or --dtype float32; the last good state is in {folder}",
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes: peak allocated on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)
