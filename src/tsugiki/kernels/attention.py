"""Causal attention of documents that lie end to end, each seeing only itself.

Compiled bodies take them as they lie (`fused_attention.py`). Elsewhere documents of similar
length are padded side by side and computed together; padding stands after their ends, where
causality keeps it unseen, so the plain case needs no mask. Sliding windows, soft caps (Gemma 2) and
sinks (gpt-oss) take explicit masks and softmax. Knows no model and no cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.blocks import block_attention
from tsugiki.kernels.flash import flash_attention, flash_runs
from tsugiki.kernels.fused_attention import bodies_attend, fused_attention

BLOCKS_FROM = 48  # tokens: below, one call of ATen's attention costs less than several products


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: ForwardBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    layer: int = 0,
) -> Tensor:
    """Attention of every document over itself, or over its cached past.

    Args:
        q: (1, H, T, d), after rotary embedding and norms.
        k, v: (1, Hkv, T, d); Hkv divides H.
        batch: where documents begin; with a cache, it computes instead.
        scale: factor on q·k.
        window: a token sees itself and window - 1 tokens before it.
        softcap: c·tanh(x / c) on the scores.
        sinks: (H,) a score per head that takes probability and gives nothing.
        layer: index of the layer, for the cache.

    Returns:
        (1, T, H, d)
    """
    if batch.kv is not None:
        return batch.kv.attend(
            layer, q, k, v, batch, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    _, heads, tokens, _ = q.shape
    assert tokens == batch.tokens, f"{tokens} tokens in a batch of {batch.tokens}"
    if softcap is None and sinks is None and flash_runs(q, k, v):
        return flash_attention(q, k, v, batch.lengths, scale=scale, window=window)
    if bodies_attend(q, k, v, sinks):
        return fused_attention(
            q, k, v, batch.lengths, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
    if len(batch.lengths) == 1:
        out = causal_attention(q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks)
        return out.transpose(1, 2)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H, d)
    pieces, places = [], []
    for bucket in batch.buckets_on(q.device):
        count, longest = bucket.gather.shape
        index = bucket.gather.reshape(-1)
        side = [
            t.index_select(0, index).view(count, longest, *t.shape[1:]).transpose(1, 2)
            for t in (q, k, v)
        ]
        out = causal_attention(*side, scale=scale, window=window, softcap=softcap, sinks=sinks)
        out = out.transpose(1, 2).reshape(count * longest, heads, -1)
        pieces.append(out if bucket.keep is None else out.index_select(0, bucket.keep))
        places.append(bucket.target)
    order = torch.argsort(torch.cat(places))
    return torch.cat(pieces).index_select(0, order)[None]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a batch of equal-length sequences, each token over itself and before.

    q (n, H, L, d), k and v (n, Hkv, L, d) → (n, H, L, d).
    """
    length = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    windowed = window is not None and window < length
    if grouped and q.is_cuda:  # of torch's kernels only flash takes grouped heads
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        grouped = False
    if sinks is None and length >= BLOCKS_FROM and q.device.type == "cpu":
        seen = window if windowed else None
        out = block_attention(q, k, v, scale=scale, window=seen, softcap=softcap)
        return out.transpose(1, 2)
    if softcap is None and sinks is None and scale > 0:  # torch's own has no other scales
        if not windowed:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
            )
        mask = causal_mask(length, window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    mask = causal_mask(length, window if windowed else None, q.device)
    return masked_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) booleans: which keys (columns) each query (row) sees."""
    rows = torch.arange(length, device=device)[:, None]
    columns = torch.arange(length, device=device)[None]
    seen = columns <= rows
    return seen if window is None else seen & (columns > rows - window)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Scores and softmax written out, for soft caps and sinks.

    q (n, H, Q, d), k and v (n, Hkv, K, d), mask broadcastable to (n, H, Q, K) → (n, H, Q, d).
    Softmax in fp32 (fp64 stays).
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.to(wide).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights.to(v.dtype), v)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The plain meaning of `packed_attention`: one document after the other, scores written out."""
    outputs, at = [], 0
    for length in lengths:
        a, b, c = (t[:, :, at : at + length] for t in (q, k, v))
        mask = causal_mask(length, window, q.device)
        outputs.append(masked_attention(a, b, c, mask, scale=scale, softcap=softcap, sinks=sinks))
        at += length
    return torch.cat(outputs, dim=2).transpose(1, 2)
