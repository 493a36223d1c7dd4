"""Finds out whether a model keeps documents apart when they lie end to end.

Some architectures drop our argument, never call the attention interface, or mix rows in
convolutions, state-space scans or length-dependent rotary embeddings: all silently. The probe runs
three documents flat and each alone, one of them longer than every window of the config, all three
together longer than its context (GPT-Neo's mask ends there); where those are long, on a 2-layer
random copy with the limits cut. An encoder, which sees the tokens that it would be asked for, is
found the same way. Knows no training.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tsugiki.errors import ModelError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.flat import flat_forward, solo_forward, use_flat_attention, use_own_attention
from tsugiki.models.spec import DECODER

LIMITS = (
    "sliding_window",
    "attention_chunk_size",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "n_positions",
)
SHORT = 16
LENGTHS = (9, 3 * SHORT, 5)
PAD = 1
ALLOWED = 1e-3  # of the logits' standard deviation, in fp32


@dataclass(frozen=True)
class Isolation:
    """Whether documents stay apart, and the reason for the log.

    causal: no token changes what is said before it; also where nothing could be measured.
    """

    holds: bool
    reason: str
    causal: bool = True


def probe_isolation(config: PretrainedConfig) -> Isolation:
    """Run three documents flat against each alone, on a small random copy of the config.

    The architecture decides isolation, not the weights; wide random matrices give logits with a
    spread of about 2, so that a leak shows.
    """
    causal: bool | None = None
    try:
        model, ids = _small_model(shrink(config))
        with torch.no_grad():
            use_own_attention(model)
            alone = solo_forward(model, ids, LENGTHS)
            causal = not _looks_ahead(model, ids[:, : LENGTHS[0]], alone[:, : LENGTHS[0]])
            use_flat_attention(model)
            flat = flat_forward(model, ids, ForwardBatch(LENGTHS))
    except Exception as error:  # whatever a foreign architecture raises means: not flat
        why = f"not callable flat: {str(error).strip().splitlines()[0][:160]}"
        return Isolation(False, why, _causal_with_pad(config) if causal is None else causal)
    spread = float(alone.std())
    worst = float((flat - alone).abs().max()) / max(spread, 1e-9)
    if not worst <= ALLOWED:
        return Isolation(False, f"documents mix: off by {worst:.2g} of the logits' spread", causal)
    why = f"documents stay apart (off by {worst:.1e} of the logits' spread)"
    return Isolation(True, why, causal)


def refuse_encoder(isolation: Isolation, config: PretrainedConfig, folder: Path) -> None:
    """Raises ModelError: a model that is shown the tokens it would be asked for."""
    if not isolation.causal:
        raise ModelError(
            "this model looks ahead: it is an encoder, not a causal language model",
            got=f"{folder} ({config.model_type}): its last token changes what it says before it",
            fix=DECODER,
        )


def _small_model(small: PretrainedConfig) -> tuple[nn.Module, Tensor]:
    """A random model, and ids (1, T) of three documents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        widen(model)
        vocab = int(small.get_text_config().vocab_size)
        return model, torch.randint(0, vocab, (1, sum(LENGTHS)))


def _looks_ahead(model: nn.Module, ids: Tensor, said: Tensor) -> bool:
    """Whether another last token changes the logits (1, T, V) that were given for those before."""
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else ids[0, 1]
    moved = (solo_forward(model, other, [ids.shape[1]]) - said)[:, :-1].abs().max()
    return float(moved) > ALLOWED * max(float(said.std()), 1e-9)


def _causal_with_pad(config: PretrainedConfig) -> bool:
    """The same for RoBERTa and its kin, which count positions by what is no padding."""
    try:
        small = shrink(config)
        small.get_text_config().pad_token_id = PAD
        model, ids = _small_model(small)
        ids = ids[:, : LENGTHS[0]].clamp_min(PAD + 1)
        with torch.no_grad():
            use_own_attention(model)
            return not _looks_ahead(model, ids, solo_forward(model, ids, [ids.shape[1]]))
    except Exception:  # nothing was measured, and nothing is refused
        return True


def widen(model: nn.Module) -> None:
    """Draw matrices wide enough that logits spread by about 2 at the usual widths."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0.0, 2.0 / parameter.shape[-1] ** 0.5)


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with at least two layers of every kind and the limits cut to 16 tokens."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    keep = 2
    if kinds:
        keep = min(len(kinds), max(2, *(kinds.index(kind) + 1 for kind in set(kinds))))
        text.layer_types = kinds[:keep]
    for name in ("num_hidden_layers", "n_layer"):
        if getattr(text, name, None) is not None:
            setattr(text, name, keep)
            break
    rope = getattr(text, "rope_parameters", None)
    # dynamic RoPE changes beyond max_position_embeddings; learned positions end there
    dynamic = "dynamic" in str(rope)
    for name in LIMITS:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > SHORT:
            keeps_room = name in ("max_position_embeddings", "n_positions") and not dynamic
            setattr(text, name, max(LENGTHS) if keeps_room else SHORT)
    _shrink_rope(rope)
    for name, limit in (("vocab_size", 997), ("intermediate_size", 128), ("n_inner", 128)):
        _set_if_larger(text, name, limit)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(text, token, None) is not None:
            setattr(text, token, None)
    return small


def _shrink_rope(rope: Any) -> None:
    if not isinstance(rope, dict):
        return
    for key, value in rope.items():
        if key == "original_max_position_embeddings" and isinstance(value, int):
            rope[key] = SHORT
        else:
            _shrink_rope(value)


def _set_if_larger(config: Any, name: str, limit: int) -> None:
    value = getattr(config, name, None)
    if isinstance(value, int) and value > limit:
        setattr(config, name, limit)
