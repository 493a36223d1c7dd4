"""The demo: bundled rows of a booking desk, and what is shown with them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def rows_path(name: str) -> Path:
    """A bundled file: train, heldout or heldout_new_words."""
    return Path(str(files("tsugiki.demo") / f"{name}.jsonl"))
