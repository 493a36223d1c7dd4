"""The form of an adapter that PEFT, vLLM, SGLang and llama.cpp's converter read alike.

Every pair is padded with zeros to one rank, its scale multiplied into B, lora_alpha = r; no
patterns, no rsLoRA. Targets are named by their last word, and every module that those words mean
has a pair (of zeros where it was not adapted), so that no reader has to guess. What these readers
take is from their documentation and code of 2026. Knows no model in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tsugiki.adapters.algebra import LowRank
from tsugiki.adapters.joined import Joined
from tsugiki.adapters.peft_config import PeftConfig
from tsugiki.adapters.record import PREFIX
from tsugiki.errors import AdapterError
from tsugiki.files import atomic_folder
from tsugiki.models.families import HEAD, is_transposed, module_path

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16  # of vLLM's --max-lora-rank
NOT_COPIED = ("adapter_model", "adapter_config", "tsugiki.json", "README", "training_info")
# What SGLang has buffers for (`_KNOWN_LORA_TARGET_MODULES`), under its own fused names.
SGLANG = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj",
    "gate_up_proj", "embed_tokens", "lm_head",
}  # fmt: skip
WITHOUT_VLLM = ("gpt2",)  # no LoRA in its implementation
ENDS = ("lm_head", "embed_tokens")


@dataclass(frozen=True)
class Verdict:
    """What one reader makes of the portable form. takes: all of it; needs: flags, or why not."""

    reader: str
    takes: bool
    needs: str


@dataclass(frozen=True)
class Portable:
    """The portable form: tensors under PEFT's names, config, and what each reader says.

    template: the chat template that training used, where the base brings another.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    rank: int
    padded: int
    verdicts: tuple[Verdict, ...]
    folder: Path
    template: str | None


def make_portable(joined: Joined) -> Portable:
    """Rewrite an adapter; `joined` was made with untie=True, so that tied parts are told here.

    Raises:
        AdapterError: what can only travel merged: DoRA, modules_to_save, a tied embedding or head.
    """
    assert joined.changes is not None
    changes = joined.changes
    low: dict[str, LowRank] = {}
    wrong = ["the embedding or the head, which this base ties together"] if joined.untie else []
    for change in changes.by_name.values():
        if not isinstance(change, LowRank):
            wrong.append(f"{change.path}: trained whole (modules_to_save)")
        elif change.magnitude is not None:
            wrong.append(f"{change.path}: DoRA")
        else:
            low[change.path] = change
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise AdapterError(
            f"{changes.folder} can only travel merged",
            got="; ".join(wrong[:4]) + more,
            fix=f"tsugiki merge {changes.folder}",
        )
    rank = max(change.a.shape[0] for change in low.values())
    words = {path.rpartition(".")[2] for path in low}
    tensors: dict[str, Tensor] = {}
    padded = 0
    for path, (outs, ins) in _modules(joined, words).items():
        found = low.get(path)
        a, b = torch.zeros(rank, ins), torch.zeros(outs, rank)
        if found is not None:
            r = found.a.shape[0]
            a[:r] = found.a.float()
            b[:, :r] = found.b.float() * found.scale
        else:
            padded += 1
        embedding = found is not None and found.embedding
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else (
            "lora_A.weight", "lora_B.weight",
        )  # fmt: skip
        tensors |= {f"{PREFIX}{path}.{ends[0]}": a, f"{PREFIX}{path}.{ends[1]}": b}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _base_name(joined, changes.config),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(words),
        "bias": "none",
        "fan_in_fan_out": joined.base.model_type == "gpt2",
        "inference_mode": True,
    }
    verdicts = _verdicts(joined.base.model_type, rank, words)
    return Portable(tensors, config, rank, padded, verdicts, changes.folder, joined.template())


def write_portable(portable: Portable, output: Path) -> Path:
    """A folder with the adapter and, as they are, the tokenizer files beside the old one.

    Raises:
        RunError: it exists. DiskError: none left, no permission.
    """
    with atomic_folder(output) as temporary:
        for file in sorted(portable.folder.iterdir()):
            if file.is_file() and file.name[0] != "." and not file.name.startswith(NOT_COPIED):
                (temporary / file.name).write_bytes(file.read_bytes())
        if portable.template is not None:
            path = temporary / "chat_template.jinja"
            path.write_text(portable.template, encoding="utf-8")
        content = save(portable.tensors, metadata={"format": "pt"})
        (temporary / "adapter_model.safetensors").write_bytes(content)
        text = json.dumps(portable.config, ensure_ascii=False, indent=2) + "\n"
        (temporary / "adapter_config.json").write_text(text, encoding="utf-8")
    return output


def _modules(joined: Joined, words: set[str]) -> dict[str, tuple[int, int]]:
    """Module path → (outputs, inputs) of every module that PEFT finds under these words."""
    base = joined.base
    assert joined.changes is not None
    changed = joined.changes.by_name.values()
    embeddings = {c.path for c in changed if isinstance(c, LowRank) and c.embedding}
    found = {}
    for disk, stored in base.tensors.items():
        path = module_path(disk, base.model_type).removesuffix(".weight")
        if path.rpartition(".")[2] not in words or len(stored.shape) != 2:
            continue
        if not disk.endswith(".weight"):
            continue
        rows, columns = stored.shape
        turned = path in embeddings or is_transposed(path, base.model_type, False)
        found[path] = (columns, rows) if turned else (rows, columns)
    missing = {c.path for c in changed} - set(found)
    assert not missing or missing == {HEAD.removesuffix(".weight")}, missing
    return found


def _base_name(joined: Joined, config: PeftConfig) -> str:
    if joined.identity is not None:
        return joined.identity.name
    return config.base_name or str(joined.base.folder)


def max_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds a rank; None beyond the largest."""
    return next((r for r in VLLM_RANKS if r >= rank), None)


def _verdicts(model_type: str, rank: int, words: set[str]) -> tuple[Verdict, ...]:
    ends = sorted(words & set(ENDS))
    held = max_rank(rank)
    vllm = f"--max-lora-rank {held}" if rank > DEFAULT_RANK else ""
    if model_type in WITHOUT_VLLM:
        vllm_says = Verdict("vLLM", False, f"it has no LoRA for {model_type}: merge instead")
    elif held is None:
        vllm_says = Verdict("vLLM", False, f"rank {rank} is beyond its {VLLM_RANKS[-1]}")
    elif ends:
        vllm_says = Verdict(
            "vLLM", True, f"{vllm} (for {', '.join(ends)} only some of its models)".strip()
        )
    else:
        vllm_says = Verdict("vLLM", True, vllm)
    strange = sorted(words - SGLANG)
    sglang = (
        Verdict("SGLang", False, f"it has no place for {', '.join(strange)}: merge instead")
        if strange
        else Verdict("SGLang", True, "")
    )
    from tsugiki.models.conversion import experts_for_peft  # loads transformers

    moved = sorted(words & experts_for_peft(model_type))
    instead = f"it takes {', '.join(moved)} for experts: give it the adapter itself"
    return (
        Verdict("PEFT", not moved, instead if moved else ""),
        vllm_says,
        sglang,
        Verdict("llama.cpp", True, "as GGUF: tsugiki export ADAPTER --gguf-lora"),
    )
