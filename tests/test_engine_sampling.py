"""The distribution that is drawn from, and refusals of values that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tsugiki.engine.sampling import Sampling, choose, penalise, probabilities
from tsugiki.errors import UsageError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def kept(**values: Any) -> list[int]:
    weights = probabilities(LOGITS, Sampling(temperature=1.0, **values))
    assert float(weights.sum()) == pytest.approx(1.0)
    return weights.nonzero()[:, 0].tolist()


def test_what_is_kept() -> None:
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    p = LOGITS.softmax(0)
    assert kept(top_p=float(p[0]) - 0.01) == [0]
    assert kept(top_p=float(p[0]) + 0.01) == [0, 1]
    assert kept(top_p=1e-9) == [0]
    assert kept(min_p=float(p[2] / p[0]) - 0.01) == [0, 1, 2]
    assert kept(min_p=1.0) == [0]


def test_frequencies_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=3, seed=1)
    generator = sampling.generator()
    draws = torch.tensor([choose(LOGITS, [], sampling, generator) for _ in range(4000)])
    share = torch.bincount(draws, minlength=5) / 4000
    # four standard deviations of a share over 4,000 draws
    assert (share - probabilities(LOGITS, sampling)).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_a_tiny_temperature_is_greedy() -> None:
    sampling = Sampling(temperature=1e-30, seed=0)
    assert choose(LOGITS * 1e4, [], sampling, sampling.generator()) == 0


def test_repetition_penalty_pushes_down_either_sign() -> None:
    out = penalise(LOGITS, [0, 3, 3], 2.0)
    assert out.tolist() == [1.0, 1.0, 0.0, -2.0, -2.0]
    assert LOGITS[0] == 2.0, "the argument was changed"
    sampling = Sampling(repetition_penalty=3.0)
    assert choose(LOGITS, [0], sampling, sampling.generator()) == 1


def test_all_wrong_values_in_one_message() -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(temperature=float("nan"), top_p=0, top_k=0, min_p=2, max_tokens=0)
    for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens"):
        assert name in str(caught.value)
