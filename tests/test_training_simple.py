"""`tsugiki.train` in a user's own code: any module that gives logits, and values that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny_model
from torch import nn

import tsugiki
from tsugiki.adapters.attach import detach
from tsugiki.config import LoraConfig
from tsugiki.errors import AdapterError, DataError, UsageError

ROWS = [((5, 6, 7, 8), (-100, 6, 7, 8)), ((9, 3), (9, 3)), ((2, 2, 2), (2, 2, 2))]


class Recurrent(nn.Module):
    """No transformer: ids (1, T) → logits (1, T, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.past = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.past(self.table(ids))[0])


def test_a_module_of_ones_own_is_trained_on_its_logits() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    tsugiki.attach(model, LoraConfig(r=4, alpha=8, targets=["head"]))
    losses = tsugiki.train(model, ROWS, steps=60, learning_rate=0.05, batch_size=3)
    assert losses[-1] < losses[0] - 1
    alone = nn.functional.cross_entropy(model(torch.tensor([[9, 3]]))[0, :1], torch.tensor([3]))
    assert float(alone.detach()) < losses[0], "each row is a document of its own"
    with pytest.raises(AdapterError, match="logits of every token"):
        tsugiki.train(attached(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(8, 3)), ROWS[1:2],
                      steps=1, learning_rate=0.1)  # fmt: skip


def attached(*parts: nn.Module) -> nn.Module:
    model = nn.Sequential(*parts)
    tsugiki.attach(model, LoraConfig(r=2, alpha=2, targets="all-linear"))
    return model


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": float("nan")}, "finite"),
        ({"learning_rate": -0.01}, "above 0"),
        ({"batch_size": 0}, "batch"),
        ({"gradient_accumulation_steps": 0}, "accumulation"),
        ({"scheduler": "cosin"}, "cosine"),
        ({"warmup_ratio": 2.0}, "warmup"),
        ({"max_grad_norm": float("nan")}, "finite"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_values_that_make_no_sense_change_nothing(given: dict[str, Any], said: str) -> None:
    model = tiny_model("llama")
    tsugiki.attach(model, LoraConfig(r=2, alpha=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=said):
        tsugiki.train(model, ROWS, **{"steps": 1, "learning_rate": 0.01, **given})
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (((5, 6, 7), (6, 7)), "3 ids and 2 labels"),
        (((), ()), "0 ids"),
        (((5, 99_999), (5, 6)), "the model knows 320"),
        (((5, -3), (5, 6)), "ids -3 to 6"),
        (((5, 6), (5, 99_999)), "the model knows 320"),
        (((5,) * 300, (5,) * 300), "the model sees 256"),
    ],
)
def test_rows_that_the_model_has_no_place_for(
    row: tuple[tuple[int, ...], tuple[int, ...]], said: str
) -> None:
    model = tiny_model("llama")
    tsugiki.attach(model, LoraConfig(r=2, alpha=2))
    with pytest.raises(DataError, match=said) as caught:
        tsugiki.train(model, [*ROWS, row], steps=1, learning_rate=0.01)
    assert "row 4" in str(caught.value)


def test_a_projection_used_twice_carries_its_adapter_twice() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    tsugiki.attach(model, LoraConfig(r=2, alpha=2, targets="all-linear"))
    assert model[0] is model[2]
    nn.init.normal_(model[0].lora_B)
    x = torch.randn(3, 8)
    weight = shared.weight + model[0].scale * model[0].lora_B @ model[0].lora_A
    once = torch.tanh(nn.functional.linear(x, weight, shared.bias))
    expected = nn.functional.linear(once, weight, shared.bias)
    assert torch.allclose(model(x), expected, atol=1e-5)
    detach(model)
    assert model[0] is shared
    assert model[2] is shared


def test_a_loop_of_ones_own_may_use_autocast() -> None:
    model = tiny_model("llama")
    tsugiki.attach(model, LoraConfig(r=2, alpha=2))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        base = model(ids).logits
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, 0.0, 0.2)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    error, effect = (logits.detach().float() - expected).norm(), (base - expected).norm()
    assert float(error / effect) < 0.1
    logits.float().logsumexp(-1).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads)
