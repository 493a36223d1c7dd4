"""A base with an adapter on it (or none), checked against each other before anything is written.

What merging and exporting share: the identity of the base, tied embeddings that a change would tear
apart, and the chat template and stop tokens that travel with the weights. Imports no transformers;
computes nothing and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tsugiki.adapters.algebra import Changes, Replaced, read_changes
from tsugiki.adapters.identity import identify
from tsugiki.adapters.record import BaseIdentity, check_base
from tsugiki.data.templates import FALLBACKS, with_bos
from tsugiki.errors import AdapterError, ModelError
from tsugiki.files import read_json
from tsugiki.models.families import HEAD, disk_name, embedding_name, is_tied
from tsugiki.models.shards import StoredModel, open_model, stops_of


@dataclass(frozen=True)
class Joined:
    """A base and the changes of an adapter; untie: its head is written apart from the embedding."""

    base: StoredModel
    changes: Changes | None
    identity: BaseIdentity | None
    untie: bool
    notes: list[str] = field(default_factory=list)

    def template(self) -> str | None:
        """The chat template that training used, where the base's own is another; else None."""
        if self.changes is None:
            return None
        folder = self.base.folder
        template = FALLBACKS.get(str((self.changes.chat or {}).get("format")))
        if template is not None:
            template = with_bos(template, _starts_with_bos(folder))
        else:
            template = _template_of(self.changes.folder)
        return None if template == _template_of(folder) else template

    def stops(self) -> tuple[list[int], list[int]]:
        """Ids that end an answer: those that the adapter adds, and those that the base says."""
        stops = stops_of(self.base)
        chat = (self.changes.chat if self.changes else None) or {}
        return [i for i in chat.get("stop_ids", []) if i not in stops], stops


def join(
    base: Path,
    adapter: Path | None,
    *,
    name: str | None = None,
    commit: str | None = None,
    untie: bool = False,
    accept_base: bool = False,
) -> Joined:
    """Read the adapter and the base's headers, and compare their identities.

    Args:
        adapter: none for a base alone.
        name, commit: what the base is called, for the record.
        untie: allow a head that is written apart, where the adapter changes only one of the two.
        accept_base: take another base of the same shapes.

    Raises:
        ModelError, AdapterError: a folder that cannot be used, another base, a tied embedding.
    """
    model = open_model(base)
    if model.config.get("quantization_config"):
        raise ModelError(
            f"{base} is quantised: its stored numbers are codes, not weights",
            fix="--model with the 16-bit original of this model",
        )
    if adapter is None:
        return Joined(model, None, None, False)
    changes = read_changes(adapter, model)
    notes = list(changes.notes)
    identity = identify(model, name or str(base), commit)
    if changes.record is None:
        notes.append(
            "base not verified: the adapter comes from elsewhere, only shapes were checked"
        )
    else:
        notes += check_base(changes.record.get("base"), identity, adapter, accept_base=accept_base)
    apart = _torn_apart(model, changes)
    if apart and not untie:
        what, other = ("head", "embedding") if HEAD in apart else ("embedding", "head")
        raise AdapterError(
            f"{adapter} changes the {what} ({apart}), which this base ties to its {other}: "
            "one stored tensor cannot be both",
            fix="--untie writes the two apart, which is exactly what the adapter computes",
        )
    if apart:
        notes.append("the head is written apart from the embedding (tie_word_embeddings: false)")
    return Joined(model, changes, identity, bool(apart), notes)


def _torn_apart(model: StoredModel, changes: Changes) -> str | None:
    """The name whose change the tied partner must not see; None where nothing is torn apart."""
    if not is_tied(model):
        return None
    head = disk_name(HEAD, model.tensors) or HEAD
    embedding = embedding_name(model)
    ours, theirs = changes.by_name.get(head), changes.by_name.get(embedding or "")
    if ours is None and theirs is None:
        return None
    if (
        isinstance(ours, Replaced)
        and isinstance(theirs, Replaced)
        and torch.equal(ours.value, theirs.value)
    ):
        return None
    return head if ours is not None else embedding


def _template_of(folder: Path) -> str | None:
    """The chat template beside a tokenizer, in either of the places where it may be."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if config.is_file():
        found = read_json(config).get("chat_template")
        return found if isinstance(found, str) else None
    return None


def _starts_with_bos(folder: Path) -> bool:
    """Whether this tokenizer puts its BOS token before a text; our templates follow it."""
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() or not config.is_file():
        return False
    bos = read_json(config).get("bos_token")
    text = bos.get("content") if isinstance(bos, dict) else bos
    tokenizer = Tokenizer.from_file(str(file))
    return text is not None and tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(text)]
