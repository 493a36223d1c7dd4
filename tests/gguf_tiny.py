"""Tiny random GGUF models of every architecture, written with gguf-py, for tests of what reads,
quantises and runs them. Knows the tensors' names and shapes; converts nothing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tsugiki.formats.gguf_file import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
PIECES = ["▁", "▁a", "▁the", "▁cat", "at", "c", "t", "he", "▁sat", "sa", "s", "a", "h", "e"]
VOCABULARY = 3 + 256 + len(PIECES) + 1  # unk, bos, eos; bytes; pieces; one special token
CONTEXT = 256
Shapes = dict[str, tuple[int, ...]]
TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def layer_shapes(arch: str, hidden: int, inner: int, queries: int, keys: int, head: int) -> Shapes:
    """Names and shapes (rows, columns) of one layer's tensors, without `blk.N.`."""
    found: Shapes = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if arch in ("phi3", "gpt2"):
        found["attn_qkv.weight"] = (queries + 2 * keys, hidden)
    else:
        found |= {
            f"attn_{x}.weight": (n, hidden)
            for x, n in zip("qkv", (queries, keys, keys), strict=True)
        }
        found["ffn_gate.weight"] = (inner, hidden)
    found["attn_output.weight"] = (hidden, queries)
    found["ffn_up.weight"] = (inner * (2 if arch == "phi3" else 1), hidden)
    found["ffn_down.weight"] = (hidden, inner)
    if arch == "qwen2":
        found |= {f"attn_{x}.bias": (n,) for x, n in zip("qkv", (queries, keys, keys), strict=True)}
    if arch in ("qwen3", "gemma3"):
        found |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    if arch in ("gemma2", "gemma3"):
        found |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if arch == "gpt2":
        found |= {n.replace("weight", "bias"): shape[:1] for n, shape in list(found.items())}
    return found


