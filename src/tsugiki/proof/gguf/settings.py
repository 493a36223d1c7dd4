"""Step 1 for GGUF: every key that shapes the arithmetic, and the special ids.

What a file leaves out is what llama.cpp takes then, so a stranger's file with fewer keys is held to
its meaning. Knows no tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from tsugiki.formats.gguf_tokenizer import SPECIAL
from tsugiki.formats.mixes import find_kind
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check, found
from tsugiki.proof.gguf.artefact import GgufArtefact
from tsugiki.proof.gguf.form import Form

STEP = "1 settings"
Known = Mapping[str, Any]
Default = Callable[[Known], Any]

# Say where a file comes from, or what llama.cpp finds out by itself.
NOT_ARITHMETIC = ("tensor_data_layout", "rope.dimension_count_swa")


def _head(known: Known) -> Any:
    return known.get("embedding_length", 0) // max(1, known.get("attention.head_count", 1))


# What llama.cpp takes for a key that is not there (its loaders, `llama_model::load_hparams`).
DEFAULTS: Mapping[str, Default] = {
    "attention.head_count_kv": lambda k: k.get("attention.head_count"),
    "attention.key_length": _head,
    "attention.value_length": _head,
    "rope.dimension_count": lambda k: k.get("attention.key_length", _head(k)),
    "rope.freq_base": lambda _: 10000.0,
    "rope.scaling.type": lambda _: "none",
    "rope.scaling.factor": lambda _: 1.0,
    "rope.scaling.attn_factor": lambda _: 1.0,
    "rope.scaling.original_context_length": lambda k: k.get("context_length"),
    "rope.scaling.yarn_ext_factor": lambda k: 1.0 if k.get("rope.scaling.type") == "yarn" else 0.0,
    "rope.scaling.yarn_attn_factor": lambda _: 1.0,
    "rope.scaling.yarn_beta_fast": lambda _: 32.0,
    "rope.scaling.yarn_beta_slow": lambda _: 1.0,
    "attention.sliding_window": lambda _: 0,
    "attention.causal": lambda _: True,
    "expert_count": lambda _: 0,
    "expert_used_count": lambda _: 0,
}
OF_ARCH: Mapping[tuple[str, str], Any] = {
    ("gemma2", "attention.sliding_window"): 4096,
    ("gemma2", "attention.sliding_window_pattern"): 2,
    ("gemma2", "attn_logit_softcapping"): 50.0,
    ("gemma2", "final_logit_softcapping"): 30.0,
    ("gemma3", "attention.sliding_window_pattern"): 6,
    ("gemma3", "rope.freq_base_swa"): 10000.0,
}


def meaning(form: Form, tokens: int | None) -> dict[str, Any]:
    """Every key that shapes the arithmetic, without the architecture's name before it.

    Keys that are left out have the value that llama.cpp takes.
    """
    prefix = f"{form.arch}."
    known: dict[str, Any] = {
        key.removeprefix(prefix): value
        for key, value in form.settings.items()
        if not key.endswith(NOT_ARITHMETIC)
    }
    for (arch, key), value in OF_ARCH.items():
        if arch == form.arch:
            known.setdefault(key, value)
    for key, default in DEFAULTS.items():
        known.setdefault(key, default(known))
    known.setdefault("vocab_size", tokens)
    if known["attention.sliding_window"] == 0:
        known.pop("attention.sliding_window_pattern", None)
    return known


def compare_settings(
    reference: Form, candidate: Form, file: GgufArtefact, other: Artefact | GgufArtefact
) -> list[Check]:
    """The meaning of every key on both sides, and what the reference's config asks beyond it.

    file, other: what the two were read from.
    """
    if reference.arch != candidate.arch:
        wrong = [f"general.architecture: {candidate.arch}, the reference is {reference.arch}"]
        return [found(STEP, "keys that shape the arithmetic", wrong, 1, "keys")]
    rows = reference.tensors["token_embd.weight"].shape[0]
    ours, theirs = meaning(reference, rows), meaning(candidate, _tokens(file))
    keys = sorted(set(ours) | set(theirs))
    wrong = [
        f"{candidate.arch}.{key}: {theirs.get(key)!r}, the reference has {ours.get(key)!r}"
        for key in keys
        if not same(ours.get(key), theirs.get(key))
    ]
    wrong += [f"llama.cpp computes otherwise: {line}" for line in reference.unlike]
    checks = [found(STEP, "keys that shape the arithmetic", wrong, len(keys), "keys")]
    if isinstance(other, Artefact):
        ids = _special_ids(other, file)
    else:
        ids = [
            f"{_id(name)}: {_own(file, name)}, the reference has {_own(other, name)}"
            for name in SPECIAL
            if _own(file, name) != _own(other, name)
        ]
    return [*checks, found(STEP, "special ids", ids, len(SPECIAL), "ids")]


def compare_type(file: GgufArtefact, asked: str | None) -> Check:
    """Whether its matrices have the type that was asked for, or that the file says.

    asked: q4_k_m, f16 …; None: what the file says of itself. In the quantised types, rows that hold
    no whole blocks have another type than the file says; which is told, not judged.
    """
    counts = Counter(kind.name for kind in file.matrices.values())
    told = ", ".join(f"{name} × {n}" for name, n in counts.most_common())
    said, wrong = file.said_type, []
    if asked is not None and said != asked:
        wrong.append(f"the file says {said}, {asked} was asked")
    for kind in dict.fromkeys(k for k in (asked, said) if k and k in ("f32", "f16", "bf16")):
        main = find_kind(kind).main.name
        others = [name for name in counts if name != main]
        if others:
            wrong.append(f"{kind}: there are matrices of {', '.join(others)}")
    return Check("2 tensors", "types", told, asked or "told", not wrong, tuple(wrong))


def same(a: Any, b: Any) -> bool:
    """Equal as llama.cpp reads them: fp32, a value that is 0 or none being left out."""
    if a is None or b is None:
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(float(a), float(b), rel_tol=1e-6)
    return bool(a == b)


def _special_ids(reference: Artefact, file: GgufArtefact) -> list[str]:
    """Those that the tokenizer knows, else config.json; an end of another name is one too."""
    tokenizer, config = reference.chat().tokenizer, reference.stored
    wrong = []
    for name in SPECIAL:
        ours = getattr(tokenizer, f"{name}_token_id", None)
        ours = config.setting(f"{name}_token_id") if ours is None else ours
        theirs = file.file.metadata.get(_id(name))
        if theirs is None and name in ("bos", "eos"):
            theirs = _own(file, name)
            if ours is None:
                continue  # llama.cpp always has one; nothing puts it anywhere
        if not isinstance(ours, int) or theirs is None or theirs == ours:
            continue
        if name == "eos" and theirs in reference.stops():
            continue
        wrong.append(f"{_id(name)}: {theirs}, the reference has {ours}")
    return wrong


def _own(file: GgufArtefact, name: str) -> Any:
    """The id that llama.cpp takes: the file's, else its own for this kind of vocabulary."""
    kind = file.file.metadata.get("tokenizer.ggml.model")
    absent = {
        "llama": {"bos": 1, "eos": 2, "unk": 0},
        "gpt2": {"bos": 11, "eos": 11},
        "t5": {"eos": 1, "unk": 2, "pad": 0},
    }.get(str(kind), {})
    return file.file.metadata.get(_id(name), absent.get(name))


def _id(name: str) -> str:
    return f"tokenizer.ggml.{SPECIAL[name]}_token_id"


def _tokens(file: GgufArtefact) -> int:
    return len(file.file.metadata.get("tokenizer.ggml.tokens", []))
