"""Attention, feed-forward and norm modules that take the place of a model's own, children kept.

Each holds the very children of the module it replaces under the same names, so module paths,
adapters and files stay as they are, and hands every case it does not cover (other children, a
cache of the model's own, training of the base itself) to the original. Whether a replacement is
right is `models/tune.py`'s to prove. Knows no adapters beyond a child's `base` and `term`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsugiki.kernels.attention import packed_attention
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.linear import LoraTerm, grouped_linear
from tsugiki.kernels.mlp import Feed, Part, feed_forward
from tsugiki.kernels.norms import rms_norm, rotary
from tsugiki.models.projections import frozen_weight
from tsugiki.models.quantized import QuantizedLinear

ATTENTION_NAMES = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("qkv_proj",), "o_proj"),
    (("c_attn",), "c_proj"),
)
FEED_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
)


@dataclass(frozen=True)
class AttentionShape:
    """What a layer's attention was seen to ask for: heads, key heads, widths and options."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float
    window: int | None
    softcap: float | None


def part_of(module: nn.Module) -> Part | None:
    """Frozen weight and term of a projection, adapted or plain; None where it is neither."""
    term = getattr(module, "term", None)
    base = module.base if isinstance(term, LoraTerm) else module
    if type(base) not in (nn.Linear, Conv1D, QuantizedLinear):
        return None
    assert isinstance(base, nn.Module)
    if any(p.requires_grad for p in base.parameters()):
        return None
    return frozen_weight(base), term if isinstance(term, LoraTerm) else None


class Replacement(nn.Module):
    """Shares children, parameters and buffers with the module it replaces."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple: no child, so that no name changes
        for kind in ("_modules", "_parameters", "_buffers"):
            getattr(self, kind).update(getattr(original, kind))
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"][0], name)

    def parts(self, names: tuple[str, ...]) -> list[Part] | None:
        """The named children as projections; None where the original must run."""
        if self.training:
            return None
        found = [part_of(getattr(self, name)) for name in names]
        parts = [part for part in found if part is not None]
        rates = {term.dropout for _, term in parts if term is not None}
        return parts if len(parts) == len(names) and len(rates) <= 1 else None

    def fall_back(self, *args: Any, **kwargs: Any) -> Any:
        """The original's own forward over today's children."""
        (original,) = self.original
        original._modules.update(self._modules)
        original.training = self.training
        return original(*args, **kwargs)


class TunedAttention(Replacement):
    """Projections of one input together, head norms, rotary embedding, packed attention."""

    def __init__(
        self, original: nn.Module, names: tuple[tuple[str, ...], str], shape: AttentionShape
    ) -> None:
        super().__init__(original)
        self.names = names
        self.shape = shape

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        tsugiki_batch: ForwardBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        """hidden_states (1, T, k) → ((1, T, k), None)."""
        entry, exit_name = self.names
        parts = self.parts((*entry, exit_name))
        if parts is None or tsugiki_batch is None or args:
            if position_embeddings is not None:
                kwargs["position_embeddings"] = position_embeddings
            if tsugiki_batch is not None:
                kwargs["tsugiki_batch"] = tsugiki_batch
            return self.fall_back(hidden_states, *args, **kwargs)
        shape = self.shape
        outputs = _project(hidden_states, parts[:-1])
        widths = [n * shape.width for n in (shape.heads, shape.kv_heads)]
        if len(outputs) == 1:
            rest = outputs[0].shape[-1] - sum(widths)
            outputs = list(torch.split(outputs[0], [*widths, rest], dim=-1))
        q, k, v = outputs
        if "q_norm" in self._modules:
            q, k = (
                norm(x.view(*x.shape[:-1], -1, shape.width)).view(x.shape)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        if position_embeddings is None:
            q, k = (x.view(1, x.shape[1], -1, shape.width).transpose(1, 2) for x in (q, k))
        else:
            cos, sin = position_embeddings
            q, k = rotary(q, cos, sin, shape.heads), rotary(k, cos, sin, shape.kv_heads)
        v = v.view(1, v.shape[1], shape.kv_heads, shape.value_width).transpose(1, 2)
        out = packed_attention(
            q, k, v, tsugiki_batch, scale=shape.scale, window=shape.window,
            softcap=shape.softcap, layer=self.layer_idx,
        )  # fmt: skip
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return _project(out, parts[-1:])[0], None


def _project(x: Tensor, parts: list[Part]) -> list[Tensor]:
    return grouped_linear(x, [w for w, _ in parts], [[t for _, t in parts]])


class TunedFeed(Replacement):
    """The whole feed-forward block as one operation."""

    def __init__(
        self, original: nn.Module, names: tuple[tuple[str, ...], str], activation: str
    ) -> None:
        super().__init__(original)
        self.names = names
        self.activation = activation

    def forward(self, x: Tensor) -> Any:
        """x (1, T, k) → (1, T, k)."""
        entry, exit_name = self.names
        parts = self.parts((*entry, exit_name))
        if parts is None:
            return self.fall_back(x)
        fused = entry == ("gate_up_proj",)
        return feed_forward(x, Feed(tuple(parts[:-1]), parts[-1], self.activation, fused))


class TunedNorm(Replacement):
    """RMSNorm in blocks, its input kept once."""

    def __init__(self, original: nn.Module, eps: float, offset: float) -> None:
        super().__init__(original)
        self.epsilon = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Any:
        """x (…, k) → (…, k)."""
        weight = self.weight
        if weight.requires_grad or weight.dtype != x.dtype:
            return self.fall_back(x)
        return rms_norm(x, weight, self.epsilon, offset=self.offset)


def attention_names(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """How this module names its projections, where it is an attention of a known layout."""
    names = _known(module, ATTENTION_NAMES)
    return names if names is not None and hasattr(module, "layer_idx") else None


def feed_names(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """How this module names its projections, where it is a feed-forward of a known layout."""
    names = _known(module, FEED_NAMES)
    return names if names is not None and activation_of(module) is not None else None


def _known(
    module: nn.Module, layouts: tuple[tuple[tuple[str, ...], str], ...]
) -> tuple[tuple[str, ...], str] | None:
    for entry, exit_name in layouts:
        children = [module._modules.get(name) for name in (*entry, exit_name)]
        if all(child is not None and part_of(child) is not None for child in children):
            return entry, exit_name
    return None


def activation_of(module: nn.Module) -> str | None:
    """Which activation a feed-forward block uses, found by its values."""
    grid = torch.linspace(-6, 6, 49)
    known = {
        "silu": F.silu(grid),
        "gelu": F.gelu(grid),
        "gelu_tanh": F.gelu(grid, approximate="tanh"),
    }
    for name in ("act_fn", "activation_fn", "act"):
        function = getattr(module, name, None)
        if callable(function):
            values = function(grid)
            for kind, expected in known.items():
                if torch.allclose(values, expected, atol=1e-6):
                    return kind
    return None


def norm_epsilon(module: nn.Module) -> float | None:
    """The epsilon of what looks like an RMSNorm: one vector, no children, not a LayerNorm."""
    if isinstance(module, nn.LayerNorm) or module._modules or set(module._parameters) != {"weight"}:
        return None
    weight = module._parameters["weight"]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    return epsilon
