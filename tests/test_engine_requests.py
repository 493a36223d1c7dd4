"""What a request may ask: adapters, seeds, stops, cancelling; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_tiny import tiny_base

from tsugiki.adapters.attach import attach, detach, lora_modules
from tsugiki.adapters.pool import AdapterPool
from tsugiki.adapters.storage import load_adapter, save_adapter
from tsugiki.config import LoraConfig
from tsugiki.engine.engine import Engine, Request
from tsugiki.engine.sampling import Sampling
from tsugiki.engine.slots import Slots
from tsugiki.errors import NonFiniteError, UsageError
from tsugiki.kernels.attention import reference_attention
from tsugiki.kernels.batch import ForwardBatch

PROMPT = tuple(range(40, 60))


def test_adapters_mixed_in_one_batch(tmp_path: Path) -> None:
    """Each row gets its own adapter's answer, equal to that adapter attached alone."""
    base = tiny_base("llama")
    expected = [Engine(base).complete([Request(PROMPT, sampling=Sampling(max_tokens=8))])[0].ids]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        attach(base.model, LoraConfig(r=2 + number, alpha=4), generator=generator)
        with torch.no_grad():
            for _, module in lora_modules(base.model):
                module.lora_B.normal_(0, 0.5, generator=generator)
        save_adapter(base.model, tmp_path / str(number))
        detach(base.model)
        load_adapter(base.model, tmp_path / str(number))
        answer = Engine(base).complete([Request(PROMPT, sampling=Sampling(max_tokens=8))])[0]
        expected.append(answer.ids)
        detach(base.model)
    assert len(set(expected)) == 4, "adapters that change nothing prove nothing"
    pool = AdapterPool(base.model)
    for number in range(3):
        pool.load(tmp_path / str(number), str(number))
    engine = Engine(base, pool, slots=3, token_budget=24)
    order = [2, -1, 0, 1, -1, 2, 0]
    requests = [Request(PROMPT, adapter=a, sampling=Sampling(max_tokens=8)) for a in order]
    got = [answer.ids for answer in engine.complete(requests)]
    assert got == [expected[a + 1] for a in order]
    assert pool.cell.batch is None


def test_a_seed_gives_one_answer_whatever_else_runs() -> None:
    base = tiny_base("llama")
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5, max_tokens=12)
    alone = Engine(base).complete([Request(PROMPT, sampling=sampling)])[0].ids
    others = [Request((i,), sampling=Sampling(temperature=1, max_tokens=9)) for i in range(5)]
    beside = Engine(base, slots=4).complete([*others, Request(PROMPT, sampling=sampling)])[-1].ids
    assert alone == beside
    other = Sampling(temperature=0.8, top_p=0.9, seed=6, max_tokens=12)
    assert Engine(base).complete([Request(PROMPT, sampling=other)])[0].ids != alone


def test_stop_tokens_and_strings_are_not_part_of_the_answer() -> None:
    engine = Engine(tiny_base("llama"))
    (whole,) = engine.complete([Request(PROMPT, sampling=Sampling(max_tokens=12))])
    stop = whole.ids[5]
    first = whole.ids.index(stop)
    (cut,) = engine.complete([Request(PROMPT, stop_ids=(stop,))])
    assert (cut.ids, cut.finish) == (whole.ids[:first], "stop")
    mark = whole.text[3:6]  # three characters, so more than one token
    (cut,) = engine.complete([Request(PROMPT, stop=(mark,))])
    assert (cut.text, cut.finish) == (whole.text[: whole.text.index(mark)], "stop")


def test_the_context_ends_an_answer() -> None:
    engine = Engine(tiny_base("llama"))
    ids = tuple(i % 256 for i in range(engine.context - 5))
    (answer,) = engine.complete([Request(ids)])
    assert (len(answer.ids), answer.finish) == (5, "length")
    with pytest.raises(UsageError, match="leaves no room"):
        engine.submit(Request(ids + ids))
    with pytest.raises(UsageError, match="empty"):
        engine.submit(Request(()))


