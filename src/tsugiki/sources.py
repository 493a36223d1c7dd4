"""What a run starts from: its rows read, then its base found, or downloaded.

The first stage of every verb that reads rows. Loads neither torch nor transformers, so that what is
wrong with a file is told in a second, and before anything is downloaded. Knows no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tsugiki.config import RunConfig
from tsugiki.data.formats import Rows, read_rows
from tsugiki.data.named import data_files, find_data
from tsugiki.errors import DataError, UsageError
from tsugiki.models.hub import (
    ResolvedModel,
    refuse_no_config,
    refuse_no_tokenizer,
    resolve_model,
)
from tsugiki.terminal import Terminal

FEW_BITS = "full fine-tuning changes every weight, and weights in few bits cannot be changed"


@dataclass(frozen=True)
class Sources:
    """Rows to train on, rows of `--eval-data`, and the base's folder.

    config: with the data's path, which may have been found.
    """

    config: RunConfig
    rows: Rows
    held_out: Rows | None
    resolved: ResolvedModel


def find_sources(config: RunConfig, terminal: Terminal, *, resumed: bool = False) -> Sources:
    """Read the rows and find the base; says which it is where none was named.

    Raises:
        UsageError: settings that contradict each other.
        DataError: a file that cannot be read, a layout that is not known, no row in it.
        ModelError, HubError: no such base, or it could not be downloaded.
    """
    _refuse_full(config)
    path = find_data(config.data.path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    rows, held_out = read_both(config)
    if config.model.name is None and not resumed:
        terminal.note("no --model given: sprout, the small practice model that comes with tsugiki")
    resolved = resolve_model(config.model.name, config.model.revision)
    refuse_no_config(resolved.folder)
    refuse_no_tokenizer(resolved.folder)
    return Sources(config, rows, held_out, resolved)


def _refuse_full(config: RunConfig) -> None:
    if config.train.method != "full":
        return
    if config.model.quantize != "none":
        got = f"--method full --quantize {config.model.quantize}"
        raise UsageError(FEW_BITS, got=got, fix="leave one of them out")
    if config.model.compute == "int8":
        raise UsageError("--compute int8 is for a frozen base", fix="--method lora")


def read_both(config: RunConfig) -> tuple[Rows, Rows | None]:
    """Rows to train on, and those of `--eval-data` if it was given.

    Raises:
        DataError: as `read_rows`.
    """
    assert config.data.path is not None
    held_out = config.data.eval_data
    if held_out is not None:
        data_files(held_out)  # told before the other rows are read
    rows = _read(config.data.path, config)
    return rows, None if held_out is None else read_held_out(held_out, config)


def _read(path: Path, config: RunConfig) -> Rows:
    data = config.data
    return read_rows(
        path,
        columns=data.columns,
        prompt_template=data.prompt_template,
        answer_template=data.answer_template,
        strict=data.strict,
    )


def read_held_out(path: Path, config: RunConfig) -> Rows:
    """Rows of a file of their own, laid out as the training rows are.

    Raises:
        DataError: as `read_rows`; for another layout no flag is proposed, it would hold for both.
    """
    try:
        return _read(path, config)
    except DataError as error:
        if not error.flags:
            raise
        fix = "lay these rows out as the training rows are"
        raise DataError(error.problem, got=error.got, fix=fix) from None
