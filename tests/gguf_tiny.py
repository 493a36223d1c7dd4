"""Tiny GGUF models written with gguf-py, for tests of what reads, quantises and runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

PIECES = ["▁", "▁a", "▁the", "▁cat", "at", "c", "t", "he", "▁sat", "sa", "s", "a", "h", "e"]
VOCABULARY = 3 + 256 + len(PIECES) + 1  # unk, bos, eos; bytes; pieces; one special token
TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def write_tiny(
    path: Path,
    arch: str = "llama",
    *,
    hidden: int = 64,
    inner: int = 96,
    layers: int = 3,
    heads: int = 4,
    groups: int = 2,
    tied: bool = False,
    dtype: str = "F32",
    seed: int = 0,
    spread: float = 0.25,
    extra: dict[str, Any] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """A random llama or gpt2 with a byte-level SentencePiece vocabulary; returns its tensors."""
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) * spread).astype(np.float32)

    def vector(size: int, around: float) -> NDArray[np.float32]:
        return (around + random.standard_normal(size) * 0.1).astype(np.float32)

    head = hidden // heads
    tensors: dict[str, NDArray[np.float32]] = {"token_embd.weight": matrix(VOCABULARY, hidden)}
    for i in range(layers):
        at = f"blk.{i}."
        if arch == "llama":
            tensors |= {
                f"{at}attn_norm.weight": vector(hidden, 1.0),
                f"{at}attn_q.weight": matrix(hidden, hidden),
                f"{at}attn_k.weight": matrix(groups * head, hidden),
                f"{at}attn_v.weight": matrix(groups * head, hidden),
                f"{at}attn_output.weight": matrix(hidden, hidden),
                f"{at}ffn_norm.weight": vector(hidden, 1.0),
                f"{at}ffn_gate.weight": matrix(inner, hidden),
                f"{at}ffn_up.weight": matrix(inner, hidden),
                f"{at}ffn_down.weight": matrix(hidden, inner),
            }
        else:
            for name, rows, columns in (
                ("attn_qkv", 3 * hidden, hidden),
                ("attn_output", hidden, hidden),
                ("ffn_up", inner, hidden),
                ("ffn_down", hidden, inner),
            ):
                tensors[f"{at}{name}.weight"] = matrix(rows, columns)
                tensors[f"{at}{name}.bias"] = vector(rows, 0.0)
            for name in ("attn_norm", "ffn_norm"):
                tensors[f"{at}{name}.weight"] = vector(hidden, 1.0)
                tensors[f"{at}{name}.bias"] = vector(hidden, 0.0)
    tensors["output_norm.weight"] = vector(hidden, 1.0)
    if arch == "gpt2":
        tensors["output_norm.bias"] = vector(hidden, 0.0)
        tensors["position_embd.weight"] = matrix(256, hidden)
    if not tied:
        tensors["output.weight"] = matrix(VOCABULARY, hidden)

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    if arch == "llama":
        writer.add_head_count_kv(groups)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(head)
    else:
        writer.add_layer_norm_eps(1e-5)
    add_vocabulary(writer)
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    for name, values in tensors.items():
        if values.ndim == 1 or "position" in name or dtype == "F32":
            writer.add_tensor(name, values)
        else:
            stored = gguf.quantize(values, TYPES[dtype])
            writer.add_tensor(name, stored, raw_dtype=TYPES[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """unk, bos, eos, the 256 bytes, a few pieces, and a special token <|end|>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<|end|>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 3]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
