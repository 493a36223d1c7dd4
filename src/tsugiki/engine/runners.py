"""Runs the scheduler's work through a model and gives one row of logits per finished prompt.

`FlatRunner` computes everything in one flat forward over slots; `SoloRunner` serves models that
must not be called flat: one sequence at a time with the model's own cache. Knows no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tsugiki.adapters.pool import AdapterPool
from tsugiki.engine.scheduler import Work
from tsugiki.engine.slots import Slots
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import flat_forward, use_own_attention
from tsugiki.models.load import Base

PROBE = (5, 1, 4, 1)  # a fresh prompt, a decode, a chunk behind a past, a decode
ALLOWED = 0.1  # of the logits' spread: bf16 rounds by 0.02, a mixed-up cache is off by 1


class Runner(Protocol):
    """What the engine needs of a model."""

    can_cut: bool
    limits: tuple[int, int] | None  # most slots and tokens a forward, where there are limits

    def run(self, work: Sequence[Work]) -> Tensor:
        """Logits (n, V) after the last token of each work that completes, in order."""
        ...

    def clear(self) -> None:
        """Drop every past."""
        ...


class FlatRunner:
    """All sequences end to end in one forward; a slot can be cut back."""

    can_cut = True
    limits: tuple[int, int] | None = None

    def __init__(self, base: Base, pool: AdapterPool | None) -> None:
        self._base = base
        self._pool = pool
        self.slots = Slots()

    def run(self, work: Sequence[Work]) -> Tensor:
        """One forward over the work of this step."""
        batch = ForwardBatch(
            lengths=tuple(item.count for item in work),
            starts=tuple(item.start for item in work),
            kv=self.slots,
            slots=tuple(item.sequence.slot for item in work),
            adapters=_adapters(self._pool, work),
        )
        device = self._base.device
        ids = torch.tensor([[t for item in work for t in item.tokens]], device=device)
        ends = [
            at + item.count - 1 for at, item in zip(batch.offsets, work, strict=True)
            if item.completes
        ]  # fmt: skip
        logits_at = torch.tensor(ends, dtype=torch.long, device=device)
        with _BatchFor(self._pool, batch):
            logits = flat_forward(self._base.model, ids, batch, logits_at=logits_at)[0]
        # an architecture that does not know logits_to_keep answers for every token
        return logits if logits.shape[0] == len(ends) else logits[logits_at]

    def clear(self) -> None:
        """Drop keys and values."""
        self.slots = Slots()


class SoloRunner:
    """One sequence a forward, whole prompts, the model's own attention and cache.

    The cache cannot be cut back (recurrent states have no length), so only a prefix that is all
    of it is used again. Length-dependent rotary embeddings are computed anew where a sequence
    crosses the length at which their frequencies change.
    """

    can_cut = False
    limits: tuple[int, int] | None = (1, 1 << 30)

    def __init__(self, base: Base, pool: AdapterPool | None) -> None:
        self._base = base
        self._pool = pool
        self._border = _rope_border(base.model)
        self._cache: Any = None

    def run(self, work: Sequence[Work]) -> Tensor:
        """One forward for the one sequence there is."""
        (item,) = work
        start, tokens = item.start, item.tokens
        crosses = self._border is not None and start <= self._border < start + len(tokens)
        if start == 0 or crosses or self._cache is None:
            start, tokens = 0, item.sequence.ids[: item.start + item.count]
            self._cache = DynamicCache(config=self._base.model.config)
        model = self._base.model
        batch = ForwardBatch((len(tokens),), adapters=_adapters(self._pool, work))
        ids = torch.tensor([tokens], device=self._base.device)
        with _BatchFor(self._pool, batch):
            out = model(
                input_ids=ids,
                attention_mask=torch.ones(1, start + len(tokens), dtype=torch.long).to(ids.device),
                past_key_values=self._cache,
                use_cache=True,
            )
        # a model with another kind of cache (Mamba) computes everything anew for each token
        self._cache = getattr(out, "past_key_values", None)
        logits = out.logits[:, -1]
        assert isinstance(logits, Tensor)
        return logits

    def clear(self) -> None:
        """Drop the model's cache."""
        self._cache = None


class _BatchFor:
    """Tells the pool's layers which rows are whose, for the length of one forward."""

    def __init__(self, pool: AdapterPool | None, batch: ForwardBatch) -> None:
        self._pool = pool
        self._batch = batch

    def __enter__(self) -> None:
        if self._pool is not None:
            self._pool.cell.batch = self._batch

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.cell.batch = None


def make_runner(base: Base, pool: AdapterPool | None) -> Runner:
    """Flat where the base allows it and the slots give the same numbers as no cache."""
    if base.flat:
        runner = FlatRunner(base, pool)
        if _slots_agree(base):
            return runner
        use_own_attention(base.model)
        base.flat = False
        base.notes.append("one request at a time: this base's layers do not each keep their past")
    return SoloRunner(base, pool)


def _slots_agree(base: Base) -> bool:
    """Whether tokens fed in pieces over slots read like the same tokens in one forward."""
    total = sum(PROBE)
    vocab = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = (torch.arange(total, device=base.device)[None] * 37 + 3) % vocab
    with torch.inference_mode():
        whole = flat_forward(base.model, ids, ForwardBatch((total,))).float()
        slots, pieces, start = Slots(), [], 0
        for count in PROBE:
            batch = ForwardBatch((count,), starts=(start,), kv=slots, slots=(1,))
            piece = ids[:, start : start + count]
            pieces.append(flat_forward(base.model, piece, batch).float())
            start += count
        worst = (torch.cat(pieces, dim=1) - whole).abs().max()
    return bool(worst <= ALLOWED * whole.std() + 1e-6)


def _adapters(pool: AdapterPool | None, work: Sequence[Work]) -> tuple[int, ...] | None:
    return None if pool is None else tuple(item.sequence.adapter for item in work)


def _rope_border(model: nn.Module) -> int | None:
    """Length above which a length-dependent rotary embedding changes its frequencies."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    border = rope.get("original_max_position_embeddings")
    border = border or getattr(config, "original_max_position_embeddings", None)
    return int(border or config.max_position_embeddings)
