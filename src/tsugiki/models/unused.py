"""Tensors that a base's files hold and its config does not use: what a user is told of them.

A file with more than the config asks for loads without an error and is another model than the one
that was saved. Knows the masks and frequencies that old files keep and that nothing reads; loads
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

from tsugiki.models.families import BUFFERS
from tsugiki.models.spec import NameMap

# Masks, frequencies and positions that models computed once and stored; they compute them today.
COMPUTED = re.compile(
    r"(^|\.)(attention\.(bias|masked_bias)|attn\.causal_mask|(cos|sin)_cached|position_ids)$"
)
NAMED = 4


def unused_tensors(model: nn.Module, stored: Iterable[str], names: NameMap) -> list[str]:
    """Stored names that mean no parameter or buffer, no part or second copy of one, and nothing
    that the architecture says to leave."""
    buffers = {name for name, _ in model.named_buffers()}
    used = {*names.conversion.parts, *names.conversion.renamed}
    left = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return [
        name
        for name in stored
        if names.to_module(name) is None
        and name not in used
        and not {name, f"{names.prefix}.{name}"} & buffers
        and not any(pattern.search(name) for pattern in left)
    ]


def notes_on_unused(names: Sequence[str]) -> list[str]:
    """One line for the log, or none: how many tensors are not used, and the first of them."""
    found = sorted(n for n in names if not BUFFERS.search(n) and not COMPUTED.search(n))
    if not found:
        return []
    first = ", ".join(found[:NAMED]) + (" …" if len(found) > NAMED else "")
    them = "a tensor that its config does not use" if len(found) == 1 else (
        f"{len(found)} tensors that its config does not use"
    )  # fmt: skip
    return [
        f"ATTENTION: the base's files hold {them} ({first}); "
        "unless you know why, compare its config.json with the original's"
    ]
