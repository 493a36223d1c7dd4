"""The guides' settings as data: by task, by rows, by memory. Knows nothing of how they are used.

A preset stands below flags and `--config`, above the defaults that the planner chooses. Those
of the script pipeline's guide take its warm-up of 0.3, and its rate where they name none; qlora and
textbook are other guides', which name no warm-up.
"""

from __future__ import annotations

from typing import Any

from tsugiki.errors import UsageError, did_you_mean


def _preset(
    text: str,
    r: int,
    alpha: float,
    dropout: float | None = None,
    rate: float | None = None,
    *,
    epochs: float | None = None,
    batch: int | None = None,
    accumulation: int | None = None,
    warmup: float | None = None,
    decay: float | None = None,
    length: int | None = None,
    optimizer: str | None = None,
    quantize: str | None = None,
) -> tuple[str, dict[str, Any]]:
    lora = {"r": r, "alpha": alpha, "dropout": dropout}
    train = {
        "optimizer": optimizer,
        "learning_rate": rate,
        "epochs": epochs,
        "batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "warmup_ratio": warmup,
        "weight_decay": decay,
    }
    sections: dict[str, dict[str, Any]] = {
        "model": {"quantize": quantize},
        "data": {"max_length": length},
        "lora": lora,
        "train": train,
    }
    given = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in sections.items()
    }
    return text, {section: values for section, values in given.items() if values}


WARMUP = 0.3  # the guide's warm-up
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "guide": _preset(
        "the script pipeline's own defaults", 16, 32, 0.05, 5e-5,
        epochs=3, batch=2, accumulation=8, warmup=WARMUP, decay=0.01,
    ),
    "chat": _preset(
        "conversation", 16, 32, 0.05, 5e-5, epochs=3, batch=2, warmup=WARMUP
    ),
    "domain": _preset("domain knowledge", 32, 64, 0.1, 3e-5, warmup=WARMUP),
    "code": _preset("code", 24, 48, 0.05, 2e-5, warmup=WARMUP),
    "code-long": _preset("code, more passes", 24, 48, 0.05, 3e-5, epochs=5, batch=4, warmup=WARMUP),
    "style": _preset("style and tone (the FFN layers matter)", 8, 16, 0.05, 1e-4, warmup=WARMUP),
    "light": _preset(
        "light and fast", 8, 16, 0.1, 1e-4, epochs=2, batch=1, accumulation=16, warmup=WARMUP
    ),
    "rows-under-1k": _preset("fewer than 1,000 rows", 8, 16, 0.1, 1e-4, warmup=WARMUP),
    "rows-1k-10k": _preset("1,000 to 10,000 rows", 16, 32, 0.05, 5e-5, warmup=WARMUP),
    "rows-over-10k": _preset("more than 10,000 rows", 32, 64, 0.05, 2e-5, warmup=WARMUP),
    "memory-under-8gb": _preset(
        "less than 8 GB of memory", 4, 8, 0.05, 5e-5, batch=1, accumulation=16, warmup=WARMUP
    ),
    "memory-8-16gb": _preset(
        "8 to 16 GB of memory", 16, 32, 0.05, 5e-5, batch=2, accumulation=8, warmup=WARMUP
    ),
    "memory-over-16gb": _preset(
        "more than 16 GB of memory", 32, 64, 0.05, 5e-5, batch=4, accumulation=4, warmup=WARMUP
    ),
    "qlora": _preset(
        "a base in four bits, long rows cut", 16, 32, 0.05, 2e-4, epochs=3, batch=4, accumulation=4,
        length=512, optimizer="paged_adamw_8bit", quantize="nf4",
    ),
    "textbook": _preset(
        "raw text on GPT-2 (Aozora Bunko)", 8, 32, 0.1, 1e-4, epochs=3, batch=4, accumulation=4
    ),
}  # fmt: skip


def preset(name: str) -> dict[str, Any]:
    """The settings of one preset, nested by section.

    Raises:
        UsageError: no preset of that name; the nearest and all are named.
    """
    if name not in PRESETS:
        near = did_you_mean(name, tuple(PRESETS))
        raise UsageError(
            f"there is no preset {name!r}",
            allowed=", ".join(PRESETS),
            fix=f"--preset {near}" if near else None,
        )
    return PRESETS[name][1]
