"""One flat forward for every base: our attention reaches each layer through transformers' own door.

Sequences lie end to end in (1, T); one keyword argument, a `ForwardBatch`, reaches the attention
of every layer. A model that drops the argument or mixes documents some other way is found by
`models/isolation.py` and runs one document at a time. Knows no adapters and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tsugiki.kernels.attention import packed_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.loss import Head, chunked_cross_entropy

NAME = "tsugiki"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tsugiki_batch: ForwardBatch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of every layer, in the form that transformers calls."""
    if tsugiki_batch is None:
        raise RuntimeError("this model did not hand the batch to its attention")
    layer = getattr(module, "layer_idx", None)
    out = packed_attention(
        query,
        key,
        value,
        tsugiki_batch,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        layer=0 if layer is None else layer,
    )
    return out, None


def _no_mask(*_: Any, **__: Any) -> None:
    """Documents are kept apart by the attention itself."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


def flat_forward(
    model: nn.Module,
    ids: Tensor,
    batch: ForwardBatch,
    *,
    logits_at: Tensor | None = None,
) -> Tensor:
    """Logits of sequences laid end to end.

    Args:
        model: one whose attention is set to ours (`use_flat_attention`).
        ids: (1, T) token ids.
        batch: lengths of the sequences and, in an engine, their past.
        logits_at: (n,) flat positions whose logits are wanted; all when None.

    Returns:
        (1, n, V) logits, soft caps and logit scales included.
    """
    keep: dict[str, Any] = {} if logits_at is None else {"logits_to_keep": logits_at}
    out = model(
        input_ids=ids,
        position_ids=batch.positions(ids.device),
        use_cache=False,
        tsugiki_batch=batch,
        **keep,
    )
    logits = out.logits
    assert isinstance(logits, Tensor)
    return logits


def flat_loss(
    model: nn.Module,
    ids: Tensor,
    batch: ForwardBatch,
    places: Tensor,
    targets: Tensor,
    *,
    head: Head | None = None,
    factor: float = 1.0,
) -> Tensor:
    """factor · sum of cross entropy (nats, fp32) at some positions of sequences laid end to end.

    Args:
        ids: (1, T) token ids.
        places: (n,) flat positions that predict a labelled token.
        targets: (n,) their tokens.
        head: proven to be this model's way from hidden rows to logits; the logits are then never
            kept. None: the model's own logits.
    """
    if head is None:
        logits = flat_forward(model, ids, batch, logits_at=places)[0]
        return factor * logits_loss(logits, targets)
    body = model.base_model
    assert isinstance(body, nn.Module)
    hidden = body(
        input_ids=ids,
        position_ids=batch.positions(ids.device),
        use_cache=False,
        tsugiki_batch=batch,
    ).last_hidden_state
    return chunked_cross_entropy(hidden[0].index_select(0, places), head, targets, factor)


def logits_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross entropy (nats) of logits (n, V), at least in fp32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


def solo_forward(
    model: nn.Module, ids: Tensor, lengths: Sequence[int], *, logits_at: Tensor | None = None
) -> Tensor:
    """The same for a model that cannot be called flat: one document a forward, its own attention.

    ids (1, T) → (1, n, V).
    """
    pieces = []
    for document in torch.split(ids, list(lengths), dim=1):
        pieces.append(model(input_ids=document, use_cache=False).logits)
    logits = torch.cat(pieces, dim=1)
    return logits if logits_at is None else logits[:, logits_at]


def use_flat_attention(model: nn.Module) -> None:
    """Set our attention; a model that ignores it is found by the isolation probe."""
    model.set_attn_implementation(NAME)  # type: ignore[operator]


def use_own_attention(model: nn.Module) -> None:
    """Back to the model's own attention (eager: every architecture has it)."""
    model.set_attn_implementation("eager")  # type: ignore[operator]
