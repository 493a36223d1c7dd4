"""Keys and values of running sequences, one slot each, and attention over them.

One `FullLayer` a layer keeps (slots, Hkv, capacity, d), grown in chunks. Decoding is one attention
over all slots; a prompt's beginning goes through packed attention; a later chunk sees its slot's
past. Which tokens a slot holds is the scheduler's to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels.attention import masked_attention, packed_attention
from tsugiki.kernels.batch import ForwardBatch

CHUNK = 128  # tokens by which slots grow


class FullLayer:
    """Keys and values of one layer that looks back without end.

    A slot can be cut back to any length: what lies beyond a sequence's length is never read.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None  # (slots, Hkv, capacity, d)
        self.v: Tensor | None = None

    def write(self, slot: int, start: int, k: Tensor, v: Tensor) -> None:
        """Put k and v (Hkv, n, d) behind the first `start` tokens of a slot."""
        assert self.k is not None
        assert self.v is not None
        end = start + k.shape[1]
        self.k[slot, :, start:end] = k
        self.v[slot, :, start:end] = v

    def write_one_each(self, slots: Tensor, starts: Tensor, k: Tensor, v: Tensor) -> None:
        """One token for each of n slots: k and v (n, Hkv, d)."""
        assert self.k is not None
        assert self.v is not None
        self.k[slots, :, starts] = k
        self.v[slots, :, starts] = v

    def reserve(self, slots: int, capacity: int, k: Tensor, v: Tensor) -> None:
        """Room for so many slots and tokens; k and v give heads, width, dtype and device."""
        self.k = _grown(self.k, slots, capacity, k)
        self.v = _grown(self.v, slots, capacity, v)


def _grown(old: Tensor | None, slots: int, capacity: int, like: Tensor) -> Tensor:
    if old is not None and old.shape[0] >= slots and old.shape[2] >= capacity:
        return old
    if old is not None:
        slots, capacity = max(slots, old.shape[0]), max(capacity, old.shape[2])
    # zeros, not empty: a masked key still takes part in 0 · value, and NaN · 0 is NaN
    new = like.new_zeros(slots, like.shape[1], capacity, like.shape[3])
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new


@dataclass(frozen=True)
class Plan:
    """How one forward is split; made once and used by every layer.

    decode: flat index (n,), slot and position of each sequence with one new token and a past.
    view: the slots as a slice where they stand side by side, so that nothing is copied.
    fresh: flat indices of prompts that begin now, and their lengths.
    later: (slot, start, first flat index, count) of chunks behind a past.
    """

    decode: Tensor
    decode_slots: Tensor
    decode_starts: Tensor
    longest: int
    shortest: int
    view: slice | None
    fresh: Tensor
    fresh_batch: ForwardBatch | None
    chunks: tuple[tuple[int, int, int, int], ...]
    capacity: int
    slots: int


