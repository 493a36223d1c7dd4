"""What the rows of a run need: their counts, the longest row that memory allows, rows of the
embedding for their tokens.

Knows shapes and counts; reads no files and touches no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

from tsugiki.adapters.targets import resolve_targets
from tsugiki.config import RunConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.row import RowProblem
from tsugiki.device import Decisions
from tsugiki.files import human_bytes
from tsugiki.models.load import refuse_unknown
from tsugiki.models.spec import ModelSpec
from tsugiki.planning import SHARE, Facts, memory_limit, predict_memory
from tsugiki.training.samples import Prompt, choose_prompts

SHORTEST = 64  # tokens; below it a base that fits better is the way out, not shorter rows


@dataclass(frozen=True)
class Length:
    """Longest example in tokens, and why; cut: rows must be fitted to it again."""

    tokens: int
    reason: str
    cut: bool = False


def fit_to_memory(
    config: RunConfig,
    spec: ModelSpec,
    facts: Facts,
    decisions: Decisions,
    *,
    resumed: bool = False,
) -> Length:
    """The smaller of the longest row, the context and what memory allows one row at a time.

    Where even the shortest useful row does not fit, the length stays, and planning refuses. So it
    does in a resumed run, whose rows are what they were.
    """
    if resumed or config.data.max_length is not None:
        return Length(config.data.max_length or facts.longest, "")
    trainable = count_trainable(config, spec)
    limit = memory_limit(config.train.max_memory, decisions.device)
    lean = "never" if config.train.gradient_checkpointing == "never" else "always"
    train = config.train.model_copy(update={"gradient_checkpointing": lean})
    tried = config.model_copy(update={"train": train})

    def fits(length: int, share: float) -> bool:
        rows = config.train.batch_size or 1
        need = predict_memory(spec, tried, facts.cut(length), decisions, rows, trainable)
        return sum(need.values()) <= share * limit

    share = SHARE if fits(SHORTEST, SHARE) else 1
    if fits(facts.longest, 1) or facts.longest <= SHORTEST or not fits(SHORTEST, share):
        whole = facts.longest >= spec.context
        why = "the base's context" if whole else f"the longest row; the base sees {spec.context:,}"
        return Length(facts.longest, why)
    low, high = SHORTEST, facts.longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, share) else (low, middle)
    return Length(low, f"longer rows need more than the {human_bytes(limit)} to use", cut=True)


def facts_of(prepared: Prepared) -> Facts:
    """The counts that planning needs."""
    examples = prepared.train
    return Facts(
        rows=len(examples),
        labelled_tokens=sum(e.labelled for e in examples),
        tokens=sum(len(e.ids) for e in examples),
        longest=max(len(e.ids) for e in (*examples, *prepared.held_out)),
        held_out=len(prepared.held_out),
    )


def check_ids(
    prepared: Prepared, chat: ChatFormat, spec: ModelSpec, prompts: Sequence[str] = ()
) -> None:
    """Refuse tokens that the base has no numbers for, before the first step meets one.

    Args:
        prompts: of the samples that a run shows.

    Raises:
        ModelError: a token of a row, a sample's prompt or a stop beyond the embedding.
    """
    table = spec.meta_model().get_input_embeddings()  # type: ignore[operator]
    rows = int(table.weight.shape[0])
    asked: list[Prompt] = []
    with suppress(RowProblem):
        asked = choose_prompts(prompts, prepared, chat) if prompts else []
    places: Iterator[tuple[str, tuple[int, ...]]] = chain(
        (("the stop tokens", chat.stop_ids),),
        ((e.source, e.ids) for e in (*prepared.train, *prepared.held_out)),
        ((f"--sample-prompt {prompt.shown!r}", prompt.ids) for prompt in asked),
    )
    for source, ids in places:
        refuse_unknown(ids, rows, chat.tokenizer, source)


def count_trainable(config: RunConfig, spec: ModelSpec) -> int:
    """Parameters that will be trained, from shapes alone."""
    if config.train.method == "full":
        return spec.parameters
    targets = resolve_targets(spec.meta_model(), config.lora.targets)
    return sum(target.count(config.lora.r) for target in targets)
