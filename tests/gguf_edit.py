"""A GGUF file written again with some keys or tensors changed, for tests of what finds faults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsugiki.formats.gguf_encode import encode_header, lay_out, padding
from tsugiki.formats.gguf_file import GgufFile, open_gguf

Tensors = dict[str, NDArray[np.float32]]


def keys_of(file: GgufFile) -> dict[str, Any]:
    """Metadata in the Python types that the encoder tells GGUF's types by."""
    found: dict[str, Any] = {}
    for key in file.metadata:
        value, kind = file.metadata[key], file.metadata.kind(key)
        if kind == "[u8]":
            value = value.tobytes()
        elif kind[0] == "[" and kind != "[str]":
            value = value.tolist()
        elif kind == "i32":
            value = np.int32(value)
        found[key] = value
    return found


def edit(
    source: Path,
    target: Path,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32] | None] | None = None,
) -> Path:
    """Write `source` again with these keys and F32 tensors in place of its own; None drops one."""
    file = open_gguf(source)
    data = {n: file.raw(n).tobytes() for n in file.tensors}
    shapes = {n: (n, info.shape, info.type) for n, info in file.tensors.items()}
    for name, values in (tensors or {}).items():
        if values is None:
            del data[name], shapes[name]
        else:
            assert file.tensors[name].type.name == "F32"
            data[name] = np.ascontiguousarray(values, np.float32).tobytes()
            shapes[name] = (name, values.shape, file.tensors[name].type)
    known = {k: v for k, v in {**keys_of(file), **(keys or {})}.items() if v is not None}
    body = b"".join(data[name] + bytes(padding(len(data[name]))) for name in shapes)
    target.write_bytes(encode_header(known, lay_out(list(shapes.values()))) + body)
    open_gguf(target)
    return target
