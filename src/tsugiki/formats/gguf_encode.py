"""GGUF version 3 as bytes: metadata, the table of tensors, and numbers in the types written here.

Values carry their GGUF type in their Python type: int → UINT32, numpy's int32 → INT32, float →
FLOAT32, bool, str, bytes → [UINT8], and lists of str, int (INT32) or float. Encoding a vocabulary
of 262,144 tokens and twice as many merges takes a third of a second. Knows no model.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from gguf.constants import GGUFValueType
from torch import Tensor

from tsugiki.formats.ggml_types import TYPES, GgmlType
from tsugiki.formats.gguf_file import DEFAULT_ALIGNMENT, MAGIC, TensorInfo

Value = (
    bool | int | float | str | bytes | np.int32 | Sequence[str] | Sequence[int] | Sequence[float]
)
Metadata = dict[str, Value]
VERSION = 3
DIRECT = ("f32", "f16", "bf16", "q8_0")  # types of files that need no llama.cpp
DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
BLOCK = TYPES["Q8_0"].block
Q8_LARGEST = 127 * 65504.0  # the scale is F16


def type_for(shape: Sequence[int], wanted: GgmlType) -> GgmlType:
    """The type that a matrix can have: rows that are no multiple of the block stay F16."""
    return wanted if shape[-1] % wanted.block == 0 else TYPES["F16"]


def lay_out(tensors: Sequence[tuple[str, tuple[int, ...], GgmlType]]) -> list[TensorInfo]:
    """Where each tensor's bytes lie, counted from the first one's."""
    found, at = [], 0
    for name, shape, kind in tensors:
        info = TensorInfo(name, kind, shape, at, at)
        size = info.rows * kind.row_bytes(info.columns)
        found.append(TensorInfo(name, kind, shape, at, at + size))
        at += size + padding(size)
    return found


def padding(size: int) -> int:
    """Bytes to the next multiple of the alignment."""
    return -size % DEFAULT_ALIGNMENT


def encode_header(metadata: Metadata, tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor's numbers, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        form = f"<I{len(dims)}QIQ"
        parts.append(struct.pack(form, len(dims), *dims, tensor.type.code, tensor.begin))
    head = b"".join(parts)
    return head + bytes(padding(len(head)))


def encode_numbers(block: Tensor, kind: GgmlType) -> Tensor:
    """Rows in fp32 → the numbers of F32, F16, BF16 or Q8_0; whole rows, as blocks lie along them.

    Raises:
        OverflowError: a number does not fit the type, or is not finite.
    """
    quantised = kind.name == "Q8_0"
    done = quantize_q8_0(block) if quantised else block.to(DTYPES[kind.name])
    largest = Q8_LARGEST if quantised else torch.finfo(DTYPES[kind.name]).max
    low, high = (float(end) for end in block.aminmax()) if block.numel() else (0.0, 0.0)
    # One pass; only what lies near the end of the type, or is NaN, needs the slow question.
    fits = -largest <= low and high <= largest
    if not fits and (quantised or not bool(torch.isfinite(done).all())):
        raise OverflowError(f"{max(-low, high):.4g}")
    return done


def quantize_q8_0(block: Tensor) -> Tensor:
    """ggml's Q8_0: 32 numbers share a scale in F16. (rows, n) fp32 → (rows, n / 32 · 34) bytes.

    Byte for byte ggml's reference: scale = max |x| / 127, half away from zero.
    """
    rows, columns = block.shape
    groups = block.reshape(-1, BLOCK)
    scale = groups.abs().amax(1, keepdim=True) / 127
    scaled = groups * torch.where(scale == 0, 0.0, 1 / scale)
    size = scaled.abs()
    whole = size.floor()  # x + 0.5 would round 0.49999997 up
    rounded = whole.add_((size - whole).mul_(2).floor_()).mul_(scaled.sign())
    out = torch.empty(len(groups), 2 + BLOCK, dtype=torch.uint8)
    out[:, :2] = scale.half().view(torch.uint8)
    out[:, 2:] = rounded.to(torch.int8).view(torch.uint8)
    return out.reshape(rows, columns // BLOCK * (2 + BLOCK))


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, bytes):
        head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, len(value))
        return head + value
    if isinstance(value, bool):
        return struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, np.int32):
        return struct.pack("<Ii", GGUFValueType.INT32, value)
    if isinstance(value, int):
        return struct.pack("<II", GGUFValueType.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", GGUFValueType.FLOAT32, value)
    return struct.pack("<I", GGUFValueType.ARRAY) + _array(value)


def _array(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    first = values[0]
    if isinstance(first, str):
        texts = b"".join(_string(str(text)) for text in values)
        return struct.pack("<IQ", GGUFValueType.STRING, len(values)) + texts
    kind = GGUFValueType.FLOAT32 if isinstance(first, float) else GGUFValueType.INT32
    numbers = np.asarray(values, dtype=np.float32 if isinstance(first, float) else np.int32)
    return struct.pack("<IQ", kind, len(values)) + numbers.tobytes()
