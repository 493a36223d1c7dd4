"""The engine against the plain meaning of greedy: the whole text again for each token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tiny import SHAPE, tiny_base
from transformers import MambaConfig, Phi3Config

from tsugiki.engine.engine import Completion, Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.models.isolation import probe_isolation
from tsugiki.models.load import Base, ResolvedModel, load_base

MARGIN = 1e-3  # of the logits' spread: nearer than this, two tokens may change places
FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "qwen3", "mistral"]


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def assert_greedy(base: Base, ids: tuple[int, ...], got: Completion) -> None:
    """Each token is the argmax given those before it, or within MARGIN of it."""
    text = torch.tensor([[*ids, *got.ids]])
    with torch.no_grad():
        logits = base.forward(text, ForwardBatch((text.shape[1],)))[0]
    rows = logits[len(ids) - 1 : -1].float()
    chosen = rows.gather(1, torch.tensor(got.ids)[:, None])[:, 0]
    behind = (rows.max(dim=1).values - chosen).max()
    assert behind <= MARGIN * rows.std(), f"{behind} below the best logit"


def greedy(length: int) -> Sampling:
    return Sampling(max_tokens=length)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_is_greedy(family: str) -> None:
    """Prompts of several lengths, some in chunks, beside decoding; more requests than slots."""
    base = tiny_base(family)
    engine = Engine(base, slots=3, token_budget=16)
    lengths = (1, 40, 7, 23, 16, 2)
    requests = [Request(prompt(i, n), sampling=greedy(20)) for i, n in enumerate(lengths)]
    answers = engine.complete(requests)
    assert [a.finish for a in answers] == ["length"] * len(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.ids) == 20
        assert_greedy(base, request.ids, answer)


@pytest.mark.parametrize("family", ["bloom", "gpt2"])
def test_bases_that_must_run_alone(family: str) -> None:
    base = tiny_base(family, flat=False)
    engine = Engine(base)
    requests = [Request(prompt(i, n), sampling=greedy(8)) for i, n in enumerate((5, 1, 12))]
    for request, answer in zip(requests, engine.complete(requests), strict=True):
        assert_greedy(base, request.ids, answer)


def test_next_turn_computes_only_what_is_new() -> None:
    base = tiny_base("llama")
    engine = Engine(base, slots=2)
    first = Request(prompt(0, 30), sampling=greedy(10))
    (answer,) = engine.complete([first])
    longer = (*first.ids, *answer.ids, *prompt(1, 6))
    (second,) = engine.complete([Request(longer, sampling=greedy(10))])
    assert second.reused == len(first.ids) + len(answer.ids) - 1
    assert_greedy(base, longer, second)
    (other,) = engine.complete([Request(prompt(2, 30), sampling=greedy(3))])
    assert other.reused == 0
    (again,) = engine.complete([Request((*longer, 7), sampling=greedy(3))])
    assert again.reused >= len(longer), "another request took the conversation's slot"
    engine.forget()
    (fresh,) = engine.complete([Request((*longer, 7), sampling=greedy(3))])
    assert fresh.reused == 0
    assert fresh.ids == again.ids


def test_a_conversation_is_not_given_up_for_a_few_tokens_of_another() -> None:
    """All begin with the same token or system turn; that alone is no reason to take a slot."""
    base = tiny_base("llama")
    engine = Engine(base, slots=4)
    long, other = (1, *prompt(0, 60)), (1, *prompt(3, 20))
    engine.complete([Request(long, sampling=greedy(3))])
    (beside,) = engine.complete([Request(other, sampling=greedy(3))])
    assert beside.reused == 0, "an empty slot was there"
    (again,) = engine.complete([Request((*long, 7), sampling=greedy(3))])
    assert again.reused >= len(long)


def test_stories260k(shared_data: Path) -> None:
    """The greedy continuation that its author publishes, alone and beside others."""
    folder = shared_data / "models" / "stories260K"
    expected = (folder / "expected_greedy_200.txt").read_text(encoding="utf-8").strip()
    base = load_base(ResolvedModel(folder, "stories260K"))
    engine = Engine(base, token_budget=32)
    bos = Request((1,), sampling=greedy(200), raw=True)
    others = [Request((1, *prompt(i, 9 * i)), sampling=greedy(50)) for i in (1, 5)]
    alone, beside = engine.complete([bos])[0], engine.complete([others[0], bos, others[1]])[1]
    assert alone.text.strip() == expected
    assert beside.text.strip() == expected


def test_rotary_embeddings_that_change_with_the_length() -> None:
    """Phi-3's longrope: the past is computed anew when a sequence crosses the border of 32."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 8.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = Phi3Config(
        **{**SHAPE, "max_position_embeddings": 256},
        original_max_position_embeddings=32,
        rope_parameters={**rope, "original_max_position_embeddings": 32},
    )
    assert not probe_isolation(config).holds
    base = tiny_base(config, flat=False)
    ids = prompt(0, 26)
    (answer,) = Engine(base).complete([Request(ids, sampling=greedy(12))])
    for number, token in enumerate(answer.ids):
        # each prefix alone: one token more may be across the border
        before = torch.tensor([[*ids, *answer.ids[:number]]])
        with torch.no_grad():
            row = base.forward(before, ForwardBatch((before.shape[1],)))[0, -1]
        assert row.max() - row[token] <= MARGIN * row.std()


def test_a_model_without_keys_and_values() -> None:
    config = MambaConfig(vocab_size=260, hidden_size=64, num_hidden_layers=2, state_size=8)
    base = tiny_base(config, flat=False)
    (answer,) = Engine(base).complete([Request(prompt(0, 9), sampling=greedy(6))])
    assert_greedy(base, prompt(0, 9), answer)
