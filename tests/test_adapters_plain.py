"""attach, detach, save_adapter and load_adapter on modules that transformers never saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

import tsugiki
from tsugiki import LoraConfig
from tsugiki.errors import AdapterError


class Own(nn.Module):
    """A model of one's own: an embedding tied to the head, residual blocks, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            for _ in range(2)
        )
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, 20)."""
        x = self.embed(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "Sequential": (sequential, torch.randn(6, 8), ["0", "2"]),
    "one vector": (sequential, torch.randn(8), ["0", "2"]),
    "four axes": (sequential, torch.randn(2, 3, 5, 8), ["0", "2"]),
    "double": (lambda: sequential().double(), torch.randn(6, 8).double(), ["0", "2"]),
    "own": (Own, torch.arange(14).reshape(2, 7),
            ["blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3", "head"]),
    "image": (image, torch.randn(2, 3, 8, 8), ["2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_module_of_ones_own_is_trained_saved_and_loaded(tmp_path: Path, case: str) -> None:
    make, given, paths = CASES[case]
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    found = tsugiki.attach(model, LoraConfig(r=2, alpha=4))
    assert [target.path for target in found.targets] == paths
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == found.trainable
    with torch.no_grad():
        assert torch.equal(model(given), plain(given)), "B is zero"
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    wanted = torch.randn(plain(given).shape, dtype=plain(given).dtype)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(given) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tsugiki.save_adapter(model, tmp_path / "adapter")
    other = copy.deepcopy(plain)
    tsugiki.load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(given), model(given))
        assert not torch.equal(other(given), plain(given))
        assert tsugiki.detach(model) == paths
        assert torch.equal(model(given), plain(given))
    assert all(p.requires_grad for p in model.parameters())


def test_no_rows_give_no_rows() -> None:
    model = sequential()
    tsugiki.attach(model, LoraConfig(r=2))
    assert model(torch.randn(0, 8)).shape == (0, 4)


class Mixed(nn.Module):
    """torch's own attention and layer beside a projection that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.last = nn.Linear(16, 4)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("all-linear", "MultiheadAttention reads the weight of attention.out_proj without"),
        (("out_proj", "last"), "out_proj: MultiheadAttention reads the weight"),
        (("layer.linear1",), "linear1: TransformerEncoderLayer reads the weight"),
    ],
)
def test_a_weight_that_is_read_without_a_call_is_refused(
    targets: str | tuple[str, ...], said: str
) -> None:
    model = Mixed()
    with pytest.raises(AdapterError, match=said):
        tsugiki.attach(model, LoraConfig(r=2, targets=targets))
    found = tsugiki.attach(model, LoraConfig(r=2, targets=("last",)))
    assert [target.path for target in found.targets] == ["last"]


SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        sequential,
        lambda: AutoModel.from_config(AutoConfig.for_model("llama", **SMALL)),
        lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL)),
        lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **SMALL)),
        lambda: AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model("t5", d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16,
                                 vocab_size=64)
        ),
    ],
    ids=["Sequential", "no head", "masked", "encoder", "encoder and decoder"],
)  # fmt: skip
def test_train_refuses_what_says_no_next_token(make: Callable[[], nn.Module]) -> None:
    model = make()
    tsugiki.attach(model, LoraConfig(r=1))
    with pytest.raises(AdapterError, match=r"(?s)(causal model|logits).*loop of your own"):
        tsugiki.train(model, [([1, 2], [-100, 2])], steps=1, learning_rate=1e-3)
