"""Exported files held to what they were made of: one row of figures a file, and every fault named.

The order of the work and what a user reads; what is compared is `proof/gguf`'s.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tsugiki.errors import DiskError
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.files import require_space
from tsugiki.planning import free_memory
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Report
from tsugiki.proof.gguf.artefact import GgufArtefact, open_gguf_artefact
from tsugiki.proof.gguf.logits import Reading, read_reference
from tsugiki.proof.gguf.verify import llama_if_there, verify_gguf
from tsugiki.terminal import Terminal

Side = Artefact | GgufArtefact
COLUMNS = ("file", "numbers", "token ids", "off", "mean KL", "first", "perplexity")
UNPROVEN = "–"
NUMBERS = ("numbers in F32, F16, BF16", "quantised again")  # value: share bit for bit
FIGURES: dict[str, Callable[[float], str]] = {
    "nasty strings": lambda v: f"{v:.0f} differ" if v else "equal",
    "/ spread": lambda v: f"{v:.1e}",
    "mean KL": lambda v: f"{v:.1e}",
    "same first choice": lambda v: f"{v:.1%}",
    "perplexity": lambda v: f"× {v:.4f}",
}
SHOWN = 8  # faults
STEPS = {"1 settings", "2 tensors", "3 token ids", "4 template", "5 logits"}


def prove_files(
    reference: Side,
    files: Sequence[tuple[GgufArtefact, str | None]],
    terminal: Terminal,
    text: str | None = None,
) -> bool:
    """Compare each file with its reference, which runs once; true when none is beyond its limits.

    Args:
        files: each with the type that was asked of it.
        text: what is read for the perplexities; passages of this toolkit when None.
    """
    with llama_if_there(torch.get_num_threads()) as llama:

        @cache
        def reading() -> Reading:
            assert llama is not None
            return read_reference(reference, llama, memory=free_memory("cpu"), text=text)

        reports = [
            verify_gguf(reference, file, llama, dtype=asked, reading=reading)
            for file, asked in files
        ]
    show_reports(reports, terminal)
    return all(report.ok for report in reports)


def prove_lora(reference: Artefact, lora: Path, terminal: Terminal) -> bool:
    """Lay an exported adapter over its base, written for this and gone after, and compare."""
    from tsugiki.adapters.joined import join

    plan = plan_export(join(reference.stored.folder, None), "base")
    kind = plan.exact_type()
    with tempfile.TemporaryDirectory(dir=lora.parent, prefix=".base.", suffix=".tmp") as folder:
        base = Path(folder) / f"{kind}.gguf"
        try:
            require_space(base, plan.need(kind), "the base, for the proof")
        except DiskError as error:
            terminal.say("note", Text(f"not proven: {error}", style="yellow"), text=str(error))
            return True
        write_gguf(plan, kind, base)
        file = open_gguf_artefact(f"BASE.gguf+{lora.name}", base, lora)
        return prove_files(reference, [(file, None)], terminal)


def show_reports(reports: Sequence[Report], terminal: Terminal) -> None:
    """A table, what is wrong in it, and what could not be proven."""
    terminal.heading("proof")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        terminal.say("note", Text(f"note: {note}", style="yellow"), text=note)
    table = Table(*COLUMNS, "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for report in reports:
        verdict = Text("ok", "green") if report.ok else Text("FAILED", "bold red")
        table.add_row(Path(report.candidate).name, *_row(report), verdict)
        if terminal.as_json:
            terminal.say("verify", "", **report.data())
    if not terminal.as_json:
        terminal.say("proof", table)
    for report in reports:
        faults = [
            f"{check.step}, {check.name}: {line}"
            for check in report.checks
            if not check.ok
            for line in (check.details or (f"{check.figure}, limit {check.limit}",))
        ]
        for line in faults[:SHOWN] if not terminal.as_json else ():
            terminal.say("fault", Text(f"  {Path(report.candidate).name}: {line}", style="red"))
    wrong = [Path(report.candidate).name for report in reports if not report.ok]
    whole = all(report.steps >= STEPS for report in reports)
    told = "each is what it was made of"
    if wrong:
        told = f"not what it was made of: {', '.join(wrong)}"
    if not wrong and not whole:
        told += ", as far as it can be told without llama.cpp"
    terminal.say(
        "proven", Text(told, "bold red" if wrong else "green"), ok=not wrong, whole=whole,
        wrong=wrong,
    )  # fmt: skip


def _row(report: Report) -> list[str]:
    """The figures of one file, as `COLUMNS` names them."""
    values = {check.name: check.value for check in report.checks if check.value is not None}
    numbers = [values[name] for name in NUMBERS if name in values]
    row = ["to the bit" if min(numbers, default=0) == 1 else f"{min(numbers, default=0):.0%} equal"]
    for words, shown in FIGURES.items():
        value = next((v for name, v in values.items() if words in name), None)
        row.append(UNPROVEN if value is None else shown(value))
    return row
