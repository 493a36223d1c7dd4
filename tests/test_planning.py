"""Epochs by rows and labelled tokens: the table in the documents, and the runs that were swept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tsugiki.config import build_config
from tsugiki.defaults import choose_epochs, choose_looks
from tsugiki.demo import rows_path
from tsugiki.fitting import facts_of
from tsugiki.pipelines import prepare_session
from tsugiki.terminal import Terminal

DEFAULTS = Path(__file__).parent.parent / "docs" / "defaults.md"


def test_the_table_of_epochs() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (\d) \|$", DEFAULTS.read_text(), re.MULTILINE)
    assert len(rows) == 3
    limits = [(int(r.replace(",", "")), int(t.replace(",", "")), int(e)) for r, t, e in rows]
    after = [*(epochs for _, _, epochs in limits[1:]), 2]
    for (most, tokens, epochs), fewer in zip(limits, after, strict=True):
        assert choose_epochs(most - 1, 10)[0] == choose_epochs(1, tokens - 1)[0] == epochs
        assert choose_epochs(most, 10)[0] == choose_epochs(1, tokens)[0] == fewer


def test_long_answers_are_not_trained_over_and_over() -> None:
    assert choose_epochs(500, 500 * 100) == (6, "500 rows; the best held-out state is kept")
    assert choose_epochs(500, 500 * 8000) == (
        2,
        "4,000,000 labelled tokens; the best held-out state is kept",
    )


@pytest.mark.parametrize(
    ("rows", "labelled", "epochs"),
    [  # 100, 300, 3,000 rows of the sweep's sets without what is held out, most and least labels
        (90, 359, 8), (90, 17640, 8), (89, 19087, 8),
        (270, 1135, 6), (270, 52075, 6), (266, 56901, 6),
        (902, 179796, 6), (2797, 11443, 4), (2769, 562960, 4),
    ],
)  # fmt: skip
def test_what_was_swept_is_what_is_chosen(rows: int, labelled: int, epochs: int) -> None:
    assert choose_epochs(rows, labelled)[0] == epochs


@pytest.mark.parametrize(
    ("rows", "held_out", "epochs", "looks"),
    [(2700, 300, 1, 4), (2700, 300, 2, 5), (2700, 300, 3, 8), (2700, 300, 4, 10), (100, 0, 1, 10),
     (1000, 10, 1, 10), (100, 5000, 8, 4), (2700, 300, 0.1, 4)],
)  # fmt: skip
def test_looks_take_a_tenth_of_the_time_or_are_four(
    rows: int, held_out: int, epochs: float, looks: int
) -> None:
    found, why = choose_looks(rows, held_out, epochs)
    assert found == looks
    assert why.startswith("about ten times" if looks == 10 else f"{looks} times")
    assert looks == 4 or held_out * looks / 3 <= 0.1 * rows * epochs


def test_so_many_steps_as_were_asked_for() -> None:
    for train, steps in (({"max_steps": 5000}, 5000), ({"max_steps": 7}, 7),
                         ({"max_steps": 5000, "epochs": 1}, 113)):  # fmt: skip
        config = build_config({"data": {"path": rows_path("train")}, "train": train})
        assert prepare_session(config, Terminal(as_json=True), None).plan.steps == steps


def test_the_demo_is_trained_four_times() -> None:
    config = build_config({"data": {"path": rows_path("train")}})
    session = prepare_session(config, Terminal(as_json=True), None)
    facts = facts_of(session.prepared)
    assert session.plan.config.train.epochs == 4
    assert session.plan.reasons["train.epochs"].startswith(f"{facts.rows} rows")
