"""`tsugiki.train`: an adapter on any causal model with rows that are already examples.

The objective, schedule and step of a full run, without folders and checkpoints. Knows no files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tsugiki.adapters.attach import lora_modules, training_mode
from tsugiki.config import build_config
from tsugiki.data.example import IGNORED, Example
from tsugiki.data.loader import Loader
from tsugiki.errors import AdapterError, DataError, UsageError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import (
    flat_forward,
    solo_forward,
    use_flat_attention,
    use_own_attention,
)
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import Base
from tsugiki.models.spec import context_of
from tsugiki.models.tune import Tuned, tune, untune
from tsugiki.training.objective import summed_loss
from tsugiki.training.ranks import ranks
from tsugiki.training.scaling import LossScale, needs_scaling
from tsugiki.training.schedule import learning_rate as rate_at
from tsugiki.training.step import make_optimizer, optimiser_step

OWN_LOOP = (
    "a loop of your own: after tsugiki.attach only the adapter's parameters have requires_grad"
)


def train(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    weight_decay: float = 0.0,
    warmup_ratio: float = 0.0,
    scheduler: str = "constant",
    max_grad_norm: float = 1.0,
    seed: int = 0,
) -> list[float]:
    """Train the adapter that `tsugiki.attach` put on a model; all else of it stays as it was.

    Args:
        model: any transformers causal model; documents lie end to end where its architecture
            keeps them apart, else each runs alone. Any other module takes ids (1, T) and gives
            logits (1, T, V).
        rows: (ids, labels) of equal length, label -100 where nothing is trained.
        steps: optimiser steps.

    Returns:
        The loss of each step, nats per labelled token; steps that overflowed in float16 and were
        skipped have theirs too.

    Raises:
        AdapterError: nothing is attached, or no causal model.
        DataError: no rows, rows that train nothing, ids that the model has no place for.
        UsageError: a value that makes no sense.
        NonFiniteError: NaN or inf, before the update.
    """
    if next(lora_modules(model), None) is None:
        raise AdapterError("no adapter is attached", fix="tsugiki.attach(model, LoraConfig())")
    if steps < 1:
        raise UsageError("steps must be at least 1", got=steps)
    values = {
        "learning_rate": learning_rate, "batch_size": batch_size, "weight_decay": weight_decay,
        "gradient_accumulation_steps": gradient_accumulation_steps, "warmup_ratio": warmup_ratio,
        "scheduler": scheduler, "max_grad_norm": max_grad_norm, "seed": seed,
    }  # fmt: skip
    build_config({"train": values})  # raises for what makes no sense
    examples = _examples(model, rows)
    losses = []
    with _made_ready(model) as bare:
        torch.manual_seed(seed)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(trained, weight_decay, bare.device)
        among = ranks(bare.device)
        loader = Loader(
            examples,
            micro_batch=batch_size,
            accumulation=gradient_accumulation_steps * among.world,
            seed=seed,
        )
        training_mode(model, True)
        scaling = LossScale() if needs_scaling(model) else None
        for step in range(1, steps + 1):
            done = optimiser_step(
                step, next(loader).passes,
                lambda *given: summed_loss(cast(Base, bare), *given), trained, optimizer,
                rate=rate_at(step, steps, learning_rate, warmup_ratio, scheduler),
                max_grad_norm=max_grad_norm, ranks=among, scaling=scaling,
            )  # fmt: skip
            losses.append(done.loss)
    return losses


def _examples(
    model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[Example, ...]:
    """The rows, each looked at."""
    config = model.config if isinstance(model, PreTrainedModel) else None
    text = None if config is None else config.get_text_config()
    known = getattr(text, "vocab_size", None)
    context = None if text is None else context_of(text)
    examples = []
    for number, (ids, labels) in enumerate(rows, 1):
        named = [*ids, *(label for label in labels if label != IGNORED)]
        wrong = None
        if len(ids) != len(labels) or not ids:
            wrong = f"{len(ids)} ids and {len(labels)} labels"
        elif min(named) < 0 or (known is not None and max(named) >= known):
            wrong = f"ids {min(named)} to {max(named)}, the model knows {known or 'none below 0'}"
        elif context is not None and len(ids) > context:
            wrong = f"{len(ids)} ids, the model sees {context}"
        if wrong:
            raise DataError(f"row {number} cannot be trained on", got=wrong)
        examples.append(Example(tuple(ids), tuple(labels), f"row {number}"))
    if not any(label != IGNORED for e in examples for label in e.labels[1:]):
        raise DataError("no row has a label that can be trained")
    return tuple(examples)


@contextlib.contextmanager
def _made_ready(model: nn.Module) -> Iterator[_Bare]:
    """Our attention and faster modules for a while; then everything is put back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        if isinstance(model, PreTrainedModel):
            with _flat(model) as bare:
                yield bare
        else:
            yield _Bare(model, Tuned(), flat=False)
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _flat(model: PreTrainedModel) -> Iterator[_Bare]:
    """A transformers model, its documents end to end where it keeps them apart."""
    known = cast(Any, model)
    generates = known.can_generate() and not known.config.is_encoder_decoder
    found = probe_isolation(known.config) if generates else None
    if found is None or not found.causal:
        raise AdapterError(
            "tsugiki.train needs a causal model",
            got=type(model).__name__,
            allowed="what AutoModelForCausalLM loads, or a module from ids (1, T) to logits",
            fix=OWN_LOOP,
        )
    flat, attention = found.holds, known.config._attn_implementation
    try:
        (use_flat_attention if flat else use_own_attention)(model)
        yield _Bare(model, tune(model), flat)
    finally:
        untune(model)
        known.set_attn_implementation(attention)


@dataclass(frozen=True)
class _Bare:
    """What the objective asks of a base, for a model that came without folder and tokenizer."""

    model: nn.Module
    tuned: Tuned
    flat: bool

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    def forward(self, ids: Tensor, batch: ForwardBatch, logits_at: Tensor | None = None) -> Tensor:
        """Logits (1, n, V) of sequences laid end to end."""
        if self.flat:
            return flat_forward(self.model, ids, batch, logits_at=logits_at)
        if isinstance(self.model, PreTrainedModel):
            return solo_forward(self.model, ids, batch.lengths, logits_at=logits_at)
        pieces = [self._alone(document) for document in torch.split(ids, list(batch.lengths), 1)]
        logits = torch.cat(pieces, dim=1)
        return logits if logits_at is None else logits[:, logits_at]

    def _alone(self, ids: Tensor) -> Tensor:
        """Logits of one document by a module that is no transformers model."""
        try:
            out = self.model(ids)
        except (RuntimeError, TypeError, IndexError) as error:
            got: object = f"{type(error).__name__}: {error}"[:200]
            cause: Exception | None = error
        else:
            if isinstance(out, Tensor) and out.dim() == 3 and out.shape[:2] == ids.shape:
                return out
            got, cause = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__, None
        raise AdapterError(
            "tsugiki.train asked a module for logits of every token",
            got=got,
            allowed=f"(1, {ids.shape[1]}, vocabulary) for ids (1, {ids.shape[1]})",
            fix=OWN_LOOP,
        ) from cause
