"""`tsugiki data show|check|clean`: what a file would train, before it does. Trains nothing."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from tsugiki.data import aozora
from tsugiki.data.chat import ChatFormat
from tsugiki.data.dataset import Prepared
from tsugiki.data.named import ROW_SUFFIXES, SUFFIXES, data_files
from tsugiki.data.report import counts_table, show
from tsugiki.errors import DataError
from tsugiki.files import atomic_write, refuse_existing
from tsugiki.models.load import load_tokenizer
from tsugiki.models.spec import ModelSpec
from tsugiki.pipelines import prepare_rows
from tsugiki.planning import check_context
from tsugiki.sources import Sources
from tsugiki.terminal import Terminal


def _prepare(sources: Sources) -> tuple[Prepared, ChatFormat]:
    config, resolved = sources.config, sources.resolved
    trusted = config.model.trust_remote_code
    spec = ModelSpec.from_folder(resolved.folder, trust_remote_code=trusted)
    check_context(config.data.max_length, spec)
    tokenizer = load_tokenizer(resolved, trust_remote_code=trusted)
    chat = ChatFormat.of(tokenizer, config.data.template, config.data.template_date)
    prepared = prepare_rows(config, sources.rows, sources.held_out, chat, spec.context)
    return prepared, chat


def show_data(sources: Sources, terminal: Terminal, count: int) -> None:
    """Counts, and `count` examples with the trained tokens marked."""
    prepared, chat = _prepare(sources)
    terminal.say("rows", counts_table(prepared), counts=prepared.counts)
    plain = not terminal.console.color_system
    for example in prepared.train[:count]:
        terminal.say(
            "example",
            show(example, chat.tokenizer, plain=plain),
            source=example.source,
            ids=list(example.ids),
            labels=list(example.labels),
        )


def check_data(sources: Sources, terminal: Terminal) -> bool:
    """Counts, every skipped row and what to do; true when nothing was skipped."""
    prepared, _ = _prepare(sources)
    terminal.say("rows", counts_table(prepared), counts=prepared.counts)
    for skip in prepared.skipped:
        terminal.say(
            "skipped",
            Text(f"{skip.source}: {skip.reason}", style="yellow"),
            source=skip.source,
            reason=skip.reason,
        )
    if prepared.skipped:
        count = len(prepared.skipped)
        terminal.note(
            f"{count} left out: a run trains on the others (--strict stops at the first instead); "
            "to keep them, mend each line as its reason says and run tsugiki data check again"
        )
    return not prepared.skipped


def clean_data(source: Path, output: Path, terminal: Terminal) -> None:
    """Write each Aozora text under `source` to `output`, UTF-8, without its marks.

    Folders under `source` are kept. Nothing is written before every target is known to be free.

    Raises:
        DataError: no file looks like one of Aozora Bunko's; two texts that would become one file.
        RunError: a file is there already.
    """
    targets: dict[Path, Path] = {}
    for file in _texts(source):
        if not aozora.looks_like_aozora(file.read_bytes()):
            terminal.warn(f"{file} does not look like an Aozora Bunko text; left alone")
            continue
        inside = file.relative_to(source) if source.is_dir() else Path(file.name)
        target = output / inside.with_suffix(".txt")
        refuse_existing(target)
        if target in targets:
            raise DataError(
                f"{targets[target]} and {file} would both become {target}", fix="rename one"
            )
        targets[target] = file
    for target, file in targets.items():
        text = aozora.clean(file.read_bytes())
        atomic_write(target, text)
        missing = text.count(aozora.MISSING)
        note = f", {missing} characters shown as {aozora.MISSING}" if missing else ""
        terminal.say(
            "cleaned",
            f"{file} → {target}: {len(text):,} characters{note}",
            source=str(file),
            target=str(target),
            characters=len(text),
            missing=missing,
        )
    if not targets:
        raise DataError(
            f"no Aozora Bunko text found in {source}",
            fix="give texts as Aozora Bunko publishes them; others need no cleaning",
        )


def _texts(source: Path) -> list[Path]:
    """The text itself, or those of a folder, also beside tables."""
    if not source.is_dir():
        return data_files(source)
    return sorted(
        p
        for p in source.rglob("*")
        if p.is_file()
        and p.suffix.lower() in SUFFIXES
        and p.suffix.lower() not in ROW_SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(source).parts)
    )
