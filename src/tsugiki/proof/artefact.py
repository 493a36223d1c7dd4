"""What `verify` was given: a model folder, or an adapter with its base.

Opens headers and configs only; tensors and tokenizer are read when a step asks for them.
Knows no limits and compares nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tsugiki.adapters.algebra import Change, Changes, LowRank, float_blocks, read_changes
from tsugiki.adapters.attach import lora_modules, place
from tsugiki.adapters.identity import identify
from tsugiki.adapters.origin import adapter_folder, find_base, is_adapter
from tsugiki.adapters.record import check_base
from tsugiki.data.chat import ChatFormat
from tsugiki.files import read_json
from tsugiki.models.families import (
    FAMILIES,
    HEAD,
    disk_name,
    embedding_name,
    is_tied,
    module_path,
)
from tsugiki.models.hub import ResolvedModel, resolve_model
from tsugiki.models.load import load_tokenizer, tokenizer_of
from tsugiki.models.shards import Stored, StoredModel, open_model, stops_of
from tsugiki.models.spec import load_config
from tsugiki.proof.applied import apply_changes

RECORD = "tsugiki.json"
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass
class Artefact:
    """A model folder, or an adapter on one.

    name: as the user said it. resolved: the model, or the adapter's base. changes: the adapter.
    """

    name: str
    resolved: ResolvedModel
    stored: StoredModel
    changes: Changes | None = None
    notes: list[str] = field(default_factory=list)
    _chat: ChatFormat | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """For people."""
        return f"adapter on {self.resolved.name}" if self.changes else "model"

    def record(self) -> dict[str, Any] | None:
        """What tsugiki wrote into a merged folder."""
        path = self.stored.folder / RECORD
        if self.changes is not None or not path.is_file():
            return None
        found = read_json(path)
        return found if isinstance(found, dict) and found.get("kind") == "merged" else None

    def settings(self) -> dict[str, Any]:
        """config.json with every default filled in."""
        return dict(load_config(self.stored.folder).to_dict())

    def stops(self) -> set[int]:
        """Ids that end an answer, as generation takes them."""
        ids = set(stops_of(self.stored))
        chat = self.changes.chat if self.changes else None
        return ids | set(chat.get("stop_ids", [])) if chat else ids

    def tensors(self) -> dict[str, Entry]:
        """Module path → where its numbers are; a tied head appears as its own entry."""
        changes = self.changes.by_name if self.changes else {}
        known = self.stored.model_type in FAMILIES
        found = {
            (module_path(name, self.stored.model_type) if known else name): Entry(
                self.stored, stored, changes.get(name)
            )
            for name, stored in self.stored.tensors.items()
            if not name.endswith((".attn.bias", ".attn.masked_bias", "inv_freq"))
        }
        embedding = embedding_name(self.stored)
        head = disk_name(HEAD, self.stored.tensors)
        if embedding is not None and is_tied(self.stored):
            # A tied head has the embedding's stored numbers, and a change of its own.
            source = self.stored.tensors[embedding]
            found[HEAD] = Entry(self.stored, source, changes.get(head or HEAD))
        return found

    def embedding_rows(self) -> int | None:
        """How many tokens have a row."""
        name = embedding_name(self.stored)
        return None if name is None else self.stored.tensors[name].shape[0]

    def dtype(self) -> str:
        """The type of most of its float bytes."""
        sizes: dict[str, int] = {}
        for stored in self.stored.tensors.values():
            if stored.code in NAMES:
                sizes[stored.code] = sizes.get(stored.code, 0) + stored.nbytes
        return NAMES[max(sizes, key=lambda code: sizes[code])] if sizes else "float32"

    def chat(self) -> ChatFormat:
        """The chat format that it speaks: the adapter's recorded one, else its own."""
        if self._chat is None:
            self._chat = self._read_chat()
        return self._chat

    def _read_chat(self) -> ChatFormat:
        tokenizer = load_tokenizer(self.resolved)
        if self.changes is None:
            return ChatFormat.of(tokenizer)
        tokenizer = tokenizer_of(self.changes.folder, tokenizer)
        return ChatFormat.from_state(self.changes.chat, tokenizer)

    def attach(self, model: nn.Module) -> None:
        """Put the adapter on its loaded base, as it runs: beside the weights, not in them."""
        if self.changes is None:
            return
        low = {c.path: c for c in self.changes.by_name.values() if isinstance(c, LowRank)}
        plain = all(c.magnitude is None and not c.embedding for c in low.values())
        if plain and len(low) == len(self.changes.by_name):
            pairs = {path: (c.a.float(), c.b.float()) for path, c in low.items()}
            place(model, pairs, {path: c.scale for path, c in low.items()}, trainable=False)
            for path, module in lora_modules(model):
                if module.lora_A.is_meta:  # beside weights that are fetched only while they run
                    module.lora_A = nn.Parameter(pairs[path][0], requires_grad=False)
                    module.lora_B = nn.Parameter(pairs[path][1], requires_grad=False)
        else:
            apply_changes(model, self.changes.by_name.values())


@dataclass(frozen=True)
class Entry:
    """One tensor of an artefact: its stored numbers and what the adapter does to them."""

    model: StoredModel
    stored: Stored
    change: Change | None

    def tensor(self) -> Tensor:
        """The stored numbers, a view on the file."""
        return self.model.tensor(self.stored.name)

    def blocks(self) -> Iterator[Tensor]:
        """Its numbers in fp32, the change applied, some rows at a time."""
        tensor = self.tensor()
        return self.change.blocks(tensor) if self.change else float_blocks(tensor)


def open_artefact(given: str, base: str | None = None, *, accept_base: bool = False) -> Artefact:
    """Find and open what the user named.

    Args:
        given: an adapter or run folder, a model folder, or a Hub name.
        base: the adapter's base; its own when None.

    Raises:
        ModelError, AdapterError: not there, not whole, another base; named.
    """
    path = Path(given).expanduser()
    if not is_adapter(path):
        resolved = resolve_model(given)
        return Artefact(given, resolved, open_model(resolved.folder))
    folder = adapter_folder(path)
    resolved, notes = find_base(folder, base)
    stored = open_model(resolved.folder)
    changes = read_changes(folder, stored)
    notes += changes.notes
    if changes.record is not None:
        identity = identify(stored, resolved.name, resolved.commit)
        notes += check_base(changes.record.get("base"), identity, folder, accept_base=accept_base)
    return Artefact(given, resolved, stored, changes, notes)
