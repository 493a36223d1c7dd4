"""What a run will hold in memory at its peak, in bytes and by part.

The saved set is that of the kernels (kernels/linear.py, mlp.py, blocks.py, norms.py, loss.py), the
rest what was measured of a process; `benchmarks/memory.py` holds both against peak RSS. Touches no
weights; knows shapes from a module tree without memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
from torch import nn

from tsugiki.config import RunConfig
from tsugiki.kernels import loss, nf4, quantized
from tsugiki.kernels.blocks import BLOCK, KEEP
from tsugiki.kernels.cpu.tiles import FEW, SIDE
from tsugiki.kernels.fused_attention import WIDEST
from tsugiki.models.spec import ModelSpec

# Measured: what a process that trains holds beyond one that has read rows and config (libraries
# loaded late, compiled products), and beyond the bytes of its tensors (holes between them).
LATE_BYTES = 128 << 20
TORN = 1.12
MASTER = 16  # fp32 weight, gradient and AdamW's two moments of one trained parameter
EVAL_TOKENS = 4096  # of one forward pass of an evaluation (training/objective.py)
# The proof of int8 gradients computes micro-batches in fp32, which is slow. PROOF_WORK: products of
# a weight and a token of one at most; four at 2^39, both ways, take about 50 s on two cores. In a
# sum over fewer tokens what rounding leaves is a larger share, hence PROOF_TOKENS in any case.
PROOF_WORK = 1 << 39
PROOF_TOKENS = 1024
INT8_SCRATCH = 64 << 20  # int32 products of 32 MB, codes, blocks (kernels/int8.py)


@dataclass(frozen=True)
class Pass:
    """The largest forward pass: tokens in all, of its longest document, and with a label."""

    tokens: int
    longest: int
    labelled: int


@dataclass(frozen=True)
class Shape:
    """One layer and the whole, in elements; per token where a width is meant.

    wide: what the feed-forward block keeps before its activation. norms: widths of all norms'
    inputs. block: parameters of the largest module that is proven and replaced.
    """

    layers: int
    hidden: int
    query: int
    key: int
    heads: int
    inner: int
    wide: int
    norms: int
    block: int
    projections: tuple[tuple[int, int], ...]  # (out, in) of all but the head
    others: int  # parameters that are no projection's weight
    vocab: int


def shape_of(spec: ModelSpec) -> Shape:
    """Read off the module tree."""
    head = spec.meta_model().get_output_embeddings()  # type: ignore[operator]
    modules = dict(spec.meta_model().named_modules())
    projections = tuple(
        (p.out_features, p.in_features)
        for p in spec.linear_modules()
        if modules[p.path] is not head
    )
    inside = sum(out * width for out, width in projections)
    gated = any(path.endswith(("gate_proj", "gate_up_proj")) for path in modules)
    layers = max(1, spec.layers)
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms = 0
    for path, module in modules.items():
        width = _norm_width(module)
        if width is None or ".0." not in path:
            continue
        if width == spec.head_dim and path.endswith(("q_norm", "k_norm")):
            width = query if path.endswith("q_norm") else key
        norms += width
    return Shape(
        layers=layers,
        hidden=spec.hidden_size,
        query=query,
        key=key,
        heads=spec.heads,
        inner=spec.intermediate_size,
        wide=spec.intermediate_size * (2 if gated else 1),
        norms=norms,
        block=max(
            3 * spec.intermediate_size * spec.hidden_size
            if gated
            else 2 * spec.intermediate_size * spec.hidden_size,
            2 * spec.hidden_size * (query + key),
        ),
        projections=projections,
        others=spec.parameters - inside,
        vocab=spec.vocab_size,
    )


def _norm_width(module: nn.Module) -> int | None:
    weight = module._parameters.get("weight")
    if module._modules or weight is None or weight.dim() != 1:
        return None
    return int(weight.shape[0])


def weight_bytes(shape: Shape, quantize: str, width: int) -> int:
    """The frozen base in memory."""
    total = shape.others * width
    for out, columns in shape.projections:
        count = out * columns
        if quantize == "nf4":
            blocks = -(-count // nf4.BLOCK)
            total += blocks * (nf4.BLOCK // 2 + 1) + 4 * (-(-blocks // nf4.NESTED) + 1)
        elif quantize == "int8":
            total += count + 2 * out
        else:
            total += count * width
    return total


def workspace_bytes(shape: Shape, quantize: str, width: int) -> int:
    """What quantised weights are unpacked into."""
    if quantize == "none":
        return 0
    largest = max((out * columns for out, columns in shape.projections), default=0)
    tile = min(largest, quantized.TILE) * width
    return tile + (12 * nf4.CHUNK + largest // nf4.BLOCK * 4 if quantize == "nf4" else 0)


def int8_bytes(shape: Shape, quantize: str) -> int:
    """Codes of --compute int8 beyond the stored weights; projections in int8 give their own."""
    head = shape.vocab * (shape.hidden + 4)
    rest = sum(4 * out + (0 if quantize == "int8" else out * n) for out, n in shape.projections)
    return head + rest + INT8_SCRATCH


def proof_tokens(parameters: int) -> int:
    """Most tokens of a micro-batch whose gradient is computed in fp32; a row at least."""
    return max(PROOF_TOKENS, PROOF_WORK // parameters)


def layer_bytes(shape: Shape, config: RunConfig, batch: Pass, width: int, fused: bool) -> int:
    """What one layer keeps for the backward pass."""
    ranks = config.lora.r * 7
    per_token = width * (
        shape.norms  # inputs of the norms: the residual stream among them
        + 2 * shape.hidden  # their outputs, read by the projections
        + 2 * shape.query + 2 * shape.key  # queries, keys, values, attention's output
        + shape.wide
        + ranks
    )  # fmt: skip
    head = shape.query // shape.heads
    if fused and head <= WIDEST:
        per_token += 2 * width * shape.heads  # a number a query, in fp32 two
        if width == 2 and head % SIDE:  # up to whole tiles, and the output again as it was
            more = (head // SIDE + 1) * SIDE / head - 1
            per_token += int(width * (more * 2 * (shape.query + shape.key) + shape.query))
    elif batch.longest <= KEEP:  # probabilities of blocks of queries
        per_token += width * shape.heads * (min(batch.longest, batch.longest // 2 + BLOCK // 2))
    return batch.tokens * per_token


def head_bytes(shape: Shape, batch: Pass, width: int, one_pass: bool) -> int:
    """Logits of one chunk, its softmax block, and the hidden rows with their gradient; in one pass
    on tiles sums in fp32 and a copy of the rows instead of logits."""
    rows = max(1, batch.labelled)
    if one_pass and rows >= FEW:
        return 6 * rows * shape.hidden * width
    pieces = max(1, -(-rows * shape.vocab // loss.CHUNK))
    chunk = -(-rows // pieces) * shape.vocab * width
    return chunk + 8 * max(loss.CACHED, shape.vocab) + 3 * rows * shape.hidden * width


def predict(
    spec: ModelSpec, config: RunConfig, batch: Pass, held_out_tokens: int, width: int,
    trainable: int, *, resident: int | None = None, int8: bool = False, fused: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes by part at the peak of a run.

    Args:
        batch: the largest forward pass.
        held_out_tokens: of all held-out rows.
        width: bytes of an element of the compute type.
        trainable: parameters that will be trained.
        resident: what the process holds before weights are loaded; asked of the system when None.
        int8: frozen products are int8, and proven against fp32.
        fused: attention keeps no scores, and bf16's head, but in int8, goes in tiles too.
    """
    shape = shape_of(spec)
    if resident is None:
        resident = int(psutil.Process().memory_info().rss)
    full = config.train.method == "full"
    quantize = config.model.quantize
    one_pass = fused and width == 2 and not int8
    kept, step = step_bytes(shape, config, batch, width, fused, one_pass)
    few = min(EVAL_TOKENS, held_out_tokens)
    looking = few * width * (3 * shape.inner + 6 * shape.hidden) + head_bytes(
        shape, Pass(few, batch.longest, few), width, one_pass
    )
    proving = 0 if full else shape.block * 4 * width  # two copies and one of twice the width
    weights = weight_bytes(shape, quantize, width)
    codes = {}
    if int8:
        codes = {"int8 codes": int8_bytes(shape, quantize)}
        tokens = min(batch.tokens, max(batch.longest, proof_tokens(spec.parameters)))
        wide = Pass(tokens, batch.longest, min(batch.labelled, tokens))
        # gradients in fp32 of both, and B as it was
        proving = max(proving, step_bytes(shape, config, wide, 4, fused, False)[1] + 12 * trainable)
    return {
        "process": resident + LATE_BYTES,
        "weights": weights + workspace_bytes(shape, quantize, width),
        **codes,
        "trained": trainable * (MASTER - 4 if full else MASTER + width // 2),
        "activations": int(kept * TORN),
        "passing": int((max(step, looking, proving) - kept) * TORN),
    }


def step_bytes(
    shape: Shape, config: RunConfig, batch: Pass, width: int, fused: bool, one_pass: bool
) -> tuple[int, int]:
    """What all layers keep for the backward pass, and that with what passes by at the peak."""
    one = layer_bytes(shape, config, batch, width, fused)
    head = head_bytes(shape, batch, width, one_pass)
    if config.train.method == "full":  # plain modules and whole logits
        wide = 12 * shape.hidden + 6 * shape.key + 3 * shape.wide
        one = batch.tokens * (width * wide + 16 * shape.hidden)
        head = batch.labelled * shape.vocab * 4 * width
    kept = one * shape.layers
    if config.train.gradient_checkpointing == "always":
        kept = batch.tokens * shape.hidden * width * shape.layers + one
    return kept, kept + max(head, batch.tokens * width * (3 * shape.inner + 4 * shape.hidden))
