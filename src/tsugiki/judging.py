"""Which base an adapter is merged into that was trained on one in few bits: the better, measured.

The numbers of the codes are what training saw, the 16-bit weights are what the world has; neither
is better always. Both merged models are run on rows that training never saw, in the type that will
be written. Knows nothing of how a merged folder is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsugiki.config import RunConfig, build_config
from tsugiki.data.chat import ChatFormat, Example
from tsugiki.data.dataset import prepare
from tsugiki.data.formats import read_rows
from tsugiki.errors import TsugikiError
from tsugiki.files import human_bytes
from tsugiki.merging import NAMES, MergePlan, merged_tensor
from tsugiki.models.families import HEAD
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.kept import as_kept
from tsugiki.models.load import Base, load_base, load_tokenizer
from tsugiki.models.spec import ModelSpec, NameMap
from tsugiki.pipelines import prepare_rows
from tsugiki.planning import free_memory
from tsugiki.training.objective import held_out_loss

LOADING = 1.3  # memory while a model is loaded and run, relative to its weights


@dataclass(frozen=True)
class Judged:
    """The plan to follow, and why.

    losses: mean nats per labelled token of each candidate, by how the base is kept ('none': its
    stored weights); empty where nothing could be measured, `reason` says why.
    """

    plan: MergePlan
    losses: dict[str, float]
    rows: int
    dtype: str
    reason: str = ""


def better_base(plan: MergePlan, method: str, resolved: ResolvedModel, rows: Path | None) -> Judged:
    """Measure both candidates and take the better; the dequantised base where none can be.

    Args:
        plan: of a merge into the stored weights.
        method: how the base was kept while the adapter was trained: nf4 or int8.
        rows: a file to judge on; the rows that training held out when None.

    Raises:
        DataError: `rows` cannot be read, or holds none.
    """
    seen = onto(plan, method)
    dtype = written_type(plan)
    need = int(LOADING * sum(t.nbytes for t in plan.base.tensors.values()))
    if need > free_memory("cpu"):
        return Judged(seen, {}, 0, dtype, f"running the model takes {human_bytes(need)} of memory")
    try:
        examples = held_out_rows(plan, resolved, rows)
    except TsugikiError as error:
        if rows is not None:
            raise
        return Judged(seen, {}, 0, dtype, f"the rows of the run cannot be read: {error.problem}")
    if isinstance(examples, str):
        return Judged(seen, {}, 0, dtype, examples)
    losses = merged_losses({"none": plan, method: seen}, resolved, examples)
    best = seen if losses[method] <= losses["none"] else plan
    return Judged(best, losses, len(examples), dtype)


def onto(plan: MergePlan, method: str) -> MergePlan:
    """The same merge into the numbers that nf4 or int8 codes of the base stand for."""
    return replace(plan, joined=replace(plan.joined, base=as_kept(plan.base, method)))


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
    plan: MergePlan, resolved: ResolvedModel, rows: Path | None
) -> Sequence[Example] | str:
    """The rows to judge on, or why there are none.

    Raises:
        TsugikiError: a file that cannot be read.
    """
    record: dict[str, Any] = plan.changes.record or {}
    config = build_config(record.get("config") or {})
    tokenizer = load_tokenizer(resolved)
    chat = ChatFormat.from_state(plan.changes.chat, tokenizer)
    spec = ModelSpec.from_folder(resolved.folder)
    if rows is not None:
        return _all_of(rows, config, chat, spec.context)
    if config.data.path is None:
        return "the adapter does not say which rows it was trained on"
    _, prepared = prepare_rows(config, chat, spec.context)
    if prepared.fingerprint != record.get("data_fingerprint"):
        return f"{config.data.path} is no longer what training read"
    return prepared.held_out or "training held no rows out"


def _all_of(path: Path, config: RunConfig, chat: ChatFormat, context: int) -> Sequence[Example]:
    """Every row of a file, as training would render it."""
    found = read_rows(
        path,
        columns=config.data.columns,
        prompt_template=config.data.prompt_template,
        answer_template=config.data.answer_template,
    )
    longest = config.data.max_length or context
    return prepare(
        found, chat, max_length=longest, long="split", train_on=config.data.train_on, eval_ratio=0
    ).train


def merged_losses(
    plans: dict[str, MergePlan], resolved: ResolvedModel, examples: Sequence[Example]
) -> dict[str, float]:
    """Held-out loss of each merged model as it would be written; one model in memory.

    What one plan changes the next one changes too, or its own numbers are put back.
    """
    first = next(iter(plans.values()))
    base = load_base(resolved, dtype=getattr(torch, written_type(first)))
    places = _places(base, first)
    wanted = {
        name
        for plan in plans.values()
        for name in (*plan.changes.by_name, *plan.base.through)
        if name in places
    }
    losses = {}
    for key, plan in plans.items():
        with torch.no_grad():
            for name in sorted(wanted):
                places[name].copy_(merged_tensor(plan, name))
        losses[key] = held_out_loss(base, examples)
    return losses


def _places(base: Base, plan: MergePlan) -> dict[str, nn.Parameter]:
    """Stored name → parameter of the loaded model; a head that is written apart gets its own."""
    model = base.model
    if plan.untie:
        head = model.get_output_embeddings()  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    names = NameMap(base.spec.meta_model(), plan.base.tensors)
    found = {}
    for path, parameter in model.named_parameters():
        own = path == HEAD and plan.untie
        found[HEAD if own else names.to_disk(path)] = parameter
    return found
