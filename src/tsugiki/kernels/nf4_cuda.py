"""NF4 on an NVIDIA GPU through bitsandbytes' own kernel, imported when it is first needed.

Not yet measured on a GPU; on a CPU the same call gives the same bits. Knows nothing else.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tsugiki.kernels.nf4 import BLOCK, Nf4Codes, block_scales
from tsugiki.kernels.quantized import Workspace


@cache
def available() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def unpack(codes: Nf4Codes, dtype: torch.dtype) -> Tensor:
    """The whole matrix (out, in), in fresh memory."""
    import bitsandbytes  # noqa: F401 (registers the operation)

    scales = block_scales(codes, Workspace())
    packed = codes.packed[: -(-codes.shape[0] * codes.shape[1] // 2)]
    unpacked = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, BLOCK, "nf4", codes.shape, dtype
    )
    assert isinstance(unpacked, Tensor)
    return unpacked
