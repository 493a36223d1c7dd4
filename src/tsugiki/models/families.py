"""Names of eight families without building a model: module path ↔ disk name, storage, tying.

For work that must not import transformers. A model's own module tree (`models/spec.py`) knows
better and is used where there is one. Knows no adapters.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from tsugiki.models.shards import StoredModel

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "phi3", "gpt2",
)  # fmt: skip
TIED_BY_DEFAULT = ("gemma2", "gemma3", "gemma3_text", "gpt2")
CONV1D = re.compile(r"(^|\.)(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)$")
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
HEAD = "lm_head.weight"
# (as the module tree says, as a file may say)
PREFIXES = (
    ("transformer.", ""),
    ("model.", ""),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("", "language_model."),
)
BUFFERS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|inv_freq)$")


def disk_name(path: str, stored: Container[str]) -> str | None:
    """The stored name of a parameter's module path, or None where it is not stored."""
    if path in stored:
        return path
    for tree, disk in PREFIXES:
        name = disk + path.removeprefix(tree)
        if path.startswith(tree) and name in stored:
            return name
    return None


def module_path(disk: str, model_type: str) -> str:
    """The parameter's path in the module tree of a stored name."""
    if disk.endswith(HEAD):
        return HEAD
    if model_type == "gpt2":
        return disk if disk.startswith("transformer.") else f"transformer.{disk}"
    if disk.startswith("language_model.model."):
        return disk.replace("language_model.model.", "model.language_model.", 1)
    if disk.startswith(("model.", "vision_tower.", "multi_modal_projector.")):
        return disk if disk.startswith("model.") else f"model.{disk}"
    return f"model.{disk}"


def is_transposed(path: str, model_type: str, fan_in_fan_out: bool) -> bool:
    """Whether a projection is stored (in, out), as GPT-2's Conv1D is."""
    if model_type in FAMILIES:
        return model_type == "gpt2" and CONV1D.search(path) is not None
    return fan_in_fan_out


def is_tied(model: StoredModel) -> bool:
    """Whether the head is the embedding: config.json's word, else the family's default."""
    said = model.setting("tie_word_embeddings")
    if said is None:
        said = model.config.get("tie_word_embeddings")
    if said is not None:
        return bool(said)
    return model.model_type in TIED_BY_DEFAULT or disk_name(HEAD, model.tensors) is None


def embedding_name(model: StoredModel) -> str | None:
    """Disk name of the token embedding."""
    for path in EMBEDDINGS:
        name = disk_name(path, model.tensors)
        if name is not None:
            return name
    ends = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    return next((name for name in model.tensors if name.endswith(ends)), None)


@dataclass(frozen=True)
class FamilyNames:
    """What a fingerprint asks of names, answered from the tables."""

    model_type: str
    tied: bool

    def to_module(self, disk: str) -> str | None:
        """The parameter path that a stored name means; None for buffers."""
        return None if BUFFERS.search(disk) else module_path(disk, self.model_type)

    def partner(self, path: str) -> str | None:
        """The embedding that the head is tied to."""
        if path != HEAD or not self.tied:
            return None
        return EMBEDDINGS[1] if self.model_type == "gpt2" else EMBEDDINGS[0]
