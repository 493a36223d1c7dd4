"""Two artefacts compared step by step: files, settings, tensors, token ids, template, logits.

Every step runs, whatever the ones before it found, so that one run names all faults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tsugiki.models.kept import as_kept
from tsugiki.models.quantized import METHODS
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import OF_TYPE, Bounds, Check, Report, run_steps
from tsugiki.proof.logits import compare_logits
from tsugiki.proof.settings import compare_settings
from tsugiki.proof.tensors import compare_files, compare_tensors
from tsugiki.proof.texts import compare_templates, compare_tokens


def verify(
    reference: Artefact,
    candidate: Artefact,
    *,
    dtype: str | None = None,
    bounds: Bounds = OF_TYPE,
    logits: bool = True,
    memory: int | None = None,
    text: str | None = None,
) -> Report:
    """Compare a candidate with its reference.

    Args:
        dtype: the type that was asked of the candidate (float32, bfloat16, float16); what its own
            record says, or the reference's type, when None.
        bounds: limits of the logits instead of those of the type.
        logits: whether to load and run both models.
        memory: bytes that a loaded model may take; one that needs more runs module by module.
        text: something to read, for the ratio of the perplexities.
    """
    notes = [*reference.notes, *candidate.notes]
    if candidate.changes is not None and reference.changes is None:
        reference, candidate = candidate, reference
        notes.append(f"{reference.name} is the reference: its adapter gives the exact numbers")
    record = candidate.record()
    kept = record.get("base_kept") if record is not None else None
    if reference.changes is not None and kept in METHODS:
        reference = replace(reference, stored=as_kept(reference.stored, kept))
        notes.append(f"merged into the {kept} numbers that training saw, and compared with those")
    if dtype is None and record is not None:
        dtype = record.get("dtype")
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("0 files", lambda: compare_files(candidate)),
        ("1 settings", lambda: compare_settings(reference, candidate)),
        ("2 tensors", lambda: compare_tensors(reference, candidate, dtype)),
        ("3 token ids", lambda: compare_tokens(reference, candidate)),
        ("4 template", lambda: compare_templates(reference, candidate)),
    ]
    if logits:
        run = partial(
            compare_logits,
            reference,
            candidate,
            bounds=bounds,
            memory=memory,
            text=text,
        )
        steps.append(("5 logits", run))
    return Report(reference.name, candidate.name, tuple(run_steps(steps)), tuple(notes))
