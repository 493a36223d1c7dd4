"""A model that computes in fp32 for a while, whatever its weights are stored in: a yardstick.

Weights behind the one door are widened a part at a time as they multiply, so that the model never
stands in memory twice; what is left (norms, biases, unknown modules) is widened and put back as it
was. Knows no training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from tsugiki.kernels.linear import WideWeight
from tsugiki.models.projections import multiplying_with, stored_weight


@contextlib.contextmanager
def in_fp32(model: nn.Module, doors: list[nn.Module]) -> Iterator[None]:
    """While gradients are recorded, everything but trained parameters is computed in fp32.

    Args:
        doors: projections whose products can be chosen (`models/int8.py`).
    """
    behind = {id(p) for module in doors for p in module.parameters()}
    stored: list[tuple[nn.Parameter, Tensor]] = []
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    assert isinstance(embedding, nn.Module)
    handle = embedding.register_forward_hook(lambda _module, _given, out: out.float())
    try:
        for parameter in model.parameters():
            narrow = parameter.is_floating_point() and parameter.dtype.itemsize < 4
            if narrow and not parameter.requires_grad and id(parameter) not in behind:
                stored.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
        with multiplying_with([(m, WideWeight(stored_weight(m))) for m in doors]):
            yield
    finally:
        handle.remove()
        for parameter, data in stored:
            parameter.data = data
