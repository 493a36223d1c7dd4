"""NaN or inf in a loss, a gradient or an activation: the step that it is in changes nothing."""

from __future__ import annotations

import functools
from math import inf, nan

import pytest
import torch
from families import save_tiny
from poison import WHERE, Poison, changed, everything, poisoned_parameter
from tokenizers_for_tests import CHATML, tiny_tokenizer

from tsugiki.adapters.attach import attach, training_mode
from tsugiki.config import LoraConfig
from tsugiki.data.example import Example
from tsugiki.errors import NonFiniteError
from tsugiki.models.load import Base, load_base, resolve_model
from tsugiki.training.objective import summed_loss
from tsugiki.training.ranks import ranks
from tsugiki.training.step import Stepped, make_optimizer, optimiser_step

PASSES = 3  # of a step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp("finite")
    found = load_base(
        resolve_model(str(save_tiny("llama", folder / "model", tiny_tokenizer(CHATML))))
    )
    attach(found.model, LoraConfig(r=4, dropout=0.1), generator=torch.Generator().manual_seed(0))
    found.make_fast()
    training_mode(found.model, True)
    return found


def passes(step: int) -> list[list[Example]]:
    """Rows of several lengths, two a pass."""
    draw = torch.Generator().manual_seed(step)
    return [
        [
            Example(ids, (-100, -100, *ids[2:]), "row")
            for length in (7 + step, 5 + one)
            for ids in [tuple(torch.randint(3, 250, (length,), generator=draw).tolist())]
        ]
        for one in range(PASSES)
    ]


@pytest.mark.parametrize("bad_step", [1, 2, 5])
@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("where", WHERE)
def test_a_bad_step_changes_nothing(base: Base, where: str, value: float, bad_step: int) -> None:
    """27 injections, each into another pass's turn: weights and optimiser stay to the bit."""
    trained = {n: p for n, p in base.model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = make_optimizer(trained, 0.01, base.device)
    at = (bad_step - 1) * PASSES + 1 + bad_step % PASSES
    loss_of = functools.partial(Poison(summed_loss, where, value, at), base)

    def step(number: int) -> Stepped:
        return optimiser_step(
            number, passes(number), loss_of, trained, optimizer, rate=1e-2, max_grad_norm=1.0,
            ranks=ranks(base.device),
        )  # fmt: skip

    try:
        for number in range(1, bad_step):
            step(number)
        before = everything(trained, optimizer)
        with pytest.raises(NonFiniteError, match=f"step {bad_step} is NaN or inf") as error:
            step(bad_step)
        assert changed(before, everything(trained, optimizer)) == []
        assert error.value.exit_code != 0
        if where == "gradient":
            assert error.value.got == poisoned_parameter(base.model)[0], "that one alone is named"
        assert step(bad_step).loss < 1e3, "nothing of it is left in the gradients"
        assert len(changed(before, everything(trained, optimizer))) >= len(trained), (
            "a good step would have been seen"
        )
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(start[name])
