"""`tsugiki demo`: the whole life of a small adapter, shown on the embedded base and bundled rows.

Every figure is measured in this very run; nothing is prepared but the rows and the base. Knows the
pipeline and the scoring, and no arithmetic of its own.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tsugiki.config import RunConfig, build_config
from tsugiki.data.chat import ChatFormat
from tsugiki.data.formats import read_rows
from tsugiki.data.row import Row
from tsugiki.demo import rows_path
from tsugiki.engine.engine import Engine
from tsugiki.errors import RunError
from tsugiki.evaluation.tasks import Score, nearest_answers, score_answers
from tsugiki.joining import merge_adapter, verify_pair
from tsugiki.models.load import load_base, resolve_model
from tsugiki.pipelines import run_training
from tsugiki.proof.checks import Proof
from tsugiki.proving import prove
from tsugiki.shipping import export_gguf
from tsugiki.talk.naming import Who, find_named
from tsugiki.talk.opening import open_voices
from tsugiki.terminal import Terminal

MAX_ANSWER = 32  # tokens; the longest right answer has about 20
EXAMPLES = 4
SHOWN = 3


def demo_config(output: Path, seed: int) -> RunConfig:
    """The demo's run: bundled rows, sprout, chosen defaults, two prompts to watch."""
    asked = [question(row) for row in held_out()[:2]]
    return build_config(
        {
            "output": output,
            "data": {"path": rows_path("train")},
            "train": {"seed": seed, "sample_prompt": asked},
        }
    )


def held_out() -> list[Row]:
    """Rows in combinations and phrasings never trained on."""
    return read_rows(rows_path("heldout")).rows


def new_words() -> list[Row]:
    """Rows whose names and rooms were never trained on."""
    return read_rows(rows_path("heldout_new_words")).rows


def question(row: Row) -> str:
    """The request of a row."""
    return row.messages[-2].content


def run_demo(output: Path, terminal: Terminal, *, seed: int = 0) -> None:
    """Score the base, train, score again, talk, merge, export, and say where everything is.

    Raises:
        RunError: the output folder cannot be used, or what was exported is not the adapter.
    """
    began = time.monotonic()
    output = free_name(output)
    train_rows, rows, unseen = read_rows(rows_path("train")).rows, held_out(), new_words()
    terminal.heading("The task")
    terminal.say(
        "task",
        "A booking desk: a request in English or Japanese becomes one strict line.\n"
        f"  {question(rows[0])}\n  → {rows[0].messages[-1].content}\n"
        f"  {question(rows[1])}\n  → {rows[1].messages[-1].content}",
    )
    terminal.heading("Before: sprout without an adapter")
    base = load_base(resolve_model(None))
    engine, chat = Engine(base, slots=32), ChatFormat.of(base.tokenizer)
    asked = score_answers(engine, chat, rows, max_tokens=MAX_ANSWER)
    shots = [train_rows[i] for i in range(EXAMPLES)]
    shown = score_answers(engine, chat, rows, max_tokens=MAX_ANSWER, examples=shots)
    copied = nearest_answers(train_rows, rows)
    show_answers("sprout answers, asked plainly", asked, terminal)
    show_answers(f"sprout answers, after {EXAMPLES} examples in the prompt", shown, terminal)
    del engine, base

    result = run_training(demo_config(output, seed), terminal)
    assert result is not None

    terminal.heading("After: the same requests")
    opened = open_voices(
        find_named(Who(adapters=(f"tuned={result.adapter}",)), terminal), Terminal()
    )
    tuned = opened.voices["tuned"]
    after = score_answers(
        opened.engine, tuned.chat, rows, adapter=tuned.adapter, max_tokens=MAX_ANSWER
    )
    after_new = score_answers(
        opened.engine, tuned.chat, unseen, adapter=tuned.adapter, max_tokens=MAX_ANSWER
    )
    show_answers("tuned answers", after, terminal)
    scores = {
        "base": asked,
        f"base with {EXAMPLES} examples": shown,
        "answer of the nearest training row": copied,
        "tuned": after,
        "tuned, words never trained on": after_new,
    }
    terminal.say(
        "scores",
        score_table(scores),
        scores={name: {"exact": s.exact, "stopped": s.stopped, "rows": len(s.answers)}
                for name, s in scores.items()},
    )  # fmt: skip
    conversation(scores, terminal)
    del opened
    text = "".join(tuned.chat.render(row.messages, answer_next=False) for row in rows)
    ship(result.adapter, text, terminal)
    terminal.heading("What was written")
    files = sorted(p for p in output.rglob("*") if p.is_file() and ".lock" not in p.name)
    for path in files:
        if "checkpoints" not in path.parts:
            terminal.say("file", f"  {path}  ({path.stat().st_size:,} bytes)", path=str(path))
    terminal.heading("Next")
    terminal.say(
        "next",
        f"  tsugiki chat --adapter {result.adapter} --compare\n"
        f'  tsugiki generate --adapter {result.adapter} "{question(rows[0])}"\n'
        f"  open {output}/report.html\n"
        "  tsugiki train your.jsonl",
    )
    terminal.say(
        "done", f"\n{time.monotonic() - began:.0f} s in all", seconds=time.monotonic() - began
    )


