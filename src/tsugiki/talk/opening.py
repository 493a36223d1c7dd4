"""A base with its adapters, loaded and ready to answer, each in the chat format of its training.

Knows no prompt and no conversation, and not how a user names them (`naming.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.text import Text

from tsugiki.adapters.pool import AdapterPool
from tsugiki.adapters.storage import AdapterInfo
from tsugiki.data.chat import ChatFormat
from tsugiki.device import decide
from tsugiki.engine.engine import Engine
from tsugiki.models.load import Base, load_base, tokenizer_of
from tsugiki.models.quantized import check_method
from tsugiki.models.spec import ModelSpec
from tsugiki.talk.naming import BASE, Named
from tsugiki.terminal import Terminal
from tsugiki.training.keeping import base_identity


@dataclass(frozen=True)
class Voice:
    """One that answers: the base or an adapter, and the chat format that it was trained with.

    stop_ids: what ends an answer, by that format or by the base's own files.
    """

    name: str
    adapter: int
    chat: ChatFormat
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Opened:
    """Everything loaded. voices: "base" first, then the adapters as given."""

    base: Base
    engine: Engine
    voices: dict[str, Voice]
    default: Voice


def open_voices(named: Named, terminal: Terminal) -> Opened:
    """Load the base and the adapters; tells what it chose.

    Raises:
        UsageError: no such way to keep a base.
        AdapterError, ModelError: a folder that cannot be used.
    """
    who, folders, resolved = named.who, named.folders, named.resolved
    quantize = check_method(who.quantize or named.quantize)
    spec = ModelSpec.from_folder(resolved.folder, trust_remote_code=who.trust_remote_code)
    decisions = decide(who.device, who.dtype, hidden_size=spec.hidden_size)
    base = load_base(
        resolved,
        dtype=decisions.torch_dtype,
        device=decisions.device,
        trust_remote_code=who.trust_remote_code,
        quantize=quantize,
    )
    for note in base.notes:
        terminal.warn(note)
    pool = AdapterPool(base.model, base_identity(base) if folders else None)
    chat = ChatFormat.of(base.tokenizer, who.template)
    voices = {BASE: Voice(BASE, -1, chat, (*chat.stop_ids, *base.stop_ids))}
    for name, folder in folders.items():
        info = pool.load(folder, name, accept_base=who.accept_base)
        for note in info.notes:
            terminal.warn(f"{name}: {note}")
        chat = _chat_of(info, base, who.template)
        voices[name] = Voice(name, pool.index(name), chat, (*chat.stop_ids, *base.stop_ids))
    default = voices[next(iter(folders), BASE)]
    # the base is asked as the adapter was trained, so that answers can be compared
    voices[BASE] = replace(default, name=BASE, adapter=-1)
    kept = "" if base.quantize == "none" else f" ({base.quantize})"
    where = f"{folders[default.name]} on {base.name}{kept}" if folders else base.name + kept
    if terminal.as_json:
        paths = {name: str(folder) for name, folder in folders.items()}
        terminal.say(
            "opened", "", base=base.name, adapters=paths, speaks=default.name,
            quantize=base.quantize,
        )  # fmt: skip
    else:  # stderr, so that a pipe gets the answer alone
        terminal.errors.print(Text(f"{default.name}: {where}", style="dim"))
    return Opened(base, Engine(base, pool if folders else None), voices, default)


def _chat_of(info: AdapterInfo, base: Base, template: str | None) -> ChatFormat:
    """The format that the adapter was trained with; a template may have come with the adapter."""
    if template is not None:
        return ChatFormat.of(base.tokenizer, template)
    return ChatFormat.from_state(info.chat, tokenizer_of(info.folder, base.tokenizer))
