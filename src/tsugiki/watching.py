"""Turns a run's events into what the user sees while it runs. Knows no training arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from tsugiki.errors import RunError
from tsugiki.files import human_bytes
from tsugiki.terminal import Terminal
from tsugiki.training.events import (
    Advice,
    Evaluated,
    Event,
    Finished,
    Logged,
    Noted,
    Proven,
    Resumed,
    Sampled,
    Saved,
    TrainResult,
)


def tell(events: Iterator[Event], terminal: Terminal, folder: Path) -> TrainResult:
    """Consume a run, showing each event; returns how it ended.

    Raises:
        RunError: the events ended without a result (a bug of ours).
    """
    held_out: float | None = None
    try:
        for event in events:
            match event:
                case Logged():
                    _logged(event, held_out, terminal)
                case Evaluated():
                    held_out = event.loss
                    best = " (best)" if event.best else ""
                    text = f"step {event.step}: held-out loss {event.loss:.4f}{best}"
                    terminal.say("evaluated", Text(text, style="cyan"), **asdict(event))
                case Sampled():
                    shown = Text(f"step {event.step} ", style="dim")
                    shown.append(_one_line(event.prompt), style="italic")
                    shown.append(" → ", style="dim")
                    shown.append(_one_line(event.text), style="bold")
                    terminal.say("sampled", shown, **asdict(event))
                case Saved():
                    if terminal.as_json:
                        terminal.say("saved", "", **asdict(event))
                case Noted():
                    terminal.note(event.text)
                case Advice():
                    terminal.warn(event.text, advice=True)
                case Proven():
                    _proven(event, terminal)
                case Resumed():
                    text = f"going on from step {event.step}"
                    terminal.say("resumed", Text(text, style="green"), **asdict(event))
                    for note in event.notes:
                        terminal.warn(note)
                case Finished():
                    terminal.end_steps()
                    _finished(event.result, terminal, folder)
                    return event.result
    finally:
        terminal.end_steps()
    raise RunError("the run ended without a result", fix=f"tsugiki train --resume {folder}")


def _logged(event: Logged, held_out: float | None, terminal: Terminal) -> None:
    parts = [
        f"loss {event.loss:.4f}",
        f"held-out {held_out:.4f}" if held_out is not None else "",
        f"lr {event.lr:.2e}",
        f"norm {event.grad_norm:.2f}",
        f"{event.tokens_per_second:,.0f} tokens/s",
        f"{event.eta_seconds:.0f} s left" if event.eta_seconds is not None else "",
        human_bytes(event.memory_bytes),
    ]
    text = f"step {event.step}/{event.total}  " + "  ".join(part for part in parts if part)
    data = {key: value for key, value in asdict(event).items() if key not in ("step", "total")}
    terminal.step("logged", text, event.step, event.total, **data)
    if event.grad_norms and not terminal.as_json:
        table = Table("tensor", "gradient norm", box=None, pad_edge=False)
        for name, norm in event.grad_norms.items():
            table.add_row(name, f"{norm:.3e}")
        terminal.console.print(table)


def _proven(event: Proven, terminal: Terminal) -> None:
    verdict = "accepted" if event.taken else f"refused ({len(event.missed)} bounds missed)"
    text = f"step {event.step}: {event.what}: {verdict}; {event.note}"
    terminal.say("proven", Text(text, style="green" if event.taken else "yellow"), **asdict(event))
    if event.taken and not terminal.as_json:
        table = Table("gradient of", "cosine", "norm", box=None, pad_edge=False)
        for name, (cosine, ratio) in sorted(event.tensors.items(), key=lambda item: item[1]):
            table.add_row(name, f"{cosine:.5f}", f"{ratio:.3f}")
        terminal.console.print(table)


def _finished(result: TrainResult, terminal: Terminal, folder: Path) -> None:
    terminal.heading("Done")
    lines = []
    if result.first_held_out is not None and result.best_loss is not None:
        gain = result.first_held_out - result.best_loss
        lines.append(
            f"held-out loss {result.first_held_out:.4f} → {result.best_loss:.4f} "
            f"({gain:+.4f} nat, best at step {result.best_step})".replace("(+", "(−")
            if gain >= 0
            else f"held-out loss {result.first_held_out:.4f} → {result.best_loss:.4f}"
        )
    lines.append(f"{result.tokens:,} tokens in {result.seconds:.0f} s; ended: {result.stopped_by}")
    whole = result.adapter.name == "model"  # full fine-tuning
    lines.append(f"{'model:  ' if whole else 'adapter:'}  {result.adapter}")
    lines.append(f"report:   {folder / 'report.html'}")
    flags = f"--base-only --model {result.adapter}" if whole else f"--adapter {result.adapter}"
    lines.append(f"next:     tsugiki chat {flags}")
    terminal.say("finished", Text("\n".join(lines)), **asdict(result))


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else flat[:159] + "…"
