"""LoRA for the whole life of an adapter, on the machine you have.

The public names load their rooms when first used, so that `import tsugiki` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tsugiki.adapters.attach import attach, detach
    from tsugiki.adapters.storage import load_adapter, save_adapter
    from tsugiki.config import LoraConfig
    from tsugiki.training.simple import train

_HOMES = {
    "LoraConfig": "tsugiki.config",
    "attach": "tsugiki.adapters.attach",
    "detach": "tsugiki.adapters.attach",
    "load_adapter": "tsugiki.adapters.storage",
    "save_adapter": "tsugiki.adapters.storage",
    "train": "tsugiki.training.simple",
}

__all__ = ["LoraConfig", "attach", "detach", "load_adapter", "save_adapter", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tsugiki' has no attribute {name!r}")
