"""The scheduler driven with random requests: budget kept, everything served, prefixes true."""

from __future__ import annotations

import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.engine.scheduler import Scheduler, Sequence

PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=30)
PROMPTS = st.lists(st.tuples(PROMPT, st.integers(-1, 1)), max_size=12)


@given(PROMPTS, st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_everything_is_computed_once_and_in_order(
    prompts: list[tuple[list[int], int]], slots: int, budget: int, can_cut: bool, seed: int
) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(slots, budget, can_cut)
    held: dict[int, list[tuple[int, int]]] = {i: [] for i in range(slots)}  # what a cache holds
    for number, (ids, adapter) in enumerate(prompts):
        scheduler.add(Sequence(number, list(ids), adapter, len(ids)))
    finished, steps = [], 0
    while not scheduler.idle:
        steps += 1
        assert steps < 2000, "starved"
        work = scheduler.plan()
        assert work, "idle although requests wait"
        assert sum(w.count for w in work) <= scheduler.token_budget
        assert len({w.sequence.slot for w in work}) == len(work)
        if rng.random() < 0.1:
            continue  # a forward that was interrupted: nothing may have changed
        for item in work:
            slot = held[item.sequence.slot]
            assert item.count >= 1
            if not can_cut:
                assert item.start in (0, len(slot))
            slot[item.start :] = [(t, item.sequence.adapter) for t in item.tokens]
            past = item.sequence.ids[: item.start + item.count]
            assert slot == [(t, item.sequence.adapter) for t in past], "read another's past"
        scheduler.commit(work)
        for item in work:
            if not item.completes:
                continue
            sequence = item.sequence
            if len(sequence.ids) >= sequence.prompt + 3 or rng.random() < 0.2:
                scheduler.remove(sequence)
                finished.append(sequence.number)
            else:
                sequence.ids.append(rng.randint(0, 2))
    assert sorted(finished) == list(range(len(prompts)))


def test_decoding_goes_first_and_prompts_still_move() -> None:
    scheduler = Scheduler(slots=3, token_budget=4)
    running = [Sequence(i, [1, 2], -1, 2) for i in range(2)]
    for sequence in running:
        scheduler.add(sequence)
    scheduler.commit(scheduler.plan())
    for sequence in running:
        sequence.ids.append(5)
    scheduler.add(Sequence(2, list(range(50)), -1, 50))
    work = scheduler.plan()
    assert [(w.sequence.number, w.count) for w in work] == [(0, 1), (1, 1), (2, 2)]


def test_a_waiting_request_can_be_cancelled() -> None:
    scheduler = Scheduler(slots=1, token_budget=8)
    first, second = Sequence(0, [1], -1, 1), Sequence(1, [1], -1, 1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.plan()
    scheduler.remove(second)
    scheduler.remove(first)
    assert scheduler.idle


def test_knows_no_torch() -> None:
    code = "import sys, tsugiki.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
