"""What a run takes where nobody says: rates, rows of a step, epochs, looks at held-out rows.

Rules in width, rank, rows and labelled tokens, each with its source; never by a model's name. What
they were measured to reach is in docs/defaults.md. Knows no files and no machine.
"""

from __future__ import annotations

import math

from tsugiki.config import LoraConfig

LABELLED_OF_ROW = 250  # labelled tokens that count as one row when epochs are chosen
# Looks at held-out rows: so many where they are cheap, and so few at least.
MOST_LOOKS, FEWEST_LOOKS = 10, 4
# Of the time of training, what looks may take; a row looked at costs a third of one trained on.
LOOKING, LOOK_COST = 0.1, 1 / 3


def lora_learning_rate(hidden_size: int, lora: LoraConfig) -> float:
    """Peak rate for a LoRA run by width and scale: 5e-5 · 10 · (2000 / H)^0.78 · 32 / (scale · r).

    The first three factors are the rule published with "LoRA Without Regret" (Thinking Machines,
    2025; `get_lr` of its cookbook) for alpha 32 with scale alpha/r, under which the best rate does
    not depend on the rank; the last carries it to other alphas and to rsLoRA.
    """
    rate = 5e-5 * 10 * (2000 / hidden_size) ** 0.78 * 32 / (lora.scale * lora.r)
    return float(f"{rate:.2g}")


def full_learning_rate(hidden_size: int) -> float:
    """Peak rate for full fine-tuning: the LoRA rule without its factor of ten (same source)."""
    return float(f"{5e-5 * (2000 / hidden_size) ** 0.78:.2g}")


def choose_rows_per_step(rows: int) -> int:
    """Rows of one optimiser step: small data needs steps more than smooth gradients."""
    return next(count for limit, count in ((200, 4), (1000, 8), (math.inf, 16)) if rows < limit)


def choose_epochs(rows: int, labelled_tokens: int) -> tuple[float, str]:
    """Passes over the rows and why; the best held-out state is kept, so too many cost only time.

    The smaller of what the rows and what the labelled tokens allow, LABELLED_OF_ROW of them
    counting as a row: passes over small data make up for few steps, and long answers hold more to
    learn in each step. The limits are ours, by the sweep in docs/defaults.md, not published ones;
    longer answers than its 4 to 214 tokens a row were not swept.
    """
    counted = max(rows, labelled_tokens // LABELLED_OF_ROW)
    limits = ((200, 8), (1000, 6), (10000, 4), (math.inf, 2))
    epochs = next(count for limit, count in limits if counted < limit)
    why = f"{rows} rows" if counted == rows else f"{labelled_tokens:,} labelled tokens"
    return epochs, f"{why}; the best held-out state is kept"


def choose_looks(rows: int, held_out: int, epochs: float) -> tuple[int, str]:
    """How often a run computes the held-out loss beside once before its first step, and why: about
    ten times, or so seldom that it takes a tenth of the training's own time, but about four times.
    """
    affordable = LOOKING * epochs * rows / (LOOK_COST * held_out) if held_out else math.inf
    if affordable >= MOST_LOOKS:
        return MOST_LOOKS, "about ten times"
    looks = max(FEWEST_LOOKS, int(affordable))
    return (
        looks,
        f"{looks} times: more looks at {held_out:,} rows would take over a tenth of the time",
    )
