"""From the name that a user typed to a folder with a model: sprout, a local folder, or the Hub.

Contacts the Hub (or HF_ENDPOINT) only for a Hub name, and nothing for a folder. Knows no torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tsugiki.errors import HubError, ModelError, TsugikiError, did_you_mean
from tsugiki.files import cache_folder, require_space
from tsugiki.models.fetching import fetch_weights

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
UNWANTED = ("*.bin*", "original/*", "onnx/*", "*.gguf", "*consolidated*")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile("[0-9a-f]{40}")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
QUANTIZED_RECORD = "tsugiki_base.json"  # beside weights in few bits (quantized_store.py)
OFFLINE = "without one, HF_HUB_OFFLINE=1 takes what was downloaded last"


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is; `commit` is the Hub's when it came from there."""

    folder: Path
    name: str
    commit: str | None = None

    @property
    def lasting_name(self) -> str:
        """A name that means this model from any folder: the full path of one that lies here."""
        if self.commit is not None or self.name == "sprout":
            return self.name
        return str(self.folder.absolute())


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def refuse_no_config(folder: Path) -> None:
    """Raises ModelError: this is no model folder."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no config.json",
            fix="give the folder that holds config.json and *.safetensors",
        )


def refuse_no_tokenizer(folder: Path) -> None:
    """Raises ModelError: there is no tokenizer in it."""
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer",
            allowed=", ".join(TOKENIZER_FILES),
            fix="copy the tokenizer files of the original model into the folder",
        )


def local_path(name: str) -> Path:
    """A name as a path, the home folder written out where there is one of that user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def sprout_folder() -> Path:
    """The embedded base."""
    return Path(str(files("tsugiki.models") / "sprout"))


