"""Training is PEFT's training: same start, same batches, fp32, no dropout, and the same curve."""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
import pytest
import torch
from families import tiny_model
from torch import nn

from tsugiki.adapters.attach import attach, lora_modules
from tsugiki.adapters.lora import LoraLinear
from tsugiki.config import LoraConfig
from tsugiki.data.example import Example
from tsugiki.data.loader import Loader
from tsugiki.models.flat import use_flat_attention
from tsugiki.training.simple import train

STEPS, RATE, MICRO, ACCUMULATION = 50, 1e-3, 2, 3


def ragged_rows(count: int = 24) -> list[tuple[list[int], list[int]]]:
    """Rows of a learnable kind: the answer repeats the prompt's tokens; label counts differ."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(4, 60) for _ in range(rng.randint(3, 20))]
        answer = [prompt[i % len(prompt)] for i in range(rng.randint(1, 25))]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def peft_losses(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """A plain torch loop over PEFT's model, one padded micro-batch after the other."""
    loader = Loader(
        tuple(Example(tuple(i), tuple(l), "") for i, l in rows),
        micro_batch=MICRO, accumulation=ACCUMULATION, seed=0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    losses = []
    for _ in range(STEPS):
        passes = next(loader).passes
        count = sum(label != -100 for one in passes for e in one for label in e.labels[1:])
        optimizer.zero_grad()
        total = 0.0
        for one in passes:
            longest = max(len(e.ids) for e in one)
            ids = torch.tensor([list(e.ids) + [0] * (longest - len(e.ids)) for e in one])
            labels = torch.tensor([list(e.labels) + [-100] * (longest - len(e.ids)) for e in one])
            mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in one])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
            )
            (loss / count).backward()
            total += float(loss.detach()) / count
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        losses.append(total)
    return losses


def as_peft(plain: nn.Module, mine: dict[str, LoraLinear], family: str) -> Any:
    """PEFT's model on the same base, with the same A and B."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(mine), task_type="CAUSAL_LM",
                             fan_in_fan_out=family == "gpt2")  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for path, module in mine.items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(module.lora_A)
            layer.lora_B["default"].weight.copy_(module.lora_B)
    return theirs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_curve_and_the_adapter_are_pefts(family: str) -> None:
    plain = tiny_model(family)
    ours = copy.deepcopy(plain)
    attach(ours, LoraConfig(r=8, alpha=16), generator=torch.Generator().manual_seed(0))
    use_flat_attention(ours)
    mine = dict(lora_modules(ours))
    theirs, again = (as_peft(plain, mine, family) for _ in range(2))
    theirs.base_model.model.set_attn_implementation("sdpa")
    again.base_model.model.set_attn_implementation("eager")
    rows = ragged_rows()
    expected = peft_losses(theirs, rows)
    twice = peft_losses(again, rows)
    assert twice != expected, "another order of sums"
    assert max(abs(a - b) for a, b in zip(twice, expected, strict=True)) <= 1e-5, (
        "PEFT agrees with itself: at this rate rounding does not grow (at 1e-2 it does, to 6e-4)"
    )
    got = train(
        ours, rows, steps=STEPS, learning_rate=RATE, batch_size=MICRO,
        gradient_accumulation_steps=ACCUMULATION, seed=0,
    )  # fmt: skip
    assert sum(got[:6]) / 6 - sum(got[-6:]) / 6 >= 0.3, "the loss falls"
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1e-4
    for path, module in mine.items():
        layer = theirs.base_model.model.get_submodule(path)
        for name, value in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            other = getattr(layer, name)["default"].weight
            assert float((value - other).detach().norm()) <= 1e-3 * float(other.detach().norm()), (
                path,
                name,
            )
