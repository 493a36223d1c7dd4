"""Exported files held to what they were made of: one row of figures a file, and every fault named.

The order of the work and what a user reads; what is compared is `proof/gguf`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tsugiki.errors import DiskError
from tsugiki.exporting.gguf import plan_export, write_gguf
from tsugiki.files import require_space, scratch_folder
from tsugiki.joining import open_either, tell_report
from tsugiki.models.kept import as_kept
from tsugiki.planning import free_memory
from tsugiki.proof.artefact import Artefact, open_artefact
from tsugiki.proof.checks import VERDICTS, Proof, Report
from tsugiki.proof.gguf.artefact import GgufArtefact, open_gguf_artefact
from tsugiki.proof.gguf.logits import Reading, read_reference
from tsugiki.proof.gguf.verify import llama_if_there, verify_gguf
from tsugiki.proof.verify import verify
from tsugiki.shipping import Shipped
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


def prove(
    source: str,
    done: Sequence[Shipped],
    terminal: Terminal,
    *,
    model: str | None = None,
    accept_base: bool = False,
    text: str | None = None,
) -> Proof:
    """Hold what was written to what it was made of.

    text: what is read for the perplexities; passages of this toolkit when None.

    Raises:
        TsugikiError: what was exported cannot be read a second time.
    """
    reference = open_either(source, model, accept_base)
    if done[0].dtype == "lora":
        assert isinstance(reference, Artefact)
        return prove_lora(reference, done[0].path, terminal)
    references = {
        kept: replace(reference, stored=as_kept(reference.stored, kept))
        if isinstance(reference, Artefact) and kept != "none"
        else reference
        for kept in {one.kept for one in done}
    }
    files = [
        (one.kept, open_gguf_artefact(str(one.path), one.path, None), one.dtype) for one in done
    ]
    return prove_files(references, files, terminal, text)


def prove_files(
    references: Mapping[str, Side],
    files: Sequence[tuple[str, GgufArtefact, str | None]],
    terminal: Terminal,
    text: str | None = None,
) -> Proof:
    """Compare each file with its reference, each of which runs once.

    Args:
        references: by how the base's numbers were taken.
        files: each with its reference, and the type that was asked of it.
        text: what is read for the perplexities; passages of this toolkit when None.
    """
    with llama_if_there(torch.get_num_threads()) as llama:

        @cache
        def reading(kept: str) -> Reading:
            assert llama is not None
            return read_reference(references[kept], llama, memory=free_memory("cpu"), text=text)

        reports = [
            verify_gguf(references[kept], file, llama, dtype=asked, reading=partial(reading, kept))
            for kept, file, asked in files
        ]
    return show_reports(reports, terminal)


def prove_lora(reference: Artefact, lora: Path, terminal: Terminal) -> Proof:
    """Lay an exported adapter over its base, written for this and gone after, and compare."""
    from tsugiki.adapters.joined import join

    plan = plan_export(join(reference.stored.folder, None), "base")
    kind = plan.exact_type()
    with scratch_folder(lora) as folder:
        base = folder / f"{kind}.gguf"
        try:
            require_space(base, plan.need(kind), "the base, for the proof")
            write_gguf(plan, kind, base)
        except DiskError as error:
            reason = f"{lora} is whole and not proven: {error}"
            terminal.say(
                "proven", Text(reason, "yellow"), ok=True, whole=False, wrong=[], reason=str(error)
            )
            return Proof.UNPROVEN
        file = open_gguf_artefact(f"BASE.gguf+{lora.name}", base, lora)
        return prove_files({"none": reference}, [("none", file, None)], terminal)


def prove_portable(
    source: str,
    folder: Path,
    terminal: Terminal,
    *,
    model: str | None = None,
    accept_base: bool = False,
) -> Proof:
    """Hold a rewritten adapter to the one it was made of, both on that one's base."""
    began = time.monotonic()
    reference = open_artefact(source, model, accept_base=accept_base)
    candidate = open_artefact(str(folder), str(reference.resolved.folder))
    report = verify(reference, candidate, memory=free_memory("cpu"))
    return tell_report(report, terminal, time.monotonic() - began)


def show_reports(reports: Sequence[Report], terminal: Terminal) -> Proof:
    """A table, what is wrong in it, and what it proves."""
    terminal.heading("proof")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        terminal.note(note, loud=True)
    table = Table(*COLUMNS, "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for report in reports:
        table.add_row(Path(report.candidate).name, *_row(report), VERDICTS[report.proof])
        if terminal.as_json:
            terminal.say("verify", "", **report.data())
    if not terminal.as_json:
        terminal.say("proof", table)
    for report in reports:
        faults = [
            (f"{check.step}, {check.name}: {line}", "yellow" if check.ok else "red")
            for check in report.checks
            if not (check.ok and check.proven)
            for line in (check.details or (f"{check.figure}, limit {check.limit}",))
        ]
        for line, style in faults[:SHOWN] if not terminal.as_json else ():
            terminal.say("fault", Text(f"  {Path(report.candidate).name}: {line}", style=style))
    wrong = [Path(report.candidate).name for report in reports if not report.ok]
    proof = Proof.of_all(report.proof for report in reports)
    whole = all(report.proof is not Proof.UNPROVEN for report in reports)
    told = {
        Proof.EQUAL: Text("each is what it was made of", "green"),
        Proof.WRONG: Text(f"not what it was made of: {', '.join(wrong)}", "bold red"),
        Proof.UNPROVEN: Text(
            "not proven: each is what it was made of as far as it can be told; see above",
            "yellow",
        ),
    }[proof]
    terminal.say("proven", told, ok=not wrong, whole=whole, wrong=wrong)
    return proof


def _row(report: Report) -> list[str]:
    """The figures of one file, as `COLUMNS` names them."""
    values = {check.name: check.value for check in report.checks if check.value is not None}
    numbers = [values[name] for name in NUMBERS if name in values]
    least = min(numbers, default=0)
    row = [UNPROVEN if not numbers else "to the bit" if least == 1 else f"{least:.0%} equal"]
    for words, shown in FIGURES.items():
        value = next((v for name, v in values.items() if words in name), None)
        row.append(UNPROVEN if value is None else shown(value))
    return row