def all_shapes(
    arch: str, hidden: int, inner: int, layers: int, heads: int, groups: int, tied: bool
) -> Shapes:
    """Every tensor of a model."""
    head = hidden // heads
    found: Shapes = {"token_embd.weight": (VOCABULARY, hidden), "output_norm.weight": (hidden,)}
    if arch == "gpt2":
        found |= {"position_embd.weight": (CONTEXT, hidden), "output_norm.bias": (hidden,)}
        groups = heads
    if not tied:
        found["output.weight"] = (VOCABULARY, hidden)
    one = layer_shapes(arch, hidden, inner, heads * head, groups * head, head)
    return found | {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


@dataclass(frozen=True)
class Tiny:
    """A model's shape; its matrices are stored as `dtype`."""

    arch: str = "llama"
    hidden: int = 64
    inner: int = 96
    layers: int = 3
    heads: int = 4
    groups: int = 2
    tied: bool = False
    dtype: str = "F32"

    def shapes(self) -> Shapes:
        """Every tensor's."""
        return all_shapes(
            self.arch, self.hidden, self.inner, self.layers, self.heads, self.groups, self.tied
        )

    def stored(self, name: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
        """The type of one tensor."""
        return TYPES["F32" if len(shape) == 1 or "position" in name else self.dtype]


def write_tiny(
    path: Path,
    tiny: Tiny,
    *,
    seed: int = 0,
    spread: float = 0.25,
    extra: dict[str, int] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """A random model with a byte-level SentencePiece vocabulary; returns its tensors.

    Matrices are drawn N(0, spread²), so that logits spread by about 2; norms and biases around 1
    and 0.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, NDArray[np.float32]] = {}
    writer = begin(path, tiny, extra or {})
    for name, shape in tiny.shapes().items():
        noise = random.standard_normal(shape, np.float32)
        if len(shape) == 2:
            tensors[name] = noise * np.float32(spread)
        else:
            tensors[name] = noise * np.float32(0.1) + np.float32("norm.weight" in name)
        kind = tiny.stored(name, shape)
        writer.add_tensor(name, gguf.quantize(tensors[name], kind), raw_dtype=kind)
    finish(writer)
    return tensors


def write_outline(path: Path, tiny: Tiny) -> None:
    """The same header, and a hole where the data would be: any size costs nothing."""
    writer = begin(path, tiny, {})
    size = 0
    for name, shape in tiny.shapes().items():
        kind = tiny.stored(name, shape)
        nbytes = int(np.prod(shape)) * (4 if kind == TYPES["F32"] else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        size += nbytes + -nbytes % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 32 + size)


def begin(path: Path, tiny: Tiny, extra: dict[str, int]) -> gguf.GGUFWriter:
    """A writer with all metadata."""
    writer = gguf.GGUFWriter(path, tiny.arch)
    add_settings(writer, tiny)
    add_vocabulary(writer)
    for key, value in extra.items():
        writer.add_uint32(key, value)
    return writer


def add_settings(writer: gguf.GGUFWriter, tiny: Tiny) -> None:
    """The keys that shape the arithmetic."""
    head = tiny.hidden // tiny.heads
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(tiny.hidden)
    writer.add_block_count(tiny.layers)
    writer.add_feed_forward_length(tiny.inner)
    writer.add_head_count(tiny.heads)
    if tiny.arch == "gpt2":
        writer.add_layer_norm_eps(1e-5)
        return
    writer.add_head_count_kv(tiny.groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if tiny.arch in ("llama", "phi3"):
        writer.add_rope_dimension_count(head)
    if tiny.arch in ("qwen3", "gemma2", "gemma3"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if tiny.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(16)
    if tiny.arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """unk, bos, eos, the 256 bytes, a few pieces, and a special token <|end|>."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "<|end|>"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [0.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(PIECES), 3])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lora(
    path: Path, arch: str, matrices: dict[str, tuple[int, int]], rank: int, seed: int = 0
) -> None:
    """A random adapter on these matrices (rows, columns), with llama.cpp's own alpha switched off."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for name, (rows, columns) in matrices.items():
        # A table of rows is looked up, not multiplied: llama.cpp wants its A the other way round.
        a, b = (rank, columns), (rows, rank)
        if name == "token_embd.weight":
            a, b = (rows, rank), (columns, rank)
        for part, shape in (("lora_a", a), ("lora_b", b)):
            noise = random.standard_normal(shape, np.float32) * np.float32(0.3)
            writer.add_tensor(f"{name}.{part}", noise)
    finish(writer)


def mix_cases() -> dict[str, Tiny]:
    """Shapes at which llama.cpp's mixes take each of their turns, for every architecture.

    Rows that are multiples of 256, of 32 and of neither; 3 to 80 layers; one to four query heads
    a key head; tied and stored heads; F32, F16 and BF16 sources.
    """
    found: dict[str, Tiny] = {}
    for arch in ARCHITECTURES:
        found |= {
            f"{arch} whole blocks": Tiny(arch, 256, 512, 9, 4, 2),
            f"{arch} tied, grouped": Tiny(arch, 256, 768, 17, 8, 2, True, "F16"),
            f"{arch} rows of 192": Tiny(arch, 192, 512, 16, 4, 1, False, "BF16"),
            f"{arch} rows of 80": Tiny(arch, 80, 96, 5, 5, 5, True, "F16"),
        }
    found |= {
        f"{arch} of 80 layers": Tiny(arch, 256, 256, 80, 8, 2, False, "F16")
        for arch in ("llama", "qwen2")
    }
    found["llama of 80 layers, no groups"] = Tiny("llama", 256, 256, 80, 4, 4, False, "F16")
    return found


NUMBERS = Tiny("llama", 256, 512, 1)  # whose bytes are compared


def types_digest(types: dict[str, str]) -> str:
    """One line for the type of every tensor, in the order of the file."""
    text = "\n".join(f"{name} {kind}" for name, kind in types.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_digest(file: GgufFile) -> str:
    """One line for the bytes of every tensor."""
    digest = hashlib.sha256()
    for name in file.tensors:
        digest.update(name.encode() + file.raw(name).tobytes())
    return digest.hexdigest()[:16]
