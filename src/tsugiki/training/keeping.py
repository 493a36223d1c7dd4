"""What a run keeps: its result folder, its report, and the identity that a resume must match.

Knows adapters and models' files, not the loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsugiki.adapters.storage import BaseIdentity, save_adapter, versions
from tsugiki.config import RunConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.templates import with_bos
from tsugiki.errors import DiskError, NonFiniteError, TsugikiError
from tsugiki.files import atomic_folder, atomic_write, write_json
from tsugiki.models.hub import ResolvedModel
from tsugiki.models.load import Base
from tsugiki.models.shards import read_generation
from tsugiki.models.spec import NameMap, stored_dtype
from tsugiki.training.checkpoint import as_os_error
from tsugiki.training.report import write_report
from tsugiki.training.state import Progress

# What may differ on resume: it shapes what is shown and saved, not what is computed.
FREE_ON_RESUME = {
    "save_every", "log_every", "sample_prompt", "show_grad_norms",
    "gradient_checkpointing", "max_memory",
}  # fmt: skip


def base_identity(base: Base) -> BaseIdentity:
    """Who this base is, for adapters trained on it."""
    found = base.fingerprint()
    kind = stored_dtype(base.spec.config)
    folder = None if base.origin is None else str(base.folder.absolute())
    name = base.name  # of few-bit weights: their origin's
    if base.origin is None:
        name = ResolvedModel(base.folder, base.name, base.commit).lasting_name
    return BaseIdentity(name, found.exact, found.rounded, base.commit, kind, base.quantize, folder)


def run_identity(
    config: RunConfig, prepared: Prepared, base: str, total_steps: int, world: int
) -> dict[str, Any]:
    """What must be equal when a run goes on. base: the digest of its tensors."""
    plain = config.model_dump(mode="json")
    same: dict[str, Any] = {
        "data": prepared.fingerprint,
        "base": base,
        "steps": total_steps,
        **({"ranks": world} if world > 1 else {}),
        **({"quantize": config.model.quantize} if config.model.quantize != "none" else {}),
    }
    for section in ("lora", "train"):
        for key, value in plain[section].items():
            if key not in FREE_ON_RESUME:
                same[f"{section}.{key}"] = value
    return same


@contextlib.contextmanager
def told(folder: Path, writes: bool) -> Iterator[None]:
    """However a run ends, its report is written as far as the disk allows.

    Errors that a user mends say how to go on from what is in `folder`.
    """
    ended = "finished"
    try:
        yield
    except (DiskError, NonFiniteError) as error:
        ended = error.problem
        fix = (
            f"free some space or mend the folder, then: tsugiki train --resume {folder}"
            if isinstance(error, DiskError)
            else f"{error.fix}; the last good state is in {folder}"
        )
        raise type(error)(error.problem, got=error.got, fix=fix) from error
    except BaseException as error:
        ended = error.problem if isinstance(error, TsugikiError) else type(error).__name__
        raise
    finally:
        if writes:
            report(folder, ended)


def report(folder: Path, ended: str) -> None:
    """Write the report; a disk that does not take it stops nothing."""
    with contextlib.suppress(TsugikiError, OSError):
        write_report(folder, ended)


def keep_state(
    base: Base,
    folder: Path,
    config: RunConfig,
    chat: ChatFormat,
    identity: BaseIdentity,
    names: NameMap,
    progress: Progress,
    prepared: Prepared,
    info: dict[str, Any],
) -> Path:
    """Write the present state as the run's result: an adapter folder, or a whole model."""
    record = {
        "base_model": identity.name,
        "step": progress.step,
        "held_out_loss_before": progress.first_held_out,
        "held_out_loss": progress.best_loss,
        "rows": prepared.counts,
        "data_fingerprint": prepared.fingerprint,
        "method": config.train.method,
        "hyperparameters": config.model_dump(mode="json", include={"lora", "train"}),
        "versions": versions(),
        **info,
    }
    if config.train.method == "lora":
        return save_adapter(
            base.model,
            folder / "adapter",
            base=identity,
            names=names,
            tokenizer=base.tokenizer,
            chat=chat.state(),
            training_info=record,
            extra={
                "data_fingerprint": prepared.fingerprint,
                "config": config.model_dump(mode="json"),
                "scores": {"held_out_loss": progress.best_loss},
                "lineage": [],
            },
            replace=True,
        )
    target = folder / "model"
    with atomic_folder(target, replace=True) as temporary, as_os_error():
        base.model.save_pretrained(temporary)  # type: ignore[operator]
        base.tokenizer.save_pretrained(temporary)
        write_json(temporary / "training_info.json", record)
        _keep_format(temporary, chat)
    return target


def _keep_format(folder: Path, chat: ChatFormat) -> None:
    """A whole model has no record of ours: its own files say how training rendered and ended."""
    if chat.template is not None:
        text = with_bos(chat.template, chat.starts_with_bos)
        atomic_write(folder / "chat_template.jinja", text)
    path = folder / "generation_config.json"
    stored = read_generation(folder)
    known = stored.get("eos_token_id")
    known = known if isinstance(known, list) else [] if known is None else [known]
    write_json(path, stored | {"eos_token_id": [*dict.fromkeys((*chat.stop_ids, *known))]})