def ship(adapter: Path, text: str, terminal: Terminal) -> None:
    """Merge, write a GGUF file, and prove both, on a text that the adapter reads.

    Without llama.cpp the proof says what it leaves out, and the demo goes on.

    Raises:
        RunError: one of them is not what the adapter is.
    """
    terminal.heading("Out: one model with the adapter in it")
    merged = merge_adapter(adapter, None, terminal)
    proofs = [verify_pair(str(adapter), str(merged.folder), terminal)]
    files = export_gguf(str(adapter), ["q8_0"], None, terminal)
    proofs.append(prove(str(adapter), files, terminal, text=text))
    if Proof.WRONG in proofs:
        raise RunError("a file that was written is not what the adapter is: see the tables above")


def free_name(output: Path) -> Path:
    """`output`, or `output-2`, `output-3` … when it is there already."""
    for number in range(1, 1000):
        path = output if number == 1 else output.with_name(f"{output.name}-{number}")
        if not path.exists():
            return path
    raise RunError(f"too many folders beside {output}", fix="remove old ones, or use --output")


def show_answers(title: str, score: Score, terminal: Terminal) -> None:
    """A few answers as they came."""
    lines = Text(f"{title}\n", style="bold")
    for answer in score.answers[:SHOWN]:
        lines.append(f"  {answer.question}\n", style="dim")
        mark = "✓" if answer.exact else "✗"
        lines.append(f"    {mark} {one_line(answer.text)}\n", style="green" if answer.exact else "")
    terminal.say("answers", lines, title=title, exact=score.exact)


def score_table(scores: dict[str, Score]) -> Table:
    """Exact matches and answers that ended by themselves, in per cent."""
    table = Table("held-out requests", "exact", "English", "Japanese", "ended", "rows", box=None)
    for name, score in scores.items():
        english = [a for a in score.answers if a.question.isascii()]
        japanese = [a for a in score.answers if not a.question.isascii()]
        table.add_row(
            name,
            percent(sum(a.exact for a in score.answers), len(score.answers)),
            percent(sum(a.exact for a in english), len(english)),
            percent(sum(a.exact for a in japanese), len(japanese)),
            percent(sum(a.stopped for a in score.answers), len(score.answers)),
            str(len(score.answers)),
        )
    return table


def conversation(scores: dict[str, Score], terminal: Terminal) -> None:
    """Base and tuned side by side on two requests, one of them Japanese."""
    terminal.heading("Base | tuned")
    before, after = scores["base"].answers, scores["tuned"].answers
    table = Table("request", "base", "tuned", box=None, padding=(0, 2, 0, 0))
    for place in (2, 3, 4, 5):
        table.add_row(
            before[place].question, one_line(before[place].text, 40), one_line(after[place].text)
        )
    terminal.say(
        "conversation",
        table,
        turns=[
            {"request": before[i].question, "base": before[i].text, "tuned": after[i].text}
            for i in (2, 3, 4, 5)
        ],
    )


def percent(part: int, whole: int) -> str:
    """'93.3 %'."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def one_line(text: str, width: int = 80) -> str:
    """Without line breaks, cut."""
    flat = " ⏎ ".join(text.split("\n"))
    return flat if len(flat) <= width else flat[: width - 1] + "…"
