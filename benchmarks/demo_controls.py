"""`python -m benchmarks.demo_controls`: the demo's score beside what would betray it.

Base asked plainly and with four examples, the nearest training row's answer, the same run on
shuffled answers, and the same run on sprout's shape with fresh weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks import record
from tsugiki.data.chat import ChatFormat
from tsugiki.data.formats import read_rows
from tsugiki.data.row import Row
from tsugiki.demo import rows_path
from tsugiki.demo.show import EXAMPLES, MAX_ANSWER, demo_config, held_out, new_words
from tsugiki.engine.engine import Engine
from tsugiki.evaluation.tasks import nearest_answers, score_answers, shuffled_answers
from tsugiki.models.load import load_base, resolve_model
from tsugiki.pipelines import prepare_session, run_prepared
from tsugiki.terminal import Terminal


def tuned_scores(folder: Path, data: Path, *, random_init: bool = False) -> dict[str, float]:
    """Train as the demo does on `data`, and score; shares from 0 to 1."""
    config = demo_config(folder, 0)
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
    terminal = Terminal()
    session = prepare_session(config, terminal, None)
    base, _ = run_prepared(session, folder, terminal, random_init=random_init)
    engine = Engine(base, slots=32)
    seen = score_answers(engine, session.chat, held_out(), max_tokens=MAX_ANSWER)
    unseen = score_answers(engine, session.chat, new_words(), max_tokens=MAX_ANSWER)
    languages = {
        f"new words {name}": sum(a.exact for a in part) / len(part)
        for name, part in (
            ("English", [a for a in unseen.answers if a.question.isascii()]),
            ("Japanese", [a for a in unseen.answers if not a.question.isascii()]),
        )
    }
    return {"exact": seen.exact, "stopped": seen.stopped, "new words": unseen.exact, **languages}


def write_rows(rows: list[Row], path: Path) -> Path:
    """Rows as JSONL."""
    lines = (
        json.dumps({"messages": [m.as_dict() for m in row.messages]}, ensure_ascii=False)
        for row in rows
    )
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def main() -> bool:
    """Measure, print, record."""
    train = read_rows(rows_path("train")).rows
    base = load_base(resolve_model(None))
    engine, chat = Engine(base, slots=32), ChatFormat.of(base.tokenizer)
    plain = score_answers(engine, chat, held_out(), max_tokens=MAX_ANSWER)
    shots = score_answers(
        engine, chat, held_out(), max_tokens=MAX_ANSWER, examples=train[:EXAMPLES]
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tuned = tuned_scores(folder / "tuned", rows_path("train"))
        mixed = write_rows(shuffled_answers(train, 0), folder / "shuffled.jsonl")
        shuffled = tuned_scores(folder / "shuffled", mixed)
        fresh = tuned_scores(folder / "fresh", rows_path("train"), random_init=True)
    figures = {
        "tuned": tuned["exact"],
        "tuned ended by the stop token": tuned["stopped"],
        "tuned, new words": tuned["new words"],
        "tuned, new words, English": tuned["new words English"],
        "tuned, new words, Japanese": tuned["new words Japanese"],
        "base": plain.exact,
        "base with four examples": shots.exact,
        "nearest training row": nearest_answers(train, held_out()).exact,
        "trained on shuffled answers": shuffled["exact"],
        "fresh random weights": fresh["exact"],
    }
    for name, value in figures.items():
        print(f"{100 * value:6.1f} %  {name}")
    bounds = {
        "tuned": ">= 0.9",
        "tuned ended by the stop token": ">= 0.98",
        "tuned, new words": ">= 0.7",
        "base": "<= 0.1",
        "base with four examples": "<= 0.1",
        "nearest training row": "<= 0.4",
        "trained on shuffled answers": "<= 0.15",
        "fresh random weights": "<= 0.3",
    }
    shown = [{"request": a.question, "base": a.text} for a in shots.answers[:5]]
    command = "python -m benchmarks.demo_controls"
    return record.write("demo_controls", command, figures, bounds, base_answers=shown)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
