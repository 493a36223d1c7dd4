"""A GGUF file against what it should be: a model folder, an adapter on its base, another file.

Every step runs, whatever the ones before it found. llama.cpp runs in its own process; all of it is
in the extra [gguf].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import Check, Report, run_steps
from tsugiki.proof.gguf.artefact import GgufArtefact, bits
from tsugiki.proof.gguf.form import Form, form_of
from tsugiki.proof.gguf.logits import compare_logits, limited
from tsugiki.proof.gguf.settings import compare_settings, compare_type
from tsugiki.proof.gguf.tensors import compare_tensors
from tsugiki.proof.gguf.texts import compare_templates, compare_tokens

Side = Artefact | GgufArtefact


def verify_gguf(
    reference: Side,
    candidate: Side,
    *,
    dtype: str | None = None,
    max_error: float | None = None,
    max_kl: float | None = None,
    logits: bool = True,
    memory: int | None = None,
    text: str | None = None,
    threads: int = 1,
    llama: LlamaCpp | None = None,
) -> Report:
    """Compare; the finer of the two is the reference, a folder before any file.

    Args:
        dtype: the type that was asked of the file: q4_k_m, f16 …
        threads: of llama.cpp, where no process of it (`llama`) is given.
        max_error, max_kl, logits, memory, text: as in `proof.verify.verify`.

    Raises:
        UsageError: llama.cpp is not installed.
    """
    reference, file, swapped = _in_order(reference, candidate)
    notes = [*reference.notes, *file.notes]
    if isinstance(reference, Artefact):
        notes += limited(reference)
    if swapped:
        notes.append(f"{reference.name} is the reference: its numbers are the exact ones")

    @cache
    def both() -> tuple[Form, Form]:
        return form_of(reference), form_of(file)

    with nullcontext(llama) if llama is not None else LlamaCpp(threads) as process:
        steps: list[tuple[str, Callable[[], list[Check]]]] = [
            ("1 settings", lambda: compare_settings(*both(), file, reference)),
            ("2 tensors", lambda: [compare_type(file, dtype)]),
            ("2 tensors", lambda: compare_tensors(*both(), process)),
            ("3 token ids", lambda: compare_tokens(reference, file, process)),
            ("4 template", lambda: compare_templates(reference, file, process)),
        ]
        if logits:
            run = partial(
                compare_logits, reference, file, process, max_error=max_error, max_kl=max_kl,
                memory=memory, text=text,
            )  # fmt: skip
            steps.append(("5 logits", run))
        checks = run_steps(steps)
    return Report(reference.name, file.name, tuple(checks), tuple(notes))


def _in_order(reference: Side, candidate: Side) -> tuple[Side, GgufArtefact, bool]:
    if not isinstance(candidate, GgufArtefact):
        assert isinstance(reference, GgufArtefact)
        return candidate, reference, True
    if isinstance(reference, GgufArtefact) and bits(reference.coarsest) < bits(candidate.coarsest):
        return candidate, reference, True
    return reference, candidate, False
