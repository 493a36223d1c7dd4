"""Which base an adapter is merged into that was trained on one in few bits: the better, measured.

The numbers of the codes are what training saw, the 16-bit weights are what the world has; neither
is better always. Both merged models are run on rows that training never saw, with their weights in
the very type that will be written: a merged folder's, or each GGUF type asked for, which may take
another base than the next. Knows nothing of how files are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.adapters.algebra import Changes
from tsugiki.adapters.joined import Joined
from tsugiki.config import RunConfig, build_config
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import prepare
from tsugiki.data.example import Example
from tsugiki.errors import TsugikiError
from tsugiki.exporting.gguf import ExportPlan
from tsugiki.exporting.rounded import rounded_tensors
from tsugiki.formats.llama_cpp.process import LlamaCpp
from tsugiki.merging import NAMES, MergePlan, merged_tensor
from tsugiki.models.families import HEAD
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.kept import as_kept
from tsugiki.models.load import Base, load_base, load_tokenizer, tokenizer_of
from tsugiki.models.spec import ModelSpec, NameMap
from tsugiki.pipelines import prepare_rows
from tsugiki.planning import free_memory
from tsugiki.proof.streamed import Numbers, stream, streamed_base
from tsugiki.sources import read_both, read_held_out
from tsugiki.training.objective import held_out_loss

LOADING = 1.3  # memory while a model is loaded and run, relative to its weights
STORED = "none"  # how a base is kept whose stored weights are taken

Tensors = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Form:
    """A type that a merge may be written in.

    compute: the type that the model runs in. tensors: how the base is kept → stored name → what
    gives that tensor of the merge as it would be written.
    """

    name: str
    compute: torch.dtype
    tensors: Callable[[str], Tensors]


@dataclass(frozen=True)
class Judged:
    """The base to take for a form, and why.

    kept: 'none' for the stored weights, else nf4 or int8. losses: mean nats per labelled token of
    each candidate, by how its base is kept; empty where nothing could be measured, `reason` says
    why. held: bytes of the largest module's weights, where they came module by module; else 0.
    """

    form: str
    kept: str
    losses: dict[str, float]
    rows: int
    reason: str = ""
    held: int = 0


def merged_form(plan: MergePlan, method: str) -> Form:
    """A merged folder."""
    plans = {STORED: plan, method: replace(plan, joined=onto(plan.joined, method))}
    head = {HEAD} if plan.untie else set()

    def tensors(kept: str) -> Tensors:
        names = head | set(plan.base.tensors)
        return {name: partial(merged_tensor, plans[kept], name) for name in names}

    name = written_type(plan)
    return Form(name, getattr(torch, name), tensors)


def gguf_form(plans: Mapping[str, ExportPlan], dtype: str, llama: LlamaCpp | None) -> Form:
    """A GGUF file, by how the base is kept; run in fp32, as llama.cpp adds up, or in bf16."""
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    return Form(dtype, compute, lambda kept: rounded_tensors(plans[kept], dtype, llama))


def onto(joined: Joined, method: str) -> Joined:
    """The same adapter on the numbers that nf4 or int8 codes of the base stand for."""
    return replace(joined, base=as_kept(joined.base, method))


def better_bases(
    joined: Joined,
    method: str,
    forms: Sequence[Form],
    resolved: ResolvedModel,
    rows: Path | None,
    memory: int | None = None,
) -> list[Judged]:
    """Measure both candidates in each form and take the better; the codes' where none can be.

    Args:
        joined: the adapter on the stored weights.
        method: how the base was kept while the adapter was trained: nf4 or int8.
        rows: a file to judge on; the rows that training held out when None.
        memory: bytes that a model may take, else it runs module by module; what is free when None.

    Raises:
        DataError: `rows` cannot be read, or holds none.
        ModelError: a weight that a form's type cannot hold.
    """
    assert joined.changes is not None

    def unmeasured(reason: str) -> list[Judged]:
        return [Judged(form.name, method, {}, 0, reason) for form in forms]

    try:
        examples = held_out_rows(joined.changes, resolved, rows)
    except TsugikiError as error:
        if rows is not None:
            raise
        return unmeasured(f"the rows of the run cannot be read: {error.problem}")
    if isinstance(examples, str):
        return unmeasured(examples)
    memory = free_memory("cpu") if memory is None else memory
    measured = merged_losses(joined, (STORED, method), forms, resolved, examples, memory)
    judged = []
    for form, (losses, held) in zip(forms, measured, strict=True):
        kept = min((method, STORED), key=losses.__getitem__)
        judged.append(Judged(form.name, kept, losses, len(examples), held=held))
    return judged


def written_type(plan: MergePlan) -> str:
    """The type of the merged model's float tensors, most of them where they differ."""
    if plan.dtype is not None:
        return NAMES[plan.dtype]
    sizes: dict[str, int] = {}
    for stored in plan.base.tensors.values():
        if stored.code in NAMES:
            sizes[stored.code] = sizes.get(stored.code, 0) + stored.nbytes
    return NAMES[max(sizes, key=lambda code: sizes[code])] if sizes else "float32"


