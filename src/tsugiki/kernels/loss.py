"""Cross entropy of the head's rows in chunks: no logits and no probabilities are kept.

The gradient with respect to the hidden rows is computed in the forward pass, chunk by chunk, so
memory is one chunk's logits and time is one product each way; in tiles a chunk is a few
hundred words and stays in a core's cache. Only rows that carry a label should come here. (The
idea is that of Wijmans et al. 2024, arXiv:2411.09009, and Liger's fused linear cross entropy,
arXiv:2410.10989.) Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsugiki.kernels.backend import bodies, compiled_bodies
from tsugiki.kernels.cpu.tiles import FEW, SIDE
from tsugiki.kernels.linear import DenseWeight, FrozenWeight

CHUNK = 80_000_000  # logits of one chunk: enough rows for a full-speed product
GPU_CHUNK = 1 << 28  # the same on a GPU: 2,000 rows of the largest vocabularies, 512 MB
CACHED = 1 << 17  # fp32 logits of one softmax block, a row at least


@dataclass(frozen=True)
class Head:
    """What turns hidden rows into logits: c·tanh(x / c) for x = scale · (W·h + b)."""

    weight: FrozenWeight
    scale: float = 1.0
    softcap: float | None = None


def chunked_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, factor: float = 1.0
) -> Tensor:
    """factor · sum over rows of −log p(target), nats, fp32.

    Args:
        hidden: (n, k).
        head: frozen.
        targets: (n,) token ids.
        factor: such as 1 / labels of the step; here it costs no second rounding of the gradient,
            which a product with the returned sum would.
    """
    needs = hidden.requires_grad and torch.is_grad_enabled()
    out = _Chunked.apply(hidden, head, targets, factor, needs)  # type: ignore[no-untyped-call]
    assert isinstance(out, Tensor)
    return out


def reference_cross_entropy(
    hidden: Tensor, head: Head, targets: Tensor, factor: float = 1.0
) -> Tensor:
    """The plain meaning of `chunked_cross_entropy`."""
    logits = head.weight.matmul(hidden) * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    wide = torch.promote_types(logits.dtype, torch.float32)
    return factor * F.cross_entropy(logits.to(wide), targets, reduction="sum")


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, factor: float, needs: bool
    ) -> Tensor:
        rows, vocab = hidden.shape[0], head.weight.shape[0]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        fused = _tiles(hidden, head)
        if fused is not None:
            matrix = head.weight.dense()
            losses, grad = fused.head_rows(
                hidden, matrix, targets, head.scale, head.softcap, factor, needs
            )
            if needs:
                ctx.save_for_backward(grad)
            total += losses.sum()
            return total * factor
        grad = torch.empty_like(hidden) if needs else None
        on_cpu = hidden.device.type == "cpu"
        pieces = max(1, -(-rows * vocab // (CHUNK if on_cpu else GPU_CHUNK)))
        size = max(1, -(-rows // pieces))
        for begin in range(0, rows, size):
            part = slice(begin, min(begin + size, rows))
            logits = head.weight.matmul(hidden[part])
            loss, own = _softmax(logits, targets[part], head, factor, needs)
            total += loss
            if grad is not None:
                rest = head.weight.matmul_t(logits)
                if own is not None:
                    rest = rest.to(wide).addcmul_(head.weight.rows(targets[part]).to(wide), own)
                grad[part] = rest
            del logits  # or two chunks would be held while the next one is computed
        if grad is not None:
            ctx.save_for_backward(grad)
        return total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # in fp32: a factor rounded to bf16 would bend every gradient alike
        return (grad.to(grads[0].dtype) * grads[0]).to(grad.dtype), None, None, None, None


def _tiles(hidden: Tensor, head: Head) -> Any:
    """The compiled head in tiles, where it takes these rows."""
    weight = head.weight
    if not isinstance(weight, DenseWeight) or weight.bias is not None or head.scale <= 0:
        return None
    matrix = weight.dense()
    suits = hidden.dtype == matrix.dtype == torch.bfloat16 and matrix.stride(1) == 1
    if not suits or len(hidden) < FEW or hidden.shape[1] % SIDE:
        return None
    return compiled_bodies(hidden, "tiles")


def _softmax(
    logits: Tensor, targets: Tensor, head: Head, factor: float, needs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of −log p(target), and what is missing of the gradient.

    With `needs`, logits (n, V) become factor · d loss / d (W·h); where the targets' entries (n, 1)
    are given apart, they are zero in it.
    """
    fused = bodies(logits, "loss")
    if fused is not None:
        losses, apart = fused.softmax_rows(logits, targets, head.scale, head.softcap, factor, needs)
        return losses.sum(), apart
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=logits.device)
    own = logits.new_empty(len(targets), 1, dtype=wide) if needs else None
    few = max(1, (CACHED if logits.device.type == "cpu" else GPU_CHUNK // 4) // logits.shape[1])
    for at in range(0, logits.shape[0], few):
        block = logits[at : at + few].to(wide, copy=True)
        entry = None if own is None else own[at : at + few]
        total += _softmax_block(block, targets[at : at + few], head, entry)
        if needs:
            logits[at : at + few] = block.mul_(factor)
    return total, None if own is None else own.mul_(factor)


def _softmax_block(x: Tensor, targets: Tensor, head: Head, own: Tensor | None) -> Tensor:
    """Sum of −log p(target); with `own`, x (n, V) becomes d loss / d (W·h) in place.

    The target's entry goes to `own` (n, 1) and is zero in x: it outweighs all others together, and
    would leave them no digits in a narrow type. Wide, because it is p − 1: rounded before the
    subtraction, p near one loses it.
    """
    if head.scale != 1.0:
        x.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        x.div_(head.softcap).tanh_()
        if own is not None:
            slope = 1 - x.square()  # d softcap·tanh(x / softcap) / dx
        x.mul_(head.softcap)
    index = targets[:, None]
    best = x.amax(dim=-1, keepdim=True)
    picked = x.gather(1, index) - best
    # one pass over the row; its largest probability is 1 / sum of exp(x - best)
    torch.ops.aten._softmax.out(x, -1, False, out=x)
    loss = -(x.amax(dim=-1, keepdim=True).log() + picked).sum()
    if own is not None:
        x.scatter_add_(1, index, torch.full_like(picked, -1.0))
        if slope is not None:
            x.mul_(slope)
        if head.scale != 1.0:
            x.mul_(head.scale)
        own.copy_(x.gather(1, index))
        x.scatter_(1, index, 0.0)
    return loss