def test_cancelling_one_leaves_the_others() -> None:
    base = tiny_base("llama")
    sampling = Sampling(max_tokens=10)
    expected = Engine(base).complete([Request(PROMPT, sampling=sampling)])[0].ids
    engine = Engine(base, slots=2)
    kept, gone, waiting = (engine.submit(Request(PROMPT, sampling=sampling)) for _ in range(3))
    tokens = [event.token for event in engine.step() if event.request == kept]
    event = engine.cancel(gone)
    assert event is not None
    assert event.finish == "cancelled"
    assert engine.cancel(gone) is None
    assert engine.cancel(waiting) is not None
    while not engine.idle:
        tokens += [event.token for event in engine.step() if event.request == kept]
    assert tuple(tokens) == expected


def test_an_iterator_left_early_frees_the_engine() -> None:
    engine = Engine(tiny_base("llama"), slots=2)
    events = engine.generate([Request(PROMPT)] * 4)
    next(events)
    events.close()
    assert engine.idle


def test_an_interrupted_forward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    engine = Engine(base)
    expected = engine.complete([Request(PROMPT, sampling=Sampling(max_tokens=6))])[0].ids
    engine.forget()
    number = engine.submit(Request(PROMPT, sampling=Sampling(max_tokens=6)))
    tokens = [event.token for event in engine.step()]
    last = base.model.get_output_embeddings()  # type: ignore[operator]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = last.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    hook.remove()
    while not engine.idle:
        tokens += [event.token for event in engine.step() if event.request == number]
    assert tuple(tokens) == expected


def test_nan_ends_everything_and_leaves_nothing_behind() -> None:
    base = tiny_base("llama")
    engine = Engine(base)
    expected = engine.complete([Request(PROMPT, sampling=Sampling(max_tokens=4))])[0].ids
    weight = base.model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    good = weight.clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError):
            engine.complete([Request((1, *PROMPT))])
        weight.copy_(good)
    assert engine.idle
    answer = engine.complete([Request(PROMPT, sampling=Sampling(max_tokens=4))])[0]
    assert answer.ids == expected


def test_training_mode_comes_back() -> None:
    base = tiny_base("llama")
    base.model.train()
    Engine(base).complete([Request(PROMPT, sampling=Sampling(max_tokens=2))])
    assert base.model.training


@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(None, None, False), (7, None, False), (None, 5.0, False), (7, 5.0, True), (None, None, True)],
)
def test_attention_over_slots(window: int | None, softcap: float | None, sinks: bool) -> None:
    """Random chunks over three slots against whole sequences with the scores written out."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim, lengths = 4, 2, 8, (140, 31, 9)

    def draw(count: int, width: int) -> torch.Tensor:
        return torch.randn(1, count, sum(lengths), width, generator=generator)

    q, k, v = draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, 6)
    sink = torch.randn(heads, generator=generator) if sinks else None
    wanted = reference_attention(
        q, k, v, lengths, scale=0.3, window=window, softcap=softcap, sinks=sink
    )
    slots, done, order = Slots(), [0, 0, 0], (2, 0, 3)
    begins = (0, lengths[0], lengths[0] + lengths[1])
    while tuple(done) != lengths:
        alive = [i for i in range(3) if done[i] < lengths[i]]
        sizes = [
            min(
                lengths[i] - done[i],
                1 if torch.rand(1, generator=generator) < 0.6 else 11,
            )
            for i in alive
        ]
        at = [
            torch.arange(begins[i] + done[i], begins[i] + done[i] + n)
            for i, n in zip(alive, sizes, strict=True)
        ]
        index = torch.cat(at)
        batch = ForwardBatch(
            tuple(sizes),
            starts=tuple(done[i] for i in alive),
            kv=slots,
            slots=tuple(order[i] for i in alive),
        )
        parts = [t[:, :, index] for t in (q, k, v)]
        out = slots.attend(1, *parts, batch, scale=0.3, window=window, softcap=softcap, sinks=sink)
        assert torch.allclose(out, wanted[:, index], atol=1e-5)
        for i, n in zip(alive, sizes, strict=True):
            done[i] += n
    assert slots.nbytes > 0
