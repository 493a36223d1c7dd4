"""What a run keeps: its result folder, and the identity that a resume must match.

Knows adapters and models' files, not the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.adapters.storage import BaseIdentity, save_adapter, versions
from tsugiki.config import RunConfig
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.files import atomic_folder, write_json
from tsugiki.models.load import Base
from tsugiki.models.spec import NameMap, stored_dtype
from tsugiki.training.checkpoint import as_os_error
from tsugiki.training.state import Progress

# What may differ on resume: it shapes what is shown and saved, not what is computed.
FREE_ON_RESUME = {"save_every", "log_every", "sample_prompt", "show_grad_norms"}


def base_identity(base: Base) -> BaseIdentity:
    """Who this base is, for adapters trained on it."""
    found = base.fingerprint()
    kind = stored_dtype(base.spec.config)
    return BaseIdentity(base.name, found.exact, found.rounded, base.commit, kind)


def run_identity(
    config: RunConfig, prepared: Prepared, identity: BaseIdentity, total_steps: int
) -> dict[str, Any]:
    """What must be equal when a run goes on."""
    plain = config.model_dump(mode="json")
    same: dict[str, Any] = {
        "data": prepared.fingerprint,
        "base": identity.exact,
        "steps": total_steps,
    }
    for section in ("lora", "train"):
        for key, value in plain[section].items():
            if key not in FREE_ON_RESUME:
                same[f"{section}.{key}"] = value
    return same


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
    step: int,
) -> Path:
    """Write the present state as the run's result: an adapter folder, or a whole model."""
    record = {
        "base_model": identity.name,
        "step": step,
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
    return target
