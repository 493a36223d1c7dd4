"""The settings of a run that goes on: its own, with what was typed over them.

Loads no torch, so that what is missing is told at once. Knows no checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsugiki.adapters.origin import find_base, is_adapter
from tsugiki.config import RunConfig, build_config, read_yaml
from tsugiki.data.named import data_files
from tsugiki.errors import UsageError
from tsugiki.terminal import Terminal


def resumed_config(
    run: Path, typed: dict[str, Any], whole: list[str], terminal: Terminal
) -> RunConfig:
    """What a run folder says, with the flags that were typed; a base that moved is found.

    Args:
        whole: flags that were typed and belong to a run as a whole.

    Raises:
        UsageError: no run folder, or a flag that cannot be joined with it; its data or its base
            are not where they were.
        DataError: data typed that are not there.
        AdapterError: the base is nowhere to be found.
    """
    again = f"tsugiki train --resume {run}"
    if whole:
        raise UsageError(
            f"{' and '.join(whole)} cannot be joined with --resume",
            fix=f"{again} takes its settings from the run folder",
        )
    if not (run / "config.yaml").is_file():
        inside = next((p for p in run.parents if (p / "config.yaml").is_file()), None)
        fix = f"tsugiki train --resume {inside}" if inside else "ls runs/"
        if run.exists():
            raise UsageError(f"{run} is not a run folder", fix=fix)
        raise UsageError(f"there is no run folder {run}", fix=fix)
    config = build_config(read_yaml(run / "config.yaml"), typed)
    for key, flag in (("path", "--data"), ("eval_data", "--eval-data")):
        path = getattr(config.data, key)
        if key in typed.get("data", {}):
            data_files(path)
        elif path is not None and not path.exists():
            raise UsageError(
                f"the data of this run is not at {path} any more", fix=f"{again} {flag} WHERE_IT_IS"
            )
    return _with_base(config, run, typed, again, terminal)


def _with_base(
    config: RunConfig, run: Path, typed: dict[str, Any], again: str, terminal: Terminal
) -> RunConfig:
    """With the folder where the base is now."""
    name = config.model.name
    if name is None or not Path(name).is_absolute() or Path(name).is_dir():
        return config
    if "name" in typed.get("model", {}):
        return config
    if not is_adapter(run):
        raise UsageError(
            f"the base of this run is not at {name} any more", fix=f"{again} --model WHERE_IT_IS"
        )
    base, notes = find_base(run / "adapter")
    for note in notes or [f"{name} is not there any more: going on with {base.name}"]:
        terminal.warn(note)
    return config.model_copy(update={"model": config.model.model_copy(update={"name": base.name})})
