"""A GGUF file against what it should be: a model folder, an adapter on its base, another file.

Every step runs, whatever the ones before it found. llama.cpp runs in its own process, from the
extra [gguf]; without it settings, numbers, vocabulary and template are compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

from tsugiki.formats.llama_cpp.library import NEED, find_library
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.proof.artefact import Artefact
from tsugiki.proof.checks import OF_TYPE, Bounds, Check, Report, run_steps
from tsugiki.proof.gguf.artefact import GgufArtefact, bits
from tsugiki.proof.gguf.form import Form, form_of
from tsugiki.proof.gguf.logits import Reading, compare_logits, limited, read_reference
from tsugiki.proof.gguf.settings import compare_settings, compare_type
from tsugiki.proof.gguf.tensors import compare_tensors
from tsugiki.proof.gguf.texts import compare_templates, compare_tokens

WITHOUT = "not proven without llama.cpp: how it reads text, what it computes, K-quants to the byte"
Side = Artefact | GgufArtefact


def verify_gguf(
    reference: Side,
    candidate: Side,
    llama: LlamaCpp | None,
    *,
    dtype: str | None = None,
    bounds: Bounds = OF_TYPE,
    logits: bool = True,
    memory: int | None = None,
    text: str | None = None,
    reading: Callable[[], Reading] | None = None,
) -> Report:
    """Compare; the finer of the two is the reference, a folder before any file.

    Args:
        llama: its process; without it what needs none is compared, and the rest named.
        dtype: the type that was asked of the file: q4_k_m, f16 …
        bounds, logits, memory, text: as in `proof.verify.verify`.
        reading: what the reference computed, where it is held to several files.
    """
    reference, file, swapped = _in_order(reference, candidate)
    notes = [*reference.notes, *file.notes]
    if isinstance(reference, Artefact):
        notes += limited(reference)
    if swapped:
        notes.append(f"{reference.name} is the reference: its numbers are the exact ones")
    if llama is None:
        notes.append(f"{WITHOUT}. To prove it: {NEED}")

    @cache
    def both() -> tuple[Form, Form]:
        return form_of(reference), form_of(file)

    def run(process: LlamaCpp) -> list[Check]:
        read = (
            reading() if reading else read_reference(reference, process, memory=memory, text=text)
        )
        return compare_logits(read, file, process, bounds)

    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("1 settings", lambda: compare_settings(*both(), file, reference)),
        ("2 tensors", lambda: [compare_type(file, dtype)]),
        ("2 tensors", lambda: compare_tensors(*both(), llama)),
        ("3 token ids", lambda: compare_tokens(reference, file, llama)),
        ("4 template", lambda: compare_templates(reference, file, llama)),
    ]
    if logits and llama is not None:
        steps.append(("5 logits", partial(run, llama)))
    return Report(reference.name, file.name, tuple(run_steps(steps)), tuple(notes))


@contextmanager
def llama_if_there(threads: int) -> Iterator[LlamaCpp | None]:
    """Its process, or None where the extra is not installed."""
    if find_library() is None:
        yield None
    else:
        with LlamaCpp(threads) as process:
            yield process


def _in_order(reference: Side, candidate: Side) -> tuple[Side, GgufArtefact, bool]:
    if not isinstance(candidate, GgufArtefact):
        assert isinstance(reference, GgufArtefact)
        return candidate, reference, True
    if isinstance(reference, GgufArtefact) and bits(reference.coarsest) < bits(candidate.coarsest):
        return candidate, reference, True
    return reference, candidate, False
