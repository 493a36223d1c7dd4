"""Projections whose frozen weight is kept in few bits, and how a model gets them.

A `QuantizedLinear` takes the place of an nn.Linear or of GPT-2's Conv1D; embeddings, norms and the
output head stay as they are, as bitsandbytes leaves them. Its codes are parameters without
gradient, since sharding moves parameters and not buffers. Knows no files and no adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tsugiki.errors import ModelError, UsageError
from tsugiki.kernels.int8_rows import Int8Codes, quantize_int8
from tsugiki.kernels.linear import grouped_linear
from tsugiki.kernels.nf4 import Nf4Codes, quantize_nf4
from tsugiki.kernels.quantized import Codes, QuantizedWeight, Workspace

METHODS: dict[str, Callable[[Tensor], Nf4Codes | Int8Codes]] = {
    "nf4": quantize_nf4,
    "int8": quantize_int8,
}
# What is stored of each method, in the order of the codes' fields.
PARTS: dict[str, tuple[str, ...]] = {
    "nf4": ("packed", "absmax", "scales", "offset"),
    "int8": ("packed", "scales"),
}


class QuantizedLinear(nn.Module):
    """y = W·x + b with W in few bits.

    Args:
        method: nf4 or int8.
        kind: 'linear' or 'conv1d', whichever it replaces; the codes are (out, in) either way.
        codes: its tensors, in the order of `PARTS`.
        bias: (out,) in the type of the model.
        shape: (out, in).
        dtype: of the numbers that `weight` gives.
        workspace: shared by all projections of one base.
    """

    def __init__(
        self,
        method: str,
        kind: str,
        codes: tuple[Tensor, ...],
        bias: Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        self.method, self.kind, self.dtype, self.workspace = method, kind, dtype, workspace
        self.out_features, self.in_features = shape
        for name, tensor in zip(PARTS[method], codes, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def codes(self) -> Codes:
        """The matrix (out, in) as the kernels read it."""
        part = self.get_parameter
        if self.method == "int8":
            return Int8Codes(part("packed"), part("scales"))
        shape = (self.out_features, self.in_features)
        return Nf4Codes(part("packed"), part("absmax"), part("scales"), part("offset"), shape)

    @property
    def frozen(self) -> QuantizedWeight:
        """Behind the protocol of frozen weights."""
        return QuantizedWeight(self.codes, self.bias, self.workspace, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The numbers, unpacked anew at every look, stored as the replaced module would."""
        dense = self.frozen.dense()
        return dense.T if self.kind == "conv1d" else dense

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out)."""
        return grouped_linear(x, [self.frozen], [])[0]

    def extra_repr(self) -> str:
        """Shape and method, for printing the model."""
        return f"{self.in_features}, {self.out_features}, {self.method}"


def quantized(
    method: str, module: nn.Module, weight: Tensor, workspace: Workspace, dtype: torch.dtype
) -> QuantizedLinear:
    """The few-bit form of an nn.Linear or Conv1D.

    Args:
        module: says kind, shape and bias.
        weight: its numbers, as stored: (out, in), of a Conv1D (in, out).

    Raises:
        ModelError: NaN or inf among them.
    """
    conv = isinstance(module, Conv1D)
    matrix = weight.T if conv else weight
    try:
        codes = METHODS[method](matrix)
    except ValueError as error:
        raise ModelError(f"a weight holds {error} and cannot be quantised") from None
    tensors = tuple(getattr(codes, name) for name in PARTS[method])
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return QuantizedLinear(
        method,
        "conv1d" if conv else "linear",
        tensors,
        None if bias is None else bias.detach(),
        (matrix.shape[0], matrix.shape[1]),
        dtype,
        workspace,
    )


def check_method(asked: str) -> str:
    """The method as it was asked for.

    Raises:
        UsageError: there is none of that name.
    """
    if asked not in ("none", *METHODS):
        raise UsageError("no such --quantize", got=asked, allowed=", ".join(("none", *METHODS)))
    return asked


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """Path → projection of all that are quantised: every one but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def quantize_modules(model: nn.Module, method: str) -> list[str]:
    """Quantise a model that is in memory, module by module; returns the paths.

    Raises:
        ModelError: there is nothing to quantise, or NaN or inf in a weight, which is named.
    """
    found = quantizable(model)
    if not found:
        raise ModelError("this model has no projection that can be quantised")
    paths, workspace = list(found), Workspace()
    for path in paths:
        module = found.pop(path)  # its memory goes before the next one's codes come
        weight = module.weight
        assert isinstance(weight, Tensor)
        try:
            small = quantized(method, module, weight.detach(), workspace, weight.dtype)
        except ModelError as error:
            raise ModelError(f"{path}: {error.problem}") from None
        model.set_submodule(path, small)
    return paths


def dense_copy(module: nn.Module) -> nn.Module:
    """A copy whose quantised projections are plain ones with the same numbers."""
    twin = copy.deepcopy(module)
    for path, child in list(twin.named_modules()):
        if isinstance(child, QuantizedLinear):
            if not path:
                return _plain(child)
            twin.set_submodule(path, _plain(child))
    return twin


def _plain(child: QuantizedLinear) -> nn.Module:
    """An nn.Linear or Conv1D with the unpacked numbers."""
    kind = Conv1D if child.kind == "conv1d" else nn.Linear
    sizes = (child.in_features, child.out_features)
    with torch.device("meta"):  # nothing is drawn for what is replaced at once
        plain = kind(*(reversed(sizes) if kind is Conv1D else sizes))
    plain.weight = nn.Parameter(child.weight, requires_grad=False)
    plain.bias = None if child.bias is None else nn.Parameter(child.bias.data, requires_grad=False)
    return plain
