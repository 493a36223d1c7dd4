"""What a user looks at before training: examples with the trained tokens marked, and counts.

Knows rich and a tokenizer, nothing of training.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tsugiki.data.dataset import Prepared
from tsugiki.data.example import IGNORED, Example

MOST_SHOWN = 400  # tokens; the middle of a longer example is left out


def show(example: Example, tokenizer: PreTrainedTokenizerBase, *, plain: bool = False) -> Text:
    """An example as the model sees it; trained tokens green, or in ⟦ ⟧ without colours."""
    text = Text(f"{example.source}: {len(example.ids)} tokens, {example.labelled} trained\n", "dim")
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(example.ids, example.labels, strict=True):
        trained = label != IGNORED
        if pieces and pieces[-1][0] == trained:
            pieces[-1][1].append(token)
        else:
            pieces.append((trained, [token]))
    for trained, ids in pieces:
        shown = _decode(ids, tokenizer)
        if plain:
            text.append(f"⟦{shown}⟧" if trained else shown)
        else:
            text.append(shown, style="bold green" if trained else "")
    return text


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    if len(ids) <= MOST_SHOWN:
        return str(tokenizer.decode(ids, skip_special_tokens=False))
    head, tail = ids[: MOST_SHOWN // 2], ids[-MOST_SHOWN // 2 :]
    left = len(ids) - len(head) - len(tail)
    return (
        f"{tokenizer.decode(head, skip_special_tokens=False)} … {left} tokens … "
        f"{tokenizer.decode(tail, skip_special_tokens=False)}"
    )


def counts_table(prepared: Prepared) -> Table:
    """Rows kept and skipped, tokens, what was done to long rows."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    counts = prepared.counts
    table.add_row("layout", f"{prepared.layout}, rendered as {prepared.chat}")
    table.add_row("rows", _rows(counts, ""))
    if "eval_rows" in counts:
        table.add_row("held-out rows", _rows(counts, "eval_"))
    table.add_row("examples", f"{counts['train']:,} to train, {counts['held_out']:,} held out")
    share = 100 * counts["labelled"] / max(1, counts["tokens"])
    table.add_row(
        "tokens", f"{counts['tokens']:,}, of which {counts['labelled']:,} ({share:.0f} %) trained"
    )
    table.add_row("longest", f"{prepared.longest:,} tokens")
    for name, count in counts.items():
        if ":" in name and count:
            table.add_row(name.split(": ")[0], f"{count:,} × {name.split(': ')[1]}")
    for note in prepared.notes:
        table.add_row("note", Text(note))
    return table


def _rows(counts: dict[str, int], prefix: str) -> str:
    rows, kept, skipped, left = (
        counts[prefix + name] for name in ("rows", "kept", "skipped", "left_out")
    )
    said = f"{rows:,} read, {kept:,} kept, {skipped:,} skipped"
    return f"{said}; of the kept {left:,} answers left out" if left else said
