"""From what the user named (or did not name) to a base with its adapters, ready to answer.

The newest adapter speaks by default; its record says which base it belongs to and which chat format
it was trained with. Knows no prompt and no conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from tsugiki.adapters.pool import AdapterPool
from tsugiki.adapters.record import recorded_quantization
from tsugiki.adapters.storage import AdapterInfo, BaseIdentity
from tsugiki.data.chat import ChatFormat
from tsugiki.device import decide
from tsugiki.engine.engine import Engine
from tsugiki.errors import AdapterError, ModelError, TsugikiError, UsageError
from tsugiki.files import read_json
from tsugiki.models.load import (
    TOKENIZER_FILES,
    Base,
    ResolvedModel,
    load_base,
    load_tokenizer,
    resolve_model,
)
from tsugiki.models.quantized import check_method
from tsugiki.models.shards import QUANTIZED_RECORD as RECORD
from tsugiki.models.spec import ModelSpec
from tsugiki.terminal import Terminal

BASE = "base"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Who:
    """Whom to talk to, as the user named it.

    Args:
        model: base; the adapter's own when None.
        adapters: PATH or NAME=PATH, an adapter folder or a run folder; the first one speaks.
            None given: the newest one under runs/ and models/.
        base_only: no adapter at all.
        template: a named fallback instead of the recorded chat format.
        accept_base: take an adapter of another base of the same shapes, loudly.
        quantize: none, nf4 or int8; as the first adapter was trained when None.
    """

    model: str | None = None
    revision: str | None = None
    adapters: tuple[str, ...] = ()
    base_only: bool = False
    template: str | None = None
    accept_base: bool = False
    trust_remote_code: bool = False
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None


@dataclass(frozen=True)
class Voice:
    """One that answers: the base or an adapter, and the chat format that it was trained with."""

    name: str
    adapter: int
    chat: ChatFormat


@dataclass(frozen=True)
class Opened:
    """Everything loaded. voices: "base" first, then the adapters as given."""

    base: Base
    engine: Engine
    voices: dict[str, Voice]
    default: Voice


def newest_adapter(root: Path) -> Path | None:
    """The adapter folder under runs/ or models/ that was written last, or None."""
    patterns = (f"runs/*/adapter/{CONFIG}", f"models/*/adapter/{CONFIG}", f"models/*/{CONFIG}")
    found = [file for pattern in patterns for file in root.glob(pattern) if file.is_file()]
    if not found:
        return None
    return max(found, key=lambda file: (file.stat().st_mtime_ns, str(file))).parent


def open_voices(who: Who, terminal: Terminal, root: Path = Path(".")) -> Opened:
    """Load the base and the adapters; tells what it chose.

    Raises:
        UsageError: names given twice, an adapter together with `base_only`.
        AdapterError, ModelError, HubError: a folder that cannot be used.
    """
    folders = _folders(who, terminal, root)
    resolved = _resolve(who, folders, terminal)
    quantize = check_method(who.quantize or _recorded_quantization(folders)[0])
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
    identity = None
    if folders:
        prints = base.fingerprint()
        identity = BaseIdentity(
            base.name, prints.exact, prints.rounded, base.commit, quantize=base.quantize
        )
    pool = AdapterPool(base.model, identity)
    voices = {BASE: Voice(BASE, -1, ChatFormat.of(base.tokenizer, who.template))}
    for name, folder in folders.items():
        info = pool.load(folder, name, accept_base=who.accept_base)
        for note in info.notes:
            terminal.warn(f"{name}: {note}")
        voices[name] = Voice(name, pool.index(name), _chat_of(info, base, who.template))
    default = voices[next(iter(folders), BASE)]
    # the base is asked as the adapter was trained, so that answers can be compared
    voices[BASE] = Voice(BASE, -1, default.chat)
    kept = "" if base.quantize == "none" else f" ({base.quantize})"
    where = f"{folders[default.name]} on {base.name}{kept}" if folders else base.name + kept
    if terminal.as_json:
        named = {name: str(folder) for name, folder in folders.items()}
        terminal.say(
            "opened", "", base=base.name, adapters=named, speaks=default.name,
            quantize=base.quantize,
        )  # fmt: skip
    else:  # stderr, so that a pipe gets the answer alone
        terminal.errors.print(Text(f"{default.name}: {where}", style="dim"))
    return Opened(base, Engine(base, pool if folders else None), voices, default)


def _folders(who: Who, terminal: Terminal, root: Path) -> dict[str, Path]:
    """Name → folder of each adapter."""
    if who.base_only:
        if who.adapters:
            raise UsageError("an adapter was named together with --base", fix="leave one of them")
        return {}
    if not who.adapters:
        newest = newest_adapter(root)
        if newest is None:
            terminal.warn("no adapter under runs/ or models/: the base answers alone")
            return {}
        recorded = _recorded_base(newest)[0]
        if who.model is not None and recorded not in (None, who.model):
            terminal.warn(
                f"the newest adapter, {newest}, was trained on {recorded}: the base answers alone"
            )
            return {}
        return {_name_of(newest): newest}
    folders: dict[str, Path] = {}
    for given in who.adapters:
        name, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            name, path = "", given
        folder = _adapter_folder(Path(path).expanduser())
        name = name or _name_of(folder)
        if name in folders or name == BASE:
            raise UsageError(
                f"two voices named {name!r}" if name in folders else f"{BASE!r} is the base's name",
                fix=f"name them: --adapter one={folder}",
            )
        folders[name] = folder
    return folders


def _adapter_folder(path: Path) -> Path:
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise AdapterError(
        f"there is no adapter in {path}",
        allowed=f"a folder with {CONFIG}, or a run folder that holds one",
        fix="ls runs/*/adapter" if not path.exists() else None,
    )


def _name_of(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def _recorded_quantization(folders: dict[str, Path]) -> tuple[str, Path | None]:
    """How the first adapter's base was kept in training, and where that is stored."""
    try:
        return recorded_quantization(read_json(next(iter(folders.values())) / "tsugiki.json"))
    except (StopIteration, TsugikiError, ValueError, OSError):
        return "none", None  # reading the adapter itself will say what is wrong with it


