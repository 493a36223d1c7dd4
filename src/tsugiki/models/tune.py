"""Puts faster modules in the place of a model's own, each only after it gave the same numbers.

The model runs a few short documents once; what every attention, feed-forward block and norm was
given is kept, and the replacement must agree with the original on it: output, input gradient and
every adapter's gradient no further from a wider copy than 1.2 times the original's own error.
Otherwise the original stays, with a reason for the log. Of modules with the same class, shapes and
settings three are tried; in the end the whole model must still give its logits. Knows no training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.kernels.attention import packed_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.linear import LoraTerm
from tsugiki.kernels.loss import Head
from tsugiki.models.closeness import compare
from tsugiki.models.flat import NAME, flat_forward
from tsugiki.models.head import output_of, prove_head
from tsugiki.models.quantized import dense_copy
from tsugiki.models.spec import context_of
from tsugiki.models.tuned import (
    AttentionShape,
    Replacement,
    TunedAttention,
    TunedFeed,
    TunedNorm,
    activation_of,
    attention_names,
    feed_names,
    norm_epsilon,
    part_of,
)

LENGTHS = (9, 61, 5)  # tokens of the documents of the proof
LAYERS = 3  # of each kind are tried: the first, one in the middle, the last
DRAWS = 12  # at most, of adapters, upstream gradients and inputs
BESIDE = 0.02  # how far inputs drawn lie beside the one seen, relative
SPREAD = 0.02  # of B in the proof: with B = 0 the gradient of A would prove nothing
# How far all replacements together may move the logits, relative: in fp32, and in 16 bits, where
# the roundings of many layers add up. A wrong module moves them by more than all they are.
SAME, NEAR = 1e-3, 0.2


@dataclass
class Tuned:
    """What was replaced, by kind, and what was kept and why.

    head: scale and soft cap of the head, where the chunked cross entropy was proven.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    head: tuple[float, float | None] | None = None

    @property
    def note(self) -> str:
        """One line for the log."""
        done = ", ".join(f"{count} {kind}" for kind, count in self.replaced.items()) or "nothing"
        left = f"; kept: {'; '.join(self.kept)}" if self.kept else ""
        return f"proven faster modules: {done}{left}"

    def head_of(self, model: nn.Module) -> Head | None:
        """The head of `model` for the chunked cross entropy; None: use the model's own logits."""
        part = None if self.head is None else part_of(output_of(model))
        if part is None or part[1] is not None:
            return None
        assert self.head is not None
        return Head(part[0], *self.head)


def tune(model: nn.Module) -> Tuned:
    """Replace what can be proven; adapters, where there are any, are already attached.

    Args:
        model: a causal model whose attention is ours (`use_flat_attention`), its base frozen.
    """
    tuned = Tuned()
    if getattr(model.config, "_attn_implementation", None) != NAME:
        tuned.kept.append("all modules: this base keeps its own attention")
        return tuned
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        seen = _watch(model)
        for kind, candidates in _candidates(model, seen):
            _try_kind(model, kind, candidates, seen, tuned)
        if tuned.replaced and (reason := _together(model, seen)):
            untune(model)
            tuned.replaced.clear()
            tuned.kept.append(f"all modules: {reason}")
        tuned.head, reason = prove_head(model)
        if reason:
            tuned.kept.append(f"the head: {reason}")
        else:
            tuned.replaced["head"] = 1
    finally:
        for module, mode in was_training.items():
            module.training = mode
    return tuned


def untune(model: nn.Module) -> None:
    """Put every original back in its replacement's place, with today's children."""
    for path, faster in list(model.named_modules()):
        if isinstance(faster, Replacement):
            original = faster.original[0]
            original._modules.update(faster._modules)
            original.training = faster.training
            model.set_submodule(path, original)


