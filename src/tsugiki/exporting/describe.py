"""What a GGUF says of itself for people: name, size, licence, languages, base.

Taken from the base's model card by gguf-py's own rules, so that the file reads as one of the
official converter. Knows no tensors.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
import yaml
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType

from tsugiki.adapters.joined import Joined
from tsugiki.formats.gguf_encode import Metadata
from tsugiki.formats.gguf_settings import sampling_metadata
from tsugiki.models.shards import read_generation

KINDS = (GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY)


def general_metadata(joined: Joined, arch: str, name: str, parameters: int) -> Metadata:
    """The keys under `general.`."""
    folder = joined.base.folder
    found: Metadata = {"general.architecture": arch, "general.type": "model"}
    found |= sampling_metadata(read_generation(joined.base.folder))
    found |= _card(joined, name, parameters)
    found["general.quantization_version"] = int(GGML_QUANT_VERSION)
    found["general.name"] = safe_name(name, _strips_after_tokens(folder))
    return found


def safe_name(name: str, strips: bool) -> str:
    """A name that does not change how llama.cpp reads text.

    It takes "phi-3" or "phi3" in a model's name to mean that blanks after special tokens are
    dropped, as Phi-3's first tokenizer did, and needs that tokenizer's tokens to load at all.
    """
    marked = any(mark in name.lower() for mark in ("phi-3", "phi3"))
    if strips and not marked:
        return f"{name} (Phi-3)"
    if marked and not strips:
        for mark in ("Phi-3", "phi-3", "PHI-3", "Phi3", "phi3", "PHI3"):
            name = name.replace(mark, f"{mark[:3]} 3")
    return name


def _card(joined: Joined, name: str, parameters: int) -> Metadata:
    writer = gguf.GGUFWriter(None, "none")
    try:
        card = gguf.Metadata.load(None, joined.base.folder, name, parameters)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, AttributeError, TypeError):
        card = gguf.Metadata(name=name)  # a model card that nobody can read is no reason to stop
    if joined.changes is not None:
        card = gguf.Metadata(
            name=name,
            license=card.license,
            license_name=card.license_name,
            license_link=card.license_link,
            languages=card.languages,
            tags=card.tags,
            base_models=[{"name": joined.identity.name if joined.identity else card.name}],
        )
    if card.size_label is None:
        card.size_label = gguf.size_label(parameters, 0, 0, 0)
    card.set_gguf_meta_model(writer)
    return {
        key: _plain(value.value)
        for key, value in writer.kv_data[0].items()
        if key != "general.architecture" and value.type in KINDS
    }


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else value


def _strips_after_tokens(folder: Any) -> bool:
    """Whether special tokens swallow the blanks behind them (`rstrip`), as Phi-3's do."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
    texts = {token["content"] for token in added if token.get("rstrip")}
    return {"<|end|>", "<|user|>"} <= texts
