"""Rows → examples to train on and examples held out, with exact counts of everything left out.

Equal prompts stay on one side of the split; every example is proven to hold a label and, but for
inner pieces of raw text, its stop token. Knows no model.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field

from tsugiki.data.chat import ChatFormat, Example
from tsugiki.data.files import Skipped
from tsugiki.data.formats import RowProblem, Rows
from tsugiki.data.lengths import fit
from tsugiki.errors import DataError

FEWEST_TO_SPLIT = 20
MOST_HELD_OUT = 200
DEFAULT_RATIO = 0.1


@dataclass(frozen=True)
class Prepared:
    """What training reads.

    counts: rows, kept, skipped, duplicates, examples, tokens, labelled tokens, what was done to
    long rows and by which repairs. fingerprint: SHA-256 over the ids and labels in order.
    """

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    skipped: tuple[Skipped, ...]
    counts: dict[str, int]
    layout: str
    chat: str
    fingerprint: str
    longest: int
    notes: tuple[str, ...] = field(default=())


def prepare(
    rows: Rows,
    chat: ChatFormat,
    *,
    max_length: int,
    long: str | None = None,
    train_on: str = "assistant",
    eval_rows: Rows | None = None,
    eval_ratio: float | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Prepared:
    """Render, prove, fit and split.

    Args:
        max_length: longest example in tokens.
        long: what to do with longer rows; see `lengths.fit`.
        eval_rows: held-out rows from a file of their own; no automatic split then.
        eval_ratio: share held out; None: a tenth, at most 200, nothing below 20 rows.

    Raises:
        DataError: nothing would be trained; with `strict`, the first row that would be skipped.
    """
    done: Counter[str] = Counter()
    notes: list[str] = []
    skipped = list(rows.skipped)
    chat.repairs.clear()
    kept = _examples(rows, chat, max_length, long, train_on, skipped, done, strict)
    repairs = dict(chat.repairs)
    if eval_rows is not None:
        ignored: Counter[str] = Counter()
        extra_skips = list(eval_rows.skipped)
        held = _examples(eval_rows, chat, max_length, long, train_on, extra_skips, ignored, strict)
        skipped += extra_skips
        train = kept
        shared = {e.key for e in held} & {e.key for e in train}
        if shared:
            notes.append(f"{len(shared)} prompts of --eval-data are in the training rows too")
    else:
        train, held = _split(kept, eval_ratio, seed, notes)
    if not any(e.labelled for e in train):
        reasons = Counter(s.reason for s in skipped).most_common(3)
        raise DataError(
            "nothing would be trained: no row is left",
            got="; ".join(f"{count} × {reason}" for reason, count in reasons) or "no rows",
            fix="tsugiki data check FILE lists every row that was left out",
        )
    duplicates = len(kept) - len({(e.ids, e.labels) for e in kept})
    if duplicates:
        notes.append(f"{duplicates} examples occur more than once; all are kept")
    counts = {
        "rows": rows.seen,
        "kept": len({e.source for e in kept}),
        "skipped": len(rows.skipped) + sum(1 for s in skipped[len(rows.skipped) :]),
        "duplicates": duplicates,
        "train": len(train),
        "held_out": len(held),
        "tokens": sum(len(e.ids) for e in train),
        "labelled": sum(e.labelled for e in train),
        **{f"long: {name}": n for name, n in done.items()},
        **{f"repair: {name}": n for name, n in repairs.items()},
    }
    return Prepared(
        tuple(train),
        tuple(held),
        tuple(skipped),
        counts,
        rows.layout,
        chat.name,
        fingerprint(train, held),
        max(len(e.ids) for e in (*train, *held)),
        tuple(notes),
    )


def fingerprint(train: list[Example], held: list[Example]) -> str:
    """SHA-256 over ids and labels of both sides, in order."""
    digest = hashlib.sha256()
    for side in (train, held):
        digest.update(b"side")
        for example in side:
            digest.update(repr((example.ids, example.labels)).encode())
    return digest.hexdigest()


def _examples(
    rows: Rows,
    chat: ChatFormat,
    max_length: int,
    long: str | None,
    train_on: str,
    skipped: list[Skipped],
    done: Counter[str],
    strict: bool,
) -> list[Example]:
    kept: list[Example] = []

    def skip(item: Skipped) -> None:
        if strict:
            raise DataError(
                f"{item.source}: {item.reason}", fix="mend the row, or leave --strict out"
            )
        skipped.append(item)

    for row in rows.rows:
        try:
            examples = chat.examples(row, train_on)
        except RowProblem as problem:
            skip(Skipped(row.source, str(problem)))
            continue
        for example in examples:
            fitted = fit(example, max_length, long, chat, train_on)
            if isinstance(fitted, Skipped):
                skip(fitted)
                continue
            pieces, name = fitted
            if name is not None:
                done[name] += 1
            for piece in pieces:
                assert piece.labelled, f"{piece.source}: an example without a label"
                assert piece.raw or chat.stop_id in piece.labels, f"{piece.source}: no stop token"
                kept.append(piece)
            if name == "window" and len(examples) > 1:
                break  # the window of the whole row holds every turn's example already
    return kept


def _split(
    kept: list[Example], ratio: float | None, seed: int, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    keys = list(dict.fromkeys(e.key for e in kept))
    if ratio == 0:
        return kept, []
    if len(keys) < FEWEST_TO_SPLIT:
        if len(keys) == 1 and kept and kept[0].raw and len(kept) >= FEWEST_TO_SPLIT:
            return _split_tail(kept, ratio or DEFAULT_RATIO, notes)
        notes.append(
            f"fewer than {FEWEST_TO_SPLIT} different prompts: nothing is held out, "
            "so the last state is kept instead of the best"
        )
        return kept, []
    count = round(len(keys) * (DEFAULT_RATIO if ratio is None else ratio))
    count = max(1, count if ratio is not None else min(MOST_HELD_OUT, count))
    out = set(random.Random(f"split {seed}").sample(keys, count))
    return [e for e in kept if e.key not in out], [e for e in kept if e.key in out]


def _split_tail(
    kept: list[Example], ratio: float, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    count = max(1, min(MOST_HELD_OUT, round(len(kept) * ratio)))
    notes.append(f"one text: its last {count} pieces are held out")
    return kept[:-count], kept[-count:]
