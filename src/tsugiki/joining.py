"""`tsugiki merge` and `tsugiki verify`: finds what was named, tells the plan, writes, proves.

The order of the stages and what a user reads between them; the work is in `merging` and `proof/`.
Merging imports no transformers: the proof, a step of its own, does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from tsugiki.adapters.joined import Joined
from tsugiki.adapters.origin import adapter_folder, beside, find_base
from tsugiki.adapters.record import recorded_quantization
from tsugiki.errors import DataError
from tsugiki.files import human_bytes
from tsugiki.formats.mixes import find_kind
from tsugiki.merging import NAMES, Merged, plan_merge, require_place, type_code, write_merged
from tsugiki.models.hub import ResolvedModel
from tsugiki.stopping import will_write
from tsugiki.terminal import Terminal

if TYPE_CHECKING:  # all import transformers, which merging does without
    from tsugiki.judging import Form
    from tsugiki.proof.artefact import Artefact
    from tsugiki.proof.checks import Proof, Report
    from tsugiki.proof.gguf.artefact import GgufArtefact


def merge_adapter(
    adapter: Path,
    output: Path | None,
    terminal: Terminal,
    *,
    model: str | None = None,
    dtype: str | None = None,
    untie: bool = False,
    accept_base: bool = False,
    eval_data: Path | None = None,
) -> Merged:
    """Merge an adapter into its base and tell what was done.

    One that was trained on a base in few bits is merged into whichever is better by held-out loss:
    the numbers of those bits, or the stored weights.

    Args:
        adapter: an adapter folder, or a run folder that holds one.
        output: the new model folder; beside the adapter when None.
        model: the base; the adapter's own when None.
        eval_data: rows to measure that on; the run's own held-out rows when None.

    Raises:
        TsugikiError: anything that keeps the merged folder from being right; nothing is written.
    """
    folder = adapter_folder(adapter)
    output = output or beside(folder, "merged")
    base, notes = find_base(folder, model)
    began = time.monotonic()
    plan = plan_merge(
        folder,
        base.folder,
        name=base.name,
        commit=base.commit,
        dtype=dtype,
        untie=untie,
        accept_base=accept_base,
    )
    for note in [*notes, *plan.notes]:
        terminal.note(note, loud=True)
    read = time.monotonic() - began
    terminal.say(
        "merge_plan",
        f"merging {folder} into {base.name}: {len(plan.changes.by_name)} of "
        f"{len(plan.base.tensors)} tensors change, {human_bytes(plan.need)} will be written to "
        f"{output} (base read and known in {read:.1f} s)",
        base=base.name,
        changed=len(plan.changes.by_name),
        need=plan.need,
        output=str(output),
    )
    require_place(plan, output)  # before anything is measured
    kept, _ = recorded_quantization(plan.changes.record)
    if kept != "none":
        from tsugiki.judging import merged_form, onto

        form = merged_form(plan, kept)
        (taken,) = choose_bases(plan.joined, kept, [form], base, eval_data, terminal)
        if taken == kept:
            plan = replace(plan, joined=onto(plan.joined, kept))
    will_write([output])
    began = time.monotonic()
    merged = write_merged(plan, output)
    seconds = time.monotonic() - began
    terminal.say(
        "merged",
        f"wrote {merged.tensors} tensors, {human_bytes(merged.nbytes)}, in {seconds:.1f} s",
        folder=str(merged.folder),
        changed=merged.changed,
        tensors=merged.tensors,
        bytes=merged.nbytes,
        seconds=seconds,
    )
    return merged


def choose_bases(
    joined: Joined,
    kept: str,
    forms: Sequence[Form],
    base: ResolvedModel,
    rows: Path | None,
    terminal: Terminal,
) -> list[str]:
    """How the better base of each form is kept; what was measured is told."""
    from tsugiki.judging import better_bases

    names = {kept: f"the {kept} numbers that training saw", "none": "the stored weights"}
    found = better_bases(joined, kept, forms, base, rows)
    for one in found:
        if one.losses:
            both = ", ".join(f"{loss:.5f} on {names[key]}" for key, loss in one.losses.items())
            text = (
                f"trained on its base in {kept}; held-out loss merged as {one.form}, "
                f"{one.rows} rows: {both}; taking {names[one.kept]}"
            )
            if one.held:
                text += f" (module by module, at most {human_bytes(one.held)} of weights in memory)"
        else:
            text = (
                f"trained on its base in {kept}; taking {names[one.kept]} for {one.form}, not "
                f"measured against {names['none']}: {one.reason} (--eval-data FILE measures both)"
            )
        terminal.say(
            "merge_base", text, taken=one.kept, losses=one.losses, rows=one.rows, dtype=one.form,
            reason=one.reason, held=one.held,
        )  # fmt: skip
    return [one.kept for one in found]


def verify_pair(
    reference: str,
    candidate: str,
    terminal: Terminal,
    *,
    model: str | None = None,
    dtype: str | None = None,
    accept_base: bool = False,
    max_error: float | None = None,
    max_kl: float | None = None,
    max_ratio: float | None = None,
    text: Path | None = None,
    layer_by_layer: bool = False,
) -> Proof:
    """Compare two artefacts and show the table.

    Args:
        reference, candidate: adapter or run folders, model folders, Hub names, FILE.gguf,
            FILE.gguf+LORA.gguf.
        model: the base of whichever is an adapter; its own when None.
        dtype: the type that was asked of the candidate: f32, bf16, f16; of a file also q4_k_m …
        max_error, max_kl, max_ratio: limits of the logits instead of those of the type
            (`proof.checks.Bounds`).
        text: a text file whose first tokens' perplexities are compared.
        layer_by_layer: stream the weights even where a model would fit in memory.

    Raises:
        TsugikiError: one of the two cannot be read; it is named.
    """
    from tsugiki.planning import free_memory
    from tsugiki.proof.checks import Bounds
    from tsugiki.proof.gguf.artefact import GgufArtefact
    from tsugiki.proof.gguf.verify import llama_if_there, verify_gguf
    from tsugiki.proof.verify import verify

    began = time.monotonic()
    read = None if text is None else read_text(text)
    first = open_either(reference, model, accept_base)
    second = open_either(candidate, model, accept_base)
    how: dict[str, Any] = {
        "bounds": Bounds(max_error, max_kl, max_ratio),
        "memory": 0 if layer_by_layer else free_memory("cpu"),
        "text": read,
    }
    if not isinstance(first, GgufArtefact) and not isinstance(second, GgufArtefact):
        asked = None if dtype is None else NAMES[type_code(dtype)]
        report = verify(first, second, dtype=asked, **how)
    else:
        kind = None if dtype is None else find_kind(dtype).name
        with llama_if_there(torch.get_num_threads()) as llama:
            report = verify_gguf(first, second, llama, dtype=kind, **how)
    return tell_report(report, terminal, time.monotonic() - began)


def tell_report(report: Report, terminal: Terminal, seconds: float) -> Proof:
    """The table of a comparison, and what it proves."""
    from tsugiki.proof.checks import Proof

    for note in report.notes:
        terminal.note(note, loud=True)
    terminal.heading(f"{report.candidate} against {report.reference}")
    terminal.say("verify", report.table(), **report.data())
    failed = [check.name for check in report.checks if not check.ok]
    count, proof = sum(check.proven for check in report.checks), report.proof
    verdict = {
        Proof.EQUAL: Text(f"equal in all {count} comparisons ({seconds:.1f} s)", "green"),
        Proof.WRONG: Text(f"{len(failed)} of {count} comparisons failed", "bold red"),
        Proof.UNPROVEN: Text(f"equal in {count} comparisons, not proven: see above", "yellow"),
    }[proof]
    terminal.say(
        "verdict", verdict, ok=report.ok, whole=proof is not Proof.UNPROVEN, failed=failed,
        seconds=seconds,
    )  # fmt: skip
    return proof


def open_either(given: str, model: str | None, accept_base: bool) -> Artefact | GgufArtefact:
    """A folder, an adapter, a Hub name, FILE.gguf or FILE.gguf+LORA.gguf.

    Raises:
        TsugikiError: not there, not whole, another base; named.
    """
    from tsugiki.proof.artefact import open_artefact
    from tsugiki.proof.gguf.artefact import gguf_paths, open_gguf_artefact

    files = gguf_paths(given)
    if files is not None:
        return open_gguf_artefact(given, *files)
    return open_artefact(given, model, accept_base=accept_base)


def read_text(path: Path) -> str:
    """The first megabyte of a text file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return stream.read(1 << 20).decode("utf-8", errors="ignore")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
