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
from tsugiki.data.chat import IGNORED, Example
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
from tsugiki.models.tune import Tuned, tune, untune
from tsugiki.training.objective import summed_loss
from tsugiki.training.ranks import ranks
from tsugiki.training.scaling import LossScale, needs_scaling
from tsugiki.training.schedule import learning_rate as rate_at
from tsugiki.training.step import make_optimizer, optimiser_step


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
            keeps them apart, else each runs alone.
        rows: (ids, labels) of equal length, label -100 where nothing is trained.
        steps: optimiser steps.

    Returns:
        The loss of each step, nats per labelled token; steps that overflowed in float16 and were
        skipped have theirs too.

    Raises:
        AdapterError: nothing is attached, or not a transformers causal model.
        DataError: no rows, or rows that train nothing.
        UsageError: steps below 1.
        NonFiniteError: NaN or inf, before the update.
    """
    if next(lora_modules(model), None) is None:
        raise AdapterError("no adapter is attached", fix="tsugiki.attach(model, LoraConfig())")
    if steps < 1:
        raise UsageError("steps must be at least 1", got=steps)
    examples = tuple(
        Example(tuple(ids), tuple(labels), f"row {i}") for i, (ids, labels) in enumerate(rows, 1)
    )
    if not any(label != IGNORED for e in examples for label in e.labels[1:]):
        raise DataError("no row has a label that can be trained")
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


@contextlib.contextmanager
def _made_ready(model: nn.Module) -> Iterator[_Bare]:
    """Our attention and faster modules for a while; then everything is put back."""
    known = cast(Any, model)
    causal = isinstance(model, PreTrainedModel) and known.can_generate()
    if not causal or known.config.is_encoder_decoder:
        raise AdapterError(
            "tsugiki.train needs a transformers causal model",
            got=type(model).__name__,
            allowed="what AutoModelForCausalLM loads",
            fix="a loop of your own: after tsugiki.attach only the adapter's parameters have "
            "requires_grad",
        )
    flat, attention = probe_isolation(known.config).holds, known.config._attn_implementation
    modes = [(m, m.training) for m in model.modules()]
    try:
        (use_flat_attention if flat else use_own_attention)(model)
        yield _Bare(model, tune(model), flat)
    finally:
        untune(model)
        known.set_attn_implementation(attention)
        for module, mode in modes:
            module.training = mode


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
        return solo_forward(self.model, ids, batch.lengths, logits_at=logits_at)