class Slots:
    """The `KVCache` of an engine: `attend` stores the new tokens and looks at all of them."""

    def __init__(self) -> None:
        self._layers: dict[int, FullLayer] = {}
        self._batch: ForwardBatch | None = None
        self._plan: Plan | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        kept = (t for layer in self._layers.values() for t in (layer.k, layer.v))
        return sum(t.nbytes for t in kept if t is not None)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: ForwardBatch,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """q (1, H, T, d), k and v (1, Hkv, T, d) of the new tokens → (1, T, H, d)."""
        if self._batch is not batch or self._plan is None:
            self._batch, self._plan = batch, _plan(batch, q.device)
        plan = self._plan
        kept = self._layers.setdefault(layer, FullLayer())
        kept.reserve(plan.slots, plan.capacity, k, v)
        for slot, start, at, count in plan.chunks:
            kept.write(slot, start, k[0, :, at : at + count], v[0, :, at : at + count])
        every_token_decodes = not plan.chunks  # then nothing needs to be picked out
        if plan.decode.numel():
            rows, keys, values = (
                t[0].transpose(0, 1) if every_token_decodes else t[0].transpose(0, 1)[plan.decode]
                for t in (q, k, v)
            )  # (n, H, d), (n, Hkv, d)
            kept.write_one_each(plan.decode_slots, plan.decode_starts, keys, values)
            decoded = _decode(
                rows, kept, plan, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
            if every_token_decodes:
                return decoded[None]
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        if plan.decode.numel():
            out[0, plan.decode] = decoded
        if plan.fresh_batch is not None:
            inner_q, inner_k, inner_v = (t[:, :, plan.fresh] for t in (q, k, v))
            out[:, plan.fresh] = packed_attention(
                inner_q,
                inner_k,
                inner_v,
                plan.fresh_batch,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
            )
        for slot, start, at, count in plan.chunks:
            if start > 0:
                out[:, at : at + count] = _chunk(
                    q[:, :, at : at + count], kept, slot, start,
                    scale=scale, window=window, softcap=softcap, sinks=sinks,
                )  # fmt: skip
        return out


def _plan(batch: ForwardBatch, device: torch.device) -> Plan:
    assert batch.slots is not None
    assert batch.starts is not None
    decode, fresh, lengths, chunks = [], [], [], []
    rows = zip(batch.slots, batch.starts, batch.offsets, batch.lengths, strict=True)
    for slot, start, at, count in rows:
        if count == 1 and start > 0:
            decode.append((at, slot, start))
            continue
        chunks.append((slot, start, at, count))
        if start == 0:
            fresh.append(torch.arange(at, at + count))
            lengths.append(count)
    slots = [slot for _, slot, _ in decode]
    side_by_side = bool(slots) and slots == list(range(slots[0], slots[0] + len(slots)))
    needed = max(s + n for s, n in zip(batch.starts, batch.lengths, strict=True))
    return Plan(
        decode=torch.tensor([d[0] for d in decode], dtype=torch.long, device=device),
        decode_slots=torch.tensor(slots, dtype=torch.long, device=device),
        decode_starts=torch.tensor([d[2] for d in decode], dtype=torch.long, device=device),
        longest=max((d[2] + 1 for d in decode), default=0),
        shortest=min((d[2] + 1 for d in decode), default=0),
        view=slice(slots[0], slots[0] + len(slots)) if side_by_side else None,
        fresh=torch.cat(fresh).to(device) if fresh else torch.empty(0, dtype=torch.long),
        fresh_batch=ForwardBatch(tuple(lengths)) if lengths else None,
        chunks=tuple(chunks),
        capacity=-(-needed // CHUNK) * CHUNK,
        slots=max(batch.slots) + 1,
    )


def _decode(
    q: Tensor,
    kept: FullLayer,
    plan: Plan,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One new token of each of n sequences over its slot: q (n, H, d) → (n, H, d)."""
    assert kept.k is not None
    assert kept.v is not None
    first = 0 if window is None else max(0, plan.shortest - window)
    where = plan.decode_slots if plan.view is None else plan.view
    k = kept.k[:, :, first : plan.longest][where]  # (n, Hkv, K, d)
    v = kept.v[:, :, first : plan.longest][where]
    columns = torch.arange(first, plan.longest, device=q.device)
    ends = plan.decode_starts[:, None]
    seen = columns <= ends
    if window is not None:
        seen = seen & (columns > ends - window)
    mask = seen[:, None, None]  # (n, 1, 1, K)
    heads, kv_heads = q.shape[1], k.shape[1]
    if softcap is None and sinks is None:
        # the query heads of one key head see the same keys, so they stand as rows of one matrix
        rows = q.view(q.shape[0], kv_heads, heads // kv_heads, q.shape[2])
        whole = plan.longest == plan.shortest and (window is None or plan.longest <= window)
        out = F.scaled_dot_product_attention(
            rows, k, v, attn_mask=None if whole else mask, scale=scale
        )
        return out.reshape(q.shape[0], heads, v.shape[3])
    out = masked_attention(q[:, :, None], k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    return out[:, :, 0]


def _chunk(
    q: Tensor,
    kept: FullLayer,
    slot: int,
    start: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The next n tokens of one sequence over all so far: (1, H, n, d) → (1, n, H, d)."""
    assert kept.k is not None
    assert kept.v is not None
    count = q.shape[2]
    end = start + count
    first = 0 if window is None else max(0, start + 1 - window)
    k = kept.k[slot : slot + 1, :, first:end]
    v = kept.v[slot : slot + 1, :, first:end]
    rows = torch.arange(start, end, device=q.device)[:, None]
    columns = torch.arange(first, end, device=q.device)[None]
    mask = columns <= rows
    if window is not None:
        mask = mask & (columns > rows - window)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = masked_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2)
