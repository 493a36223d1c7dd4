"""Examples that are longer than the limit: skipped, windowed, or split; never cut silently.

Knows nothing of training. The answer and its stop token are never touched.
"""

from __future__ import annotations

from dataclasses import replace

from tsugiki.data.chat import ChatFormat
from tsugiki.data.example import IGNORED, Example
from tsugiki.data.files import Skipped
from tsugiki.data.row import Message, Row, RowProblem

WITHOUT_SYSTEM = "window, without the system turn"


def fit(
    example: Example, max_length: int, long: str | None, chat: ChatFormat, train_on: str
) -> tuple[list[Example], str | None] | Skipped:
    """The example within the limit, and the name of what was done (None: it fitted).

    Args:
        long: skip, window or split; None means window for conversations and split for raw text.
    """
    if len(example.ids) <= max_length:
        return [example], None
    how = long or ("split" if example.raw else "window")
    too_long = f"{len(example.ids)} tokens, more than --max-length {max_length}"
    if how == "skip" or (how == "split") != example.raw:
        why = too_long if how == "skip" else f"{too_long}; --long {how} is not for such rows"
        return Skipped(example.source, why)
    if how == "split":
        return split(example, max_length), "split"
    return window(example, max_length, chat, train_on)


def split(example: Example, max_length: int) -> list[Example]:
    """Raw text in pieces of at most `max_length`; only the true end carries the stop token.

    Each piece but the first begins with the last token of the piece before it as context, so that
    every token is predicted once.
    """
    pieces = []
    begin = 0
    total = len(example.ids)
    while begin < total:
        end = min(begin + max_length, total)
        labels = list(example.labels[begin:end])
        if begin > 0:
            labels[0] = IGNORED
        pieces.append(replace(example, ids=example.ids[begin:end], labels=tuple(labels)))
        if end == total:
            break
        begin = end - 1
    return [piece for piece in pieces if piece.labelled]


def window(
    example: Example, max_length: int, chat: ChatFormat, train_on: str
) -> tuple[list[Example], str] | Skipped:
    """Whole oldest turns go first, then the start of the last user text, at last system turns."""
    row = example.row
    assert row is not None
    if example.single and train_on == "assistant":
        train_on = "last"  # the answers before it have examples of their own
    messages = list(row.messages)
    answers = [m for m in messages if m.role == "assistant"]
    if len(answers) == 1 and train_on != "everything" and example.labelled >= max_length:
        return Skipped(
            example.source,
            f"the answer alone has {example.labelled} tokens, more than --max-length {max_length}",
        )
    shorter = _beginnings(messages)
    low, high = 0, len(shorter) - 1  # the fewest dropped turns that fit
    best: list[Example] | None = None
    while low <= high:
        middle = (low + high) // 2
        found = _try(row, shorter[middle], chat, train_on, example.single)
        if found is not None and _fits(found, max_length):
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is not None:
        return best, "window"
    cut = _cut_user(example, shorter[-1] if shorter else messages, max_length, chat, train_on)
    bare = tuple(m for m in messages if m.role != "system")
    if not isinstance(cut, Skipped) or len(bare) == len(messages):
        return cut
    found = _try(row, list(bare), chat, train_on, example.single)
    if found is not None and _fits(found, max_length):
        return found, WITHOUT_SYSTEM
    again = window(replace(example, row=replace(row, messages=bare)), max_length, chat, train_on)
    return again if isinstance(again, Skipped) else (again[0], WITHOUT_SYSTEM)


def _fits(examples: list[Example], max_length: int) -> bool:
    return all(len(e.ids) <= max_length for e in examples)


def _beginnings(messages: list[Message]) -> list[list[Message]]:
    """The conversation without its first user turn and what answered it, without two, and so on.

    The last user turn always stays, and so do system turns.
    """
    starts = [i for i, m in enumerate(messages) if m.role == "user"]
    return [
        [m for m in messages[:start] if m.role == "system"] + messages[start:]
        for start in starts[1:]
    ]


def _cut_user(
    example: Example, messages: list[Message], max_length: int, chat: ChatFormat, train_on: str
) -> tuple[list[Example], str] | Skipped:
    row = example.row
    assert row is not None
    place = max((i for i, m in enumerate(messages) if m.role == "user"), default=None)
    if place is None:
        return Skipped(row.source, f"longer than --max-length {max_length}, with nothing to drop")
    low, high = 1, len(_droppable(messages[place])) - 1  # characters dropped; fewest that fit
    best: list[Example] | None = None
    while low <= high:
        middle = (low + high) // 2
        cut = [*messages]
        cut[place] = _without_start(messages[place], middle)
        found = _try(row, cut, chat, train_on, example.single)
        if found is not None and _fits(found, max_length):
            best, high = found, middle - 1
        else:
            low = middle + 1
    if best is None:
        return Skipped(
            row.source, f"its answer and format alone are longer than --max-length {max_length}"
        )
    return best, "window"


def _droppable(message: Message) -> str:
    """The text whose start may go: an instruction row's input, or the whole user text."""
    return str(dict(message.extra).get("input") or message.content)


def _without_start(message: Message, count: int) -> Message:
    extra = dict(message.extra)
    if not extra.get("input"):
        return Message("user", message.content[count:])
    rest = str(extra["input"])[count:]
    kept = (("instruction", extra["instruction"]), ("input", rest))
    return Message("user", f"{extra['instruction']}\n{rest}", kept)


def _try(
    row: Row, messages: list[Message], chat: ChatFormat, train_on: str, single: bool
) -> list[Example] | None:
    repairs = chat.repairs.copy()
    try:
        found = chat.examples(replace(row, messages=tuple(messages)), train_on)
    except RowProblem:
        return None
    finally:  # a row counts once among the repairs, however often it is tried
        chat.repairs.clear()
        chat.repairs.update(repairs)
    return found[-1:] if single else found