def _recorded_base(folder: Path) -> tuple[str | None, str | None]:
    """Name and commit of the base that an adapter's own files name."""
    for file, find in (("tsugiki.json", _ours), (CONFIG, _peft)):
        path = folder / file
        if not path.is_file():
            continue
        try:
            record = read_json(path)
        except (TsugikiError, ValueError, OSError):
            continue  # reading the adapter itself will say what is wrong with it
        name, commit = find(record) if isinstance(record, dict) else (None, None)
        if isinstance(name, str) and name:
            return name, commit if isinstance(commit, str) else None
    return None, None


def _ours(record: dict[str, Any]) -> tuple[Any, Any]:
    base = record.get("base")
    return (base.get("name"), base.get("commit")) if isinstance(base, dict) else (None, None)


def _peft(record: dict[str, Any]) -> tuple[Any, Any]:
    return record.get("base_model_name_or_path"), record.get("revision")


def _resolve(who: Who, folders: dict[str, Path], terminal: Terminal) -> ResolvedModel:
    if who.model is not None:
        return resolve_model(who.model, who.revision)
    if not folders:
        return resolve_model(None)
    folder = next(iter(folders.values()))
    kept, quantized = _recorded_quantization(folders)
    if quantized is not None and who.quantize in (None, kept) and (quantized / RECORD).is_file():
        return resolve_model(str(quantized))
    name, commit = _recorded_base(folder)
    if name is None:
        raise AdapterError(f"{folder} does not say which base it belongs to", fix="--model FOLDER")
    try:
        return resolve_model(name, who.revision or commit)
    except ModelError as error:
        terminal.warn(
            f"{folder} was trained on {name}; where that lies elsewhere, --model FOLDER names it"
        )
        raise error from None


def _chat_of(info: AdapterInfo, base: Base, template: str | None) -> ChatFormat:
    """The format that the adapter was trained with; a template may have come with the adapter."""
    if template is not None:
        return ChatFormat.of(base.tokenizer, template)
    tokenizer = base.tokenizer
    if any((info.folder / name).is_file() for name in TOKENIZER_FILES):
        own = load_tokenizer(ResolvedModel(info.folder, str(info.folder)))
        if len(own) == len(tokenizer) and own.chat_template:
            tokenizer = own
    return ChatFormat.from_state(info.chat, tokenizer)
