"""Which projections an adapter sits on: from a user's words to module paths.

A name that matches nothing is refused even beside right ones, and so is a named kind that cannot
be adapted; `all-linear` goes without those, and `left_out` tells of them. Knows the families' names
for query, key, value, … and no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tsugiki.errors import AdapterError, did_you_mean
from tsugiki.models.projections import projection

# The role of a projection by its last name; fused ones play several.
ROLES: dict[str, str] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
    "qkv_proj": "qkv", "gate_up_proj": "mlp",                          # Phi-3
    "c_attn": "qkv", "attn.c_proj": "o", "c_fc": "mlp", "mlp.c_proj": "mlp",  # GPT-2
    "query_key_value": "qkv", "dense": "o",                            # GPT-NeoX, Falcon, Bloom
    "dense_h_to_4h": "mlp", "dense_4h_to_h": "mlp",
    "out_proj": "o", "fc1": "mlp", "fc2": "mlp",                       # OPT, Phi
    "q_a_proj": "q", "q_b_proj": "q",                                  # DeepSeek
    "kv_a_proj_with_mqa": "qkv", "kv_b_proj": "qkv",
    "in_proj_qkv": "qkv", "in_proj_qkvz": "qkv",                       # Qwen3-Next, Qwen3.5
}  # fmt: skip

WORDS: dict[str, set[str] | None] = {
    "minimal": {"q", "v", "qkv"},
    "standard": {"q", "k", "v", "o", "qkv"},
    "maximal": None,
    "all-linear": None,
}

# Modules of torch that read these weights without calling their projections, always (attention) or
# while nothing needs a gradient (their fused path): an adapter there would be left out silently.
UNCALLED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}

# PEFT loads no adapter on these models' out_proj.
NO_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


@dataclass(frozen=True)
class Target:
    """A projection to adapt: module path, kind (linear or conv1d), and shape."""

    path: str
    kind: str
    in_features: int
    out_features: int

    def count(self, r: int) -> int:
        """Parameters of an adapter of rank r here: r·(in + out)."""
        return r * (self.in_features + self.out_features)


def candidates(model: nn.Module) -> list[Target]:
    """Every projection that can be adapted, in module order; the output head is left out."""
    head, without = head_path(model), uncalled(model) | left_out(model)
    found = []
    for path, module in model.named_modules():
        if path == head or not path or path in without:
            continue
        shape = projection(module)
        if shape is not None:
            found.append(Target(path, shape.kind, shape.in_features, shape.out_features))
    return found


def uncalled(model: nn.Module) -> dict[str, str]:
    """Projections that torch's own modules do not call → the module that reads their weight."""
    return {
        f"{path}.{name}" if path else name: type(module).__name__
        for path, module in model.named_modules()
        for kind, names in UNCALLED.items()
        if isinstance(module, kind)
        for name in names
    }


def left_out(model: nn.Module) -> dict[str, str]:
    """What `all-linear` goes without → why."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    found = {}
    for path, module in model.named_modules():
        if type(module).__name__.endswith("MambaMixer") and hasattr(module, "dt_proj"):
            found[f"{path}.dt_proj"] = "the mixer reads its weight without calling it"
        if isinstance(module, nn.Linear) and projection(module) is None:
            found[path] = f"a {type(module).__name__} gives another thing than the product"
        if kind in NO_OUT_PROJ and path.endswith(".out_proj"):
            found[path] = "PEFT could not load an adapter there"
    for path, parameter in model.named_parameters():
        if parameter.dim() == 3 and ".experts." in path:
            found[path] = "experts stacked in one tensor are not supported"
    return found


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[Target, ...]:
    """Module paths for what the user asked.

    Args:
        model: any module tree, also on the meta device.
        targets: minimal, standard, maximal, all-linear; or names: the end of a path, whole
            components (`q_proj`, `attn.c_proj`, `layers.0.mlp.up_proj`).

    Raises:
        AdapterError: a name that matches nothing, or something that cannot be adapted.
    """
    possible = candidates(model)
    if not possible:
        raise AdapterError("this model has no linear projection that can be adapted")
    if isinstance(targets, str) and targets in WORDS:
        roles = WORDS[targets]
        if roles is None:
            if targets == "maximal":
                _refuse_left_out(model)
            _refuse_uncalled(model, targets, possible)
            return tuple(possible)
        chosen = [t for t in possible if _role(t.path) in roles]
        if not chosen:
            raise AdapterError(
                f"--targets {targets} knows no projection of this architecture",
                allowed=", ".join(_last_names(possible)),
                fix="--targets all-linear, or name them",
            )
        return tuple(chosen)
    names = [name for name in ([targets] if isinstance(targets, str) else targets) if name]
    wrong, chosen_paths = [], set()
    for name in names:
        matches = {t.path for t in possible if t.path == name or t.path.endswith(f".{name}")}
        if not matches or any(p == name or p.endswith(f".{name}") for p in uncalled(model)):
            wrong.append(_why_not(model, name, possible))
        chosen_paths |= matches
    if wrong or not chosen_paths:
        raise AdapterError(
            "these targets cannot be adapted:\n" + "\n".join(f"    {line}" for line in wrong)
            if wrong
            else "no target was named",
            allowed=", ".join([*WORDS, *_last_names(possible)]),
        )
    return tuple(t for t in possible if t.path in chosen_paths)


def _role(path: str) -> str | None:
    parts = path.split(".")
    return ROLES.get(".".join(parts[-2:])) or ROLES.get(parts[-1])


def _last_names(possible: list[Target]) -> list[str]:
    return list(dict.fromkeys(t.path.rsplit(".", 1)[-1] for t in possible))


def _why_not(model: nn.Module, name: str, possible: list[Target]) -> str:
    for path, module in model.named_modules():
        if path == name or path.endswith(f".{name}"):
            if path == head_path(model):
                return f"{name}: the output head is not adapted (it may be tied to the embedding)"
            if reader := uncalled(model).get(path):
                return f"{name}: {reader} reads the weight of {path} without calling it"
            if reason := left_out(model).get(path):
                return f"{name}: {reason}"
            if projection(module) is None:
                return f"{name}: a {type(module).__name__} is not a linear projection"
    if any(n == name or n.endswith(f".{name}") for n, _ in model.named_parameters()):
        return f"{name}: a bare parameter (stacked experts or a fused tensor) is not supported"
    near = did_you_mean(name, (*WORDS, *_last_names(possible)))
    return f"{name}: no module of that name" + (f"; did you mean {near}?" if near else "")


def _refuse_uncalled(model: nn.Module, word: str, possible: list[Target]) -> None:
    for path, reader in uncalled(model).items():
        raise AdapterError(
            f"--targets {word}: {reader} reads the weight of {path} without calling it, "
            "and no adapter can stand there",
            allowed=", ".join(t.path for t in possible[:20]),
            fix="name those that shall be adapted, e.g. LoraConfig(targets=[…])",
        )


def _refuse_left_out(model: nn.Module) -> None:
    for path, reason in left_out(model).items():
        raise AdapterError(
            f"--targets maximal: {path} cannot be adapted: {reason}",
            fix="--targets all-linear adapts all else, standard the attention projections",
        )


def head_path(model: nn.Module) -> str | None:
    """Where the output head is, if the model says which module that is."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        return None
    return next((path for path, module in model.named_modules() if module is head), None)