def resolve_model(name: str | None, revision: str | None = None) -> ResolvedModel:
    """Find the model, downloading it if the name is a Hub's.

    A commit that came whole before is not asked for again: its files cannot have changed.

    Raises:
        ModelError: no such folder, and not a Hub name.
        HubError: no network, not found, gated, cut connection.
        DiskError: too little space, told before the download.
    """
    if name is None or name == "sprout":
        return ResolvedModel(sprout_folder(), "sprout")
    path = local_path(name)
    if path.is_dir():
        return ResolvedModel(path, str(name))
    if path.exists():
        raise ModelError(f"{name} is a file", fix="give the folder that holds config.json")
    looks_local = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") != 1
    if looks_local or not NAME.fullmatch(name):
        parent = path.parent if path.parent.is_dir() else Path(".")
        near = did_you_mean(path.name, [p.name for p in parent.iterdir() if p.is_dir()])
        raise ModelError(
            f"there is no model folder {name}",
            allowed="a local folder, or a Hub name such as user/model",
            fix=f"did you mean {parent / near}?" if near else None,
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> ResolvedModel:
    import huggingface_hub
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    kept = _kept(name, revision)
    if kept is not None:
        return kept
    huggingface_hub.utils.disable_progress_bars() if not os.isatty(2) else None
    patterns = {"allow_patterns": list(WANTED), "ignore_patterns": list(UNWANTED)}
    cache = Path(constants.HF_HUB_CACHE)
    try:
        if constants.HF_HUB_OFFLINE:
            folder = snapshot_download(name, revision=revision, local_files_only=True, **patterns)
        else:
            api = HfApi()
            info = api.model_info(name, revision=revision, files_metadata=True, timeout=30)
            _check_space(name, info, cache)
            fetch_weights(name, info, _stored(name, cache) / "blobs")
            folder = snapshot_download(name, revision=info.sha, **patterns)
            _note(name, revision, str(info.sha), cache)
    except TsugikiError:
        raise
    except hub_errors.LocalEntryNotFoundError:
        raise HubError(
            f"{name} is not in the local cache and the Hub cannot be reached",
            fix="connect once and run the same command, or give a local folder with --model",
        ) from None
    except hub_errors.GatedRepoError:
        raise _gated(name, "its licence must be accepted first") from None
    except hub_errors.RevisionNotFoundError:
        raise HubError(f"{name} has no revision {revision!r}", fix="leave --revision out") from None
    except hub_errors.RepositoryNotFoundError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise _gated(name, "it is private, gated, or does not exist") from None
        raise _not_found(name) from None
    except hub_errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise _gated(name, "access was denied") from None
        raise HubError(
            f"the Hub answered {status} for {name}",
            fix="run the same command again later: what has arrived is kept",
        ) from None
    except OSError as error:
        raise HubError(
            f"the connection to the Hub broke while fetching {name}",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            if str(error).strip()
            else type(error).__name__,
            fix="run the same command again: it goes on where it stopped",
        ) from None
    except Exception as error:  # the client's transport and parsing errors are of many types
        raise HubError(
            f"the Hub could not be reached, or its answer for {name} could not be read",
            got=f"{type(error).__name__}: {str(error).strip()[:160]}",
            fix="check the network and run the same command again: it goes on where it stopped"
            + (f"; {OFFLINE}" if any((_stored(name, cache) / "refs").glob("*")) else ""),
        ) from None
    path = Path(folder)
    return ResolvedModel(path, name, path.name if COMMIT.fullmatch(path.name) else None)


def _kept(name: str, commit: str | None) -> ResolvedModel | None:
    """A commit of a model that an earlier run has brought whole, and that is still there."""
    from huggingface_hub import constants

    if not COMMIT.fullmatch(commit or "") or not _mark(name, str(commit)).exists():
        return None
    folder = _stored(name, Path(constants.HF_HUB_CACHE)) / "snapshots" / str(commit)
    files = list(folder.glob("*"))
    if not files or not all(file.exists() for file in files):  # links to what was deleted
        return None
    return ResolvedModel(folder, name, commit)


def _note(name: str, revision: str | None, commit: str, cache: Path) -> None:
    """Remember that a commit came whole, and as the Hub's client does what a branch stood for."""
    branch = revision or "main"
    if not COMMIT.fullmatch(commit) or ".." in branch or Path(branch).is_absolute():
        return  # a server's word or a user's may not choose where to write
    notes = {_mark(name, commit): ""}
    if not COMMIT.fullmatch(branch):
        notes[_stored(name, cache) / "refs" / branch] = commit
    with contextlib.suppress(OSError):  # without them it is asked for again
        for path, text in notes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _mark(name: str, commit: str) -> Path:
    return cache_folder("whole") / f"{name.replace('/', '--')}-{commit}"


def _check_space(name: str, info: object, cache: Path) -> None:
    from fnmatch import fnmatch

    need = 0
    for sibling in getattr(info, "siblings", None) or []:
        file = sibling.rfilename
        wanted = any(fnmatch(file, p) for p in WANTED)
        if wanted and not any(fnmatch(file, p) for p in UNWANTED):
            blob = getattr(sibling, "size", None) or 0
            need += int(blob)
    blobs = _stored(name, cache) / "blobs"
    have = sum(p.stat().st_size for p in blobs.glob("*") if p.is_file())
    require_space(cache, max(0, need - have), f"downloading {name}")


def _stored(name: str, cache: Path) -> Path:
    """Where the Hub's client keeps what it has of a model."""
    return cache / f"models--{name.replace('/', '--')}"


def _gated(name: str, why: str) -> HubError:
    return HubError(
        f"the Hub does not hand out {name}: {why}",
        fix=f"accept the licence at https://huggingface.co/{name}, log in with `hf auth login`, "
        "then run the same command",
    )


def _not_found(name: str) -> HubError:
    near: list[str] = []
    try:
        from huggingface_hub import HfApi

        user, short = name.split("/")
        found = [
            *HfApi().list_models(author=user, limit=100),
            *HfApi().list_models(search=short[: max(3, len(short) // 2)], limit=30),
        ]
        near = difflib.get_close_matches(name, {model.id for model in found}, n=3, cutoff=0.5)
    except Exception:
        near = []  # the search only helps the message
    return HubError(
        f"the Hub has no model {name}",
        allowed=f"near names: {', '.join(near)}" if near else None,
        fix="check the spelling (user/model), or log in if it is private: `hf auth login`",
    )
