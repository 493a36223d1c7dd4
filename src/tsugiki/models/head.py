"""Proves that a head's rows may go through the chunked cross entropy instead of becoming logits.

Soft caps, logit scales and whatever else a model does after its last hidden row are its own
forward's: it is run on given rows, its body replaced, and must give the same loss and gradient.
Knows no adapters.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.kernels.linear import DenseWeight
from tsugiki.kernels.loss import Head, chunked_cross_entropy
from tsugiki.models.closeness import UNSEEN, compare
from tsugiki.models.tuned import part_of

ROWS = 72  # hidden rows: enough for what is taken for many
HEAD_ROWS = 509  # of the vocabulary: how logits are made does not depend on how many there are


def output_of(model: nn.Module) -> nn.Module:
    """The projection that makes logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    assert isinstance(head, nn.Module)
    return head


def prove_head(model: nn.Module) -> tuple[tuple[float, float | None] | None, str]:
    """((scale, soft cap) of the logits, '') where the chunked cross entropy agrees with the
    model's own loss and its gradient; (None, why not) otherwise."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    part = part_of(output_of(model))
    if part is None or part[1] is not None:
        return None, "it is adapted or not a plain projection"
    weight = part[0]
    assert isinstance(weight, DenseWeight)
    rows = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // HEAD_ROWS))
    rows = rows.to(weight.weight.device)
    table = weight.rows(rows).detach()
    bias = None if weight.bias is None else weight.bias[rows].detach()
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, ROWS, table.shape[1], generator=generator).to(table)
    targets = torch.randint(0, len(rows), (ROWS,), generator=generator).to(rows.device)

    def own(dtype: torch.dtype) -> list[Tensor]:
        leaf = hidden.to(dtype).requires_grad_()
        logits = _tail(model, table.to(dtype), None if bias is None else bias.to(dtype), leaf)
        wide = logits.to(torch.promote_types(dtype, torch.float32))
        return _loss_numbers(nn.functional.cross_entropy(wide, targets, reduction="sum"), leaf)

    try:
        with torch.enable_grad():
            leaf = hidden.clone().requires_grad_()
            head = Head(DenseWeight(table, bias), scale, softcap)
            ours = _loss_numbers(chunked_cross_entropy(leaf[0], head, targets), leaf)
            wide = torch.float64 if table.dtype == torch.float32 else torch.float32
            plain, exact = own(table.dtype), own(wide)
    except Exception as error:  # whatever a foreign model raises means: keep its own way
        reason = f"cannot be tried: {str(error).strip().splitlines()[0][:120]}"
    else:
        # a single sum's error is luck, so the loss itself gets a plain bound
        off = float(abs(ours[0].double() - exact[0].double()) / exact[0].double().abs())
        reason = compare(ours[1:], plain[1:], exact[1:])
        if not off <= max(UNSEEN, torch.finfo(table.dtype).eps):
            reason = f"the loss is off by {off:.1e}"
    return (None, reason) if reason else ((scale, softcap), "")


def _loss_numbers(loss: Tensor, leaf: Tensor) -> list[Tensor]:
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]


def _tail(model: nn.Module, table: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """The model's own logits (n, V) of given hidden rows: its body replaced by these rows."""
    tail = copy.copy(model)
    tail._modules = dict(model._modules)
    body = model.base_model_prefix
    tail._modules[str(body)] = _Given(hidden)
    head = nn.Linear(table.shape[1], table.shape[0], bias=bias is not None, device="meta")
    head.weight = nn.Parameter(table, requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias, requires_grad=False)
    name = next(n for n, m in model.named_modules() if m is output_of(model))
    tail._modules[name] = head
    ids = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=hidden.device)
    logits = tail(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits[0]


class _Given(nn.Module):
    """A model body that answers with the given rows."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = (hidden,)

    def forward(self, *_: Any, **__: Any) -> Any:
        """The rows, under the names that heads read."""
        (hidden,) = self.hidden
        return _Answer(last_hidden_state=hidden)


class _Answer(SimpleNamespace):
    """What a model's body returns: named fields, or the first by index."""

    past_key_values = hidden_states = attentions = cross_attentions = router_logits = None

    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        hidden = self.last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden
