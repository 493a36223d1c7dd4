"""Rows → examples to train on and examples held out, with exact counts of everything left out.

Equal prompts stay on one side of the split; every example is proven to hold a label and, but for
inner pieces of raw text, its stop token. Knows no model.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field, replace

from tsugiki.data.chat import DIFFERS, NO_CALLS, TEMPLATE_REFUSES, ChatFormat
from tsugiki.data.example import Example
from tsugiki.data.files import Skipped, reasons
from tsugiki.data.formats import Rows
from tsugiki.data.lengths import fit
from tsugiki.data.rendering import WAY_OUT
from tsugiki.data.row import THOUGHTS, Message, RowProblem
from tsugiki.data.written import LEFT_OUT
from tsugiki.errors import DataError

NAMED_LETTERS = 8
FEWEST_TO_SPLIT = 20
NAMED_TWINS = 3
MOST_HELD_OUT = 200
DEFAULT_RATIO = 0.1


@dataclass(frozen=True)
class Prepared:
    """What training reads.

    counts: rows = kept + skipped (with eval_ before them: those of a file of its own), left_out of
    kept rows (answers that did not fit), duplicates, examples, tokens, labelled tokens, what was
    done to long rows and by which repairs. fingerprint: SHA-256 over the ids and labels in order.
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
    notes: list[str] = list(rows.notes)
    skipped = list(rows.skipped)
    chat.repairs.clear()
    kept = _examples(rows, chat, max_length, long, train_on, skipped, done, strict)
    repairs = dict(chat.repairs)
    held_skips = list(eval_rows.skipped) if eval_rows is not None else []
    if eval_rows is not None:
        ignored: Counter[str] = Counter()
        notes += [f"--eval-data: {note}" for note in eval_rows.notes if note not in notes]
        held = _examples(eval_rows, chat, max_length, long, train_on, held_skips, ignored, strict)
        train = kept
        if not held:
            raise DataError(
                "no row of --eval-data can be used",
                got=reasons(held_skips) or "no rows",
                fix="mend these rows, or leave --eval-data out: then a tenth is held out",
            )
        shared = {e.key for e in held} & {e.key for e in train}
        if shared:
            notes.append(f"prompts of --eval-data that are in the training rows too: {len(shared)}")
    else:
        train, held = _split(kept, eval_ratio, seed, notes)
    if not any(e.labelled for e in train):
        raise DataError(
            "nothing would be trained: no row is left",
            got=reasons(skipped) or "no rows",
            fix=_way_out(skipped),
        )
    notes += [*_unwritten(rows, chat), *_unknown(train, chat)]
    twins = _twins(kept)
    if twins:
        named = "; ".join(f"{second} repeats {first}" for first, second in twins[:NAMED_TWINS])
        more = f"; … {len(twins) - NAMED_TWINS} more" if len(twins) > NAMED_TWINS else ""
        count = "1 duplicate, kept" if len(twins) == 1 else f"{len(twins)} duplicates, all kept"
        notes.append(f"{count}: {named}{more}")
    counts = {
        **_counted(rows, kept, skipped),
        "duplicates": len(twins),
        "train": len(train),
        "held_out": len(held),
        "tokens": sum(len(e.ids) for e in train),
        "labelled": sum(e.labelled for e in train),
        **(_counted(eval_rows, held, held_skips, "eval_") if eval_rows is not None else {}),
        **{f"long: {name}": n for name, n in done.items()},
        **{f"repair: {name}": n for name, n in repairs.items()},
    }
    return Prepared(
        tuple(train),
        tuple(held),
        (*skipped, *held_skips),
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
                ended = piece.raw or set(chat.stop_ids) & set(piece.labels)
                assert ended, f"{piece.source}: no stop token"
                kept.append(replace(piece, key=example.key))
    return kept


def _way_out(skipped: list[Skipped]) -> str:
    """What helps where every row was left out."""
    if all(TEMPLATE_REFUSES in skip.reason for skip in skipped):
        return f"mend these rows; or {WAY_OUT}"
    if all(DIFFERS in skip.reason or LEFT_OUT in skip.reason for skip in skipped):
        return WAY_OUT
    if all(NO_CALLS in skip.reason for skip in skipped):
        return "take a base whose chat template writes tool calls"
    if all("--max-length" in skip.reason for skip in skipped):
        return "a larger --max-length (up to the base's context), or shorter rows"
    return "mend these rows, or give others"


def _counted(
    rows: Rows, kept: list[Example], skipped: list[Skipped], prefix: str = ""
) -> dict[str, int]:
    """Rows of one file: read, kept with any example, skipped whole; examples left out of kept."""
    sources = {example.source for example in kept}
    whole = {skip.source for skip in skipped} - sources
    left = sum(skip.source in sources for skip in skipped)
    found = {"rows": rows.seen, "kept": len(sources), "skipped": len(whole), "left_out": left}
    return {prefix + name: count for name, count in found.items()}


def _unwritten(rows: Rows, chat: ChatFormat) -> list[str]:
    """Thoughts and tools that the rows hold and the chat template does not write."""
    template = str(chat.template or chat.tokenizer.chat_template)
    unread = () if chat.opens_thoughts() else tuple(k for k in THOUGHTS if k not in template)
    held = Counter(
        key
        for row in rows.rows
        for key in {key for message in row.messages for key, _ in message.extra}
        if key in unread
    )
    told = [
        f"{key} of {count:,} rows is not trained: the chat template does not read it"
        for key, count in held.items()
    ]
    with_tools = [row for row in rows.rows if row.tools and row.messages]
    if with_tools and not chat.written.tools(_asked(with_tools[0].messages), with_tools[0].tools):
        told.append(
            f"tools of {len(with_tools):,} rows are not shown to the model: the chat template does "
            "not read them"
        )
    return told


def _unknown(kept: list[Example], chat: ChatFormat) -> list[str]:
    """What the tokenizer has no tokens for, where it would be trained."""
    unknown = chat.tokenizer.unk_token_id
    if unknown is None or unknown in (*chat.stop_ids, chat.bos):
        return []
    touched = [example for example in kept if unknown in example.labels]
    if not touched:
        return []
    count = sum(example.labels.count(unknown) for example in touched)
    answers = (
        example.row.text
        or "".join(m.content for m in example.row.messages if m.role == "assistant")
        for example in touched
        if example.row is not None
    )
    letters = dict.fromkeys(letter for text in answers for letter in text)
    unknown_letters = (letter for letter in letters if unknown in chat.encode(letter))
    named = ", ".join(repr(c)[1:-1] for c in itertools.islice(unknown_letters, NAMED_LETTERS))
    return [
        f"{chat.tokenizer.unk_token} is trained {count:,} times in {len(touched):,} of "
        f"{len(kept):,} examples: the tokenizer does not know {named or 'their text'}; an answer "
        "cannot say it"
    ]


def _asked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Up to the first answer."""
    return tuple(itertools.takewhile(lambda m: m.role != "assistant", messages))


def _twins(kept: list[Example]) -> list[tuple[str, str]]:
    """(first, later) places of examples that are equal in ids and labels."""
    first: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
    twins = []
    for example in kept:
        place = first.setdefault((example.ids, example.labels), example.source)
        if place != example.source:
            twins.append((place, example.source))
    return twins


def _split(
    kept: list[Example], ratio: float | None, seed: int, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    keys = list(dict.fromkeys(e.key for e in kept))
    if ratio == 0:
        return kept, []
    if len(keys) < FEWEST_TO_SPLIT:
        if len(kept) >= FEWEST_TO_SPLIT and all(e.raw for e in kept):
            return _split_ends(kept, ratio or DEFAULT_RATIO, notes)
        notes.append(
            f"fewer than {FEWEST_TO_SPLIT} different prompts: nothing is held out, "
            "so the last state is kept instead of the best"
        )
        return kept, []
    count = round(len(keys) * (DEFAULT_RATIO if ratio is None else ratio))
    count = max(1, count if ratio is not None else min(MOST_HELD_OUT, count))
    out = set(random.Random(f"split {seed}").sample(keys, min(count, len(keys) - 1)))
    return [e for e in kept if e.key not in out], [e for e in kept if e.key in out]


def _split_ends(
    kept: list[Example], ratio: float, notes: list[str]
) -> tuple[list[Example], list[Example]]:
    """Few but long texts: the end of each is held out."""
    texts: dict[str, list[Example]] = {}
    for example in kept:
        texts.setdefault(example.source, []).append(example)
    train: list[Example] = []
    held: list[Example] = []
    for pieces in texts.values():
        count = round(len(pieces) * min(ratio, MOST_HELD_OUT / len(kept)))
        count = min(max(1, count), len(pieces) - 1)
        train += pieces[: len(pieces) - count]
        held += pieces[len(pieces) - count :]
    notes.append(f"few long texts: the last pieces of each are held out ({len(held)} in all)")
    return train, held