def held_out_rows(
    changes: Changes, resolved: ResolvedModel, rows: Path | None
) -> Sequence[Example] | str:
    """The rows to judge on, or why there are none.

    Raises:
        TsugikiError: a file that cannot be read.
    """
    record: dict[str, Any] = changes.record or {}
    config = build_config(record.get("config") or {})
    tokenizer = tokenizer_of(changes.folder, load_tokenizer(resolved))
    chat = ChatFormat.from_state(changes.chat, tokenizer)
    spec = ModelSpec.from_folder(resolved.folder)
    if rows is not None:
        return _all_of(rows, config, chat, spec.context)
    if config.data.path is None:
        return "the adapter does not say which rows it was trained on"
    prepared = prepare_rows(config, *read_both(config), chat, spec.context)
    if prepared.fingerprint != record.get("data_fingerprint"):
        return f"{config.data.path} is no longer what training read"
    return prepared.held_out or "training held no rows out"


def _all_of(path: Path, config: RunConfig, chat: ChatFormat, context: int) -> Sequence[Example]:
    """Every row of a file, as training would render it."""
    return prepare(
        read_held_out(path, config),
        chat,
        max_length=config.data.max_length or context,
        long=config.data.long,
        train_on=config.data.train_on,
        eval_ratio=0,
    ).train


def merged_losses(
    joined: Joined,
    candidates: Sequence[str],
    forms: Sequence[Form],
    resolved: ResolvedModel,
    examples: Sequence[Example],
    memory: int,
) -> list[tuple[dict[str, float], int]]:
    """Held-out loss of each candidate in each form, by how its base is kept, and `Judged.held`.

    One model is in memory, or one module of it. Every tensor of a form is put into the model anew,
    so that none is left of the one before.
    """
    found: dict[str, tuple[dict[str, float], int]] = {}
    numbers = sum(t.nbytes // t.dtype.itemsize for t in joined.base.tensors.values())
    for compute in dict.fromkeys(form.compute for form in forms):
        whole = LOADING * numbers * compute.itemsize <= memory
        base = load_base(resolved, dtype=compute) if whole else streamed_base(resolved, compute)
        places = _places(base, joined) if whole else {}
        for form in (form for form in forms if form.compute == compute):
            losses, held = {}, 0
            for kept in candidates:
                tensors = form.tensors(kept)
                with torch.no_grad():
                    for name in tensors.keys() & places.keys():
                        places[name].copy_(tensors[name]())
                with contextlib.ExitStack() as hooks:
                    if not whole:
                        set_up, held = stream(base, _numbers(base, joined, tensors, compute))
                        for hook in set_up:
                            hooks.callback(hook.remove)
                    losses[kept] = held_out_loss(base, examples)
            found[form.name] = losses, held
        del base, places
    return [found[form.name] for form in forms]


def _numbers(base: Base, joined: Joined, tensors: Tensors, compute: torch.dtype) -> Numbers:
    """Parameter path → its numbers in a form, or as they are stored where the form has none."""
    names = NameMap(base.spec.meta_model(), joined.base.tensors)

    def numbers(path: str) -> Tensor:
        name = HEAD if path == HEAD and joined.untie else names.to_disk(path)
        return (tensors[name]() if name in tensors else joined.base.tensor(name)).to(compute)

    return numbers


def _places(base: Base, joined: Joined) -> dict[str, nn.Parameter]:
    """Stored name → parameter of the loaded model; a head that is written apart gets its own."""
    model = base.model
    if joined.untie:
        head = model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    names = NameMap(base.spec.meta_model(), joined.base.tensors)
    found = {}
    for path, parameter in model.named_parameters():
        own = path == HEAD and joined.untie
        found[HEAD if own else names.to_disk(path)] = parameter
    return found
