"""Step 1: every setting that shapes the arithmetic, and the special ids.

A norm epsilon ten times too large hides from the logits of most models; only this step sees it.
Compares what the configs say once every default is filled in; knows no tensors.
"""

from __future__ import annotations

from typing import Any

from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check, found

# What says where a model came from or how it is run, not what it computes. The type and the tie
# are compared by the tensors.
NOT_ARITHMETIC = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype",
    "tie_word_embeddings", "use_cache", "auto_map", "id2label", "label2id", "problem_type",
    "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
    "is_encoder_decoder", "attn_implementation", "_attn_implementation", "eos_token_id",
    "task_specific_params", "initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop",
    "resid_pdrop", "hidden_dropout",
}  # fmt: skip


def compare_settings(reference: Artefact, candidate: Artefact) -> list[Check]:
    """The configs, default by default, and the ids that end an answer."""
    ours, theirs = flatten(reference.settings()), flatten(candidate.settings())
    keys = sorted(set(ours) | set(theirs))
    wrong = [
        f"{key}: {theirs.get(key)!r}, the reference has {ours.get(key)!r}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]
    stops = []
    if reference.stops() != candidate.stops():
        stops.append(
            f"eos_token_id: {sorted(candidate.stops())}, the reference has "
            f"{sorted(reference.stops())}"
        )
    return [
        found("1 settings", "config, defaults included", wrong, len(keys), "settings"),
        found("1 settings", "ids that end an answer", stops, 1, "sets"),
    ]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, without those that shape nothing."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in NOT_ARITHMETIC:
            continue
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