@dataclass
class _Seen:
    """Inputs of each module of interest, by path, and what each layer asked of the attention."""

    inputs: dict[str, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    shapes: dict[int, AttentionShape | None] = field(default_factory=dict)
    logits: Tensor | None = None


class _Recorder:
    """Stands where an engine's cache would: notes what a layer asks for, keeps no past."""

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen

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
        shape = AttentionShape(
            q.shape[1], k.shape[1], q.shape[3], v.shape[3], scale, window, softcap
        )
        again = layer in self._seen.shapes
        self._seen.shapes[layer] = None if again or sinks is not None else shape
        return packed_attention(
            q, k, v, ForwardBatch(batch.lengths),
            scale=scale, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip


def _batch(model: nn.Module, seen: _Seen | None = None) -> ForwardBatch:
    """Three documents, one of them at the far end of the context: what depends on the position,
    as Ministral 3's queries do beyond a limit, is there to be missed."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    far = max(0, (context_of(config) or 0) - LENGTHS[1])
    return ForwardBatch(LENGTHS, (0, far, 0), kv=None if seen is None else _Recorder(seen))


def _ids(model: nn.Module) -> Tensor:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, rows, (1, sum(LENGTHS)), generator=generator)
    return ids.to(next(model.parameters()).device)


def _watch(model: nn.Module) -> _Seen:
    """One forward pass that keeps what the modules were given, and what came of it."""
    seen, handles = _Seen(), []

    def remember(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if isinstance(hidden, Tensor) and len(args) <= 1:
                seen.inputs[path] = (hidden.detach().clone(), kwargs)

        return hook

    for path, module in model.named_modules():
        if attention_names(module) or feed_names(module) or norm_epsilon(module) is not None:
            handles.append(module.register_forward_pre_hook(remember(path), with_kwargs=True))
    try:
        with torch.no_grad():
            seen.logits = _logits(model, _batch(model, seen))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _logits(model: nn.Module, batch: ForwardBatch) -> Tensor:
    """(1, n, V) at some places of the documents."""
    ids = _ids(model)
    places = torch.arange(0, ids.shape[1], 7, device=ids.device)
    return flat_forward(model, ids, batch, logits_at=places)


def _together(model: nn.Module, seen: _Seen) -> str:
    """Why all replacements at work are not the model that it was; '' where they are."""
    with torch.no_grad():
        found = _logits(model, _batch(model))
    assert seen.logits is not None
    error = (found.double() - seen.logits.double()).norm() / seen.logits.double().norm()
    limit = SAME if seen.logits.dtype in (torch.float32, torch.float64) else NEAR
    return "" if float(error) <= limit else f"together they are off by {float(error):.1e}"


Build = Callable[[nn.Module], Replacement]


def _candidates(
    model: nn.Module, seen: _Seen
) -> Iterator[tuple[str, dict[str, tuple[nn.Module, list[Build]]]]]:
    """(kind, path → (module, ways to replace it)); a kind's members share class and shapes."""
    kinds: dict[tuple[Any, ...], dict[str, tuple[nn.Module, list[Build]]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Replacement):  # proven before, on this model
            continue
        names, epsilon = attention_names(module), norm_epsilon(module)
        builds: list[Build] = []
        shape: Any = None
        if names is not None:
            kind = "attention"
            shape = seen.shapes.get(module.layer_idx)
            clips = getattr(module.config, "clip_qkv", None)  # a proof may not reach the limit
            if shape is not None and clips is None:
                builds = [_attention_build(names, shape)]
        elif (names := feed_names(module)) is not None:
            kind = "feed-forward"
            builds = [_feed_build(names, activation_of(module) or "")]
        elif epsilon is not None:
            kind = "norm"
            builds = [_norm_build(epsilon, offset) for offset in (0.0, 1.0)]
        else:
            continue
        sizes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
        how = tuple(sorted((n, v) for n, v in vars(module).items() if _tells(n, v)))
        kinds.setdefault((kind, type(module), sizes, shape, how), {})[path] = (module, builds)
    for key, members in kinds.items():
        yield key[0], members


def _tells(name: str, value: object) -> bool:
    """Whether a module's attribute may make it another function, as SmolLM3's `use_rope`."""
    plain = isinstance(value, bool | int | float | str)
    return plain and name not in ("layer_idx", "training")


def _attention_build(names: tuple[tuple[str, ...], str], shape: AttentionShape) -> Build:
    return lambda original: TunedAttention(original, names, shape)


def _feed_build(names: tuple[tuple[str, ...], str], activation: str) -> Build:
    return lambda original: TunedFeed(original, names, activation)


def _norm_build(epsilon: float, offset: float) -> Build:
    return lambda original: TunedNorm(original, epsilon, offset)


def _try_kind(
    model: nn.Module,
    kind: str,
    members: dict[str, tuple[nn.Module, list[Build]]],
    seen: _Seen,
    tuned: Tuned,
) -> None:
    paths = [path for path in members if path in seen.inputs]
    name = type(next(iter(members.values()))[0]).__name__
    if not paths:
        tuned.kept.append(f"{len(members)} {name}: not called in a forward pass")
        return
    chosen = sorted({0, len(paths) // 2, len(paths) - 1})[:LAYERS]
    reason = "its attention has sinks or clips, or runs twice a layer"
    ways = len(members[paths[0]][1])
    for way in range(ways):
        for index in chosen:
            path = paths[index]
            module, builds = members[path]
            hidden, kwargs = seen.inputs[path]
            reason = prove(module, builds[way], hidden, kwargs)
            if reason:
                break
        else:
            for path in paths:
                module, builds = members[path]
                model.set_submodule(path, builds[way](module))
            tuned.replaced[kind] = tuned.replaced.get(kind, 0) + len(paths)
            return
    tuned.kept.append(f"{len(members)} {name}: {reason}")


def prove(module: nn.Module, build: Build, hidden: Tensor, kwargs: dict[str, Any]) -> str:
    """Why the replacement of `module` is not as good on this input; '' where it is.

    One draw of adapters and upstream gradients has few numbers in some tensors, and where a few of
    the input's weigh most, as keys' gradients in trained models, so does one rounding of it: chance
    can put an error beyond the bound. Then the errors of several draws are taken together, each on
    an input of its own beside the one seen.
    """
    own = _apart(module).eval()
    reason, together = "", None
    for seed in range(DRAWS):
        try:
            drawn = _three(own, build, _beside(hidden, seed), kwargs, seed)
        except Exception as error:  # whatever a foreign module raises means: keep it
            return f"cannot be tried: {str(error).strip().splitlines()[0][:120]}"
        if together is not None:
            drawn = [
                [torch.cat((a.flatten(), b.flatten())) for a, b in zip(one, two, strict=True)]
                for one, two in zip(together, drawn, strict=True)
            ]
        reason, together = compare(*drawn), drawn
        if not reason:
            break
    return reason


def _beside(hidden: Tensor, seed: int) -> Tensor:
    """The input seen, for every seed but zero with noise, so that its roundings are others."""
    if seed == 0:
        return hidden
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    return hidden * (1 + BESIDE * noise).to(hidden.dtype)


def _three(
    own: nn.Module, build: Build, hidden: Tensor, kwargs: dict[str, Any], seed: int
) -> list[list[Tensor]]:
    """Results of the replacement, of the original, and of the original in a wider type."""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    for child in own.modules():
        if isinstance(getattr(child, "term", None), LoraTerm):
            b = child.lora_B
            assert isinstance(b, nn.Parameter)
            b.data.copy_(torch.randn(b.shape, generator=generator) * SPREAD)
    wide = torch.float64 if hidden.dtype == torch.float32 else torch.float32
    # weights in few bits are judged against plain products of their unpacked numbers
    expected = _numbers(dense_copy(own).to(wide), hidden, kwargs, wide, seed)
    plain = _numbers(dense_copy(own), hidden, kwargs, hidden.dtype, seed)
    return [_numbers(build(own), hidden, kwargs, hidden.dtype, seed), plain, expected]


def _apart(module: nn.Module) -> nn.Module:
    """A copy of the module alone: not of the whole model's parameters, which an adapted projection
    holds by reference to thaw them again."""
    memo = {
        id(value): ()
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, tuple) and value and all(isinstance(p, nn.Parameter) for p in value)
    }
    return copy.deepcopy(module, memo)


def _numbers(
    module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Output, gradient of the input, gradients of every adapter."""
    given = {name: _cast(value, dtype) for name, value in kwargs.items()}
    if "tsugiki_batch" in given:
        given["tsugiki_batch"] = ForwardBatch(LENGTHS)
    leaf = hidden.to(dtype).requires_grad_()
    with torch.enable_grad():
        out = module(leaf, **given)
        out = out[0] if isinstance(out, tuple) else out
        trained = [p for p in module.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2 * seed + 2)
        # drawn in the narrow type, so that every copy gets the same upstream gradient
        upstream = torch.randn(out.shape, generator=generator).bfloat16().to(out)
        grads = torch.autograd.grad(out, [leaf, *trained], upstream)
    return [out.detach(), *grads]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(v, dtype) for v in value)
    return value
