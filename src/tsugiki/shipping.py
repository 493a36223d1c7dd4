"""`tsugiki export`: finds what was named, tells the plan, writes the files, says how to run them.

The order of the stages and what a user reads between them; the work is in `exporting/`, in
`adapters/` and in `formats/`.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tsugiki.adapters.joined import Joined, join
from tsugiki.adapters.origin import adapter_folder, beside, find_base, is_adapter, name_of
from tsugiki.adapters.portable import make_portable, write_portable
from tsugiki.adapters.record import recorded_quantization
from tsugiki.errors import UsageError
from tsugiki.exporting.gguf import ExportPlan, plan_export, write_gguf
from tsugiki.exporting.gguf_lora import plan_lora, write_lora
from tsugiki.exporting.launch import run_gguf, run_lora, run_portable
from tsugiki.exporting.ollama import modelfile, read_wording, stop_texts
from tsugiki.exporting.vocabulary import chat_of
from tsugiki.files import atomic_file, human_bytes, refuse_existing, require_space, scratch_folder
from tsugiki.formats.gguf_encode import DIRECT
from tsugiki.formats.mixes import find_kind
from tsugiki.models.hub import ResolvedModel, resolve_model
from tsugiki.stopping import will_write
from tsugiki.terminal import Terminal


@dataclass(frozen=True)
class Shipped:
    """One file that was written, and its tensors' types as read back from it."""

    path: Path
    dtype: str
    types: dict[str, int]
    nbytes: int
    kept: str = "none"  # how the base's numbers were taken: as stored, or those of nf4 or int8


def export_gguf(
    source: str,
    asked: Sequence[str],
    output: Path | None,
    terminal: Terminal,
    *,
    model: str | None = None,
    untie: bool = False,
    accept_base: bool = False,
    eval_data: Path | None = None,
) -> list[Shipped]:
    """Write a model, an adapter on its base, or another GGUF file in the types asked for.

    Args:
        source: an adapter or run folder, a model folder, a Hub name, or FILE.gguf.
        asked: names of types, also several in one word with commas.
        output: a folder for the files, or the first one's name where it ends in .gguf.
        model: the adapter's base; its own when None.
        eval_data: rows to measure on which base is better, where training saw one in few bits.

    Raises:
        TsugikiError: anything that keeps a file from being right; what is written is whole.
    """
    types = parse_types(asked)
    if source.endswith(".gguf") or Path(source).is_file():
        return _quantise_again(Path(source), types, output, terminal)
    began = time.monotonic()
    joined, stem, home = open_source(source, terminal, model, untie, accept_base)
    paths = file_names(types, stem, output or home)
    refuse_existing(*paths.values())
    plan = plan_export(joined, stem)
    for note in plan.notes:
        terminal.note(note, loud=True)
    exact = plan.exact_type()
    kept, _ = recorded_quantization(joined.changes.record if joined.changes else None)
    # Quantised from a file that holds every number, written for this where none was asked for, or
    # none on the base that is the better one.
    beside = set(types) - set(DIRECT) and (exact not in types or kept != "none")
    need = sum(plan.need(name if name in DIRECT else "q8_0") for name in types)
    need += plan.need(exact) if beside else 0
    first = next(iter(paths.values()))
    terminal.say(
        "export_plan",
        f"exporting {source}: {len(plan.sources)} tensors as {', '.join(types)}, "
        f"{human_bytes(need)} will be written to {first.parent} "
        f"(read and known in {time.monotonic() - began:.1f} s)",
        tensors=len(plan.sources),
        types=types,
        need=need,
        output=str(first.parent),
    )
    require_space(first, need, "the exported files")
    plans, taken = {"none": plan}, dict.fromkeys(types, "none")
    if kept != "none":
        plans[kept], taken = _better_bases(joined, kept, plan, stem, types, eval_data, terminal)
    groups = {
        kept: {name: path for name, path in paths.items() if taken[name] == kept}
        for kept in dict.fromkeys(taken.values())
    }
    will_write(paths.values())
    done = []
    for kept, group in groups.items():
        files = _written_on(plans[kept], exact, group, terminal)
        done += [replace(one, kept=kept) for one in files]
    done.sort(key=lambda shipped: types.index(shipped.dtype))
    smallest = min(done, key=lambda shipped: shipped.nbytes).path
    tell_runs(terminal, run_gguf(smallest, _modelfile(joined, smallest, stem, terminal), stem))
    return done


def _better_bases(
    joined: Joined,
    kept: str,
    plan: ExportPlan,
    stem: str,
    types: Sequence[str],
    rows: Path | None,
    terminal: Terminal,
) -> tuple[ExportPlan, dict[str, str]]:
    """The plan beside `plan` on the base that training saw, and which of the two each type takes.

    As for merging: the base that training saw in few bits, or the stored one, by held-out loss,
    measured in each of the types.
    """
    from tsugiki.joining import choose_bases
    from tsugiki.judging import gguf_form, onto
    from tsugiki.proof.gguf.verify import llama_if_there

    plans = {"none": plan, kept: plan_export(onto(joined, kept), stem)}
    name, commit = (joined.identity.name, joined.identity.commit) if joined.identity else ("", None)
    base = ResolvedModel(joined.base.folder, name, commit)
    with llama_if_there(torch.get_num_threads()) as llama:
        forms = [gguf_form(plans, dtype, llama) for dtype in types]
        taken = choose_bases(joined, kept, forms, base, rows, terminal)
    return plans[kept], dict(zip(types, taken, strict=True))


def _modelfile(joined: Joined, gguf: Path, stem: str, terminal: Terminal) -> Path:
    """Beside the file, for Ollama; without a template where none renders what training saw."""
    chat = chat_of(joined)
    wording, remark = read_wording(chat) if chat else (None, "")
    if remark:
        terminal.note(f"Ollama: {remark}", loud=True)
    path = gguf.with_name(f"{stem}.Modelfile")
    if path.exists():
        terminal.note(f"{path} exists already and is left as it is", loud=True)
        return path
    text = modelfile(f"./{gguf.name}", wording, stop_texts(chat) if chat else [])
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def export_lora(
    source: str,
    output: Path | None,
    terminal: Terminal,
    *,
    model: str | None = None,
    accept_base: bool = False,
) -> Shipped:
    """Write an adapter alone as GGUF.

    Raises:
        TsugikiError: no adapter, or one that cannot be laid over a base; nothing is written.
    """
    adapter_folder(source)
    joined, stem, home = open_source(source, terminal, model, True, accept_base)
    named = output is not None and output.suffix == ".gguf"
    path = output if named and output else (output or home) / f"{stem}-LoRA.gguf"
    refuse_existing(path)
    plan = plan_lora(joined, stem)
    began = time.monotonic()
    will_write([path])
    size = write_lora(plan, path)
    shipped = Shipped(path, "lora", {"F32": len(plan.tensors)}, size)
    _tell(shipped, terminal, time.monotonic() - began)
    tell_runs(terminal, run_lora(path))
    return shipped


def export_portable(
    source: str,
    output: Path | None,
    terminal: Terminal,
    *,
    model: str | None = None,
    accept_base: bool = False,
) -> Path:
    """Write an adapter in the form that its readers read alike, and say what each will take.

    Raises:
        TsugikiError: no adapter, or one that can only travel merged; nothing is written.
    """
    output = output or beside(adapter_folder(source), "portable")
    refuse_existing(output)
    joined, stem, _ = open_source(source, terminal, model, True, accept_base)
    made = make_portable(joined)
    will_write([output])
    path = write_portable(made, output)
    terminal.say(
        "portable",
        f"wrote {path}: {len(made.tensors) // 2} pairs of rank {made.rank}, the scale in B"
        + (f" ({made.padded} of zeros)" if made.padded else ""),
        path=str(path),
        rank=made.rank,
        pairs=len(made.tensors) // 2,
        zeros=made.padded,
    )
    for verdict in made.verdicts:
        terminal.say(
            "reader",
            f"  {verdict.reader:10} {'takes it' if verdict.takes else 'does not take it'}"
            + (f": {verdict.needs}" if verdict.needs else ""),
            reader=verdict.reader,
            takes=verdict.takes,
            needs=verdict.needs,
        )
    base = str(made.config["base_model_name_or_path"])
    again = shlex.join(["tsugiki", "export", source, *(["--model", model] if model else [])])
    tell_runs(terminal, run_portable(base, path, stem, made.rank, made.verdicts, again))
    return path


def tell_runs(terminal: Terminal, lines: dict[str, str]) -> None:
    """One command for each server."""
    terminal.heading("to run it")
    for server, command in lines.items():
        terminal.say("run", f"  {server:13} {command}", server=server, command=command)


def parse_types(asked: Sequence[str]) -> list[str]:
    """Names of types, each once; those that need llama.cpp only where it is installed.

    Raises:
        UsageError: none, one that is not known, or llama.cpp is missing.
    """
    words = [word.strip() for one in asked for word in one.split(",") if word.strip()]
    types = list(dict.fromkeys(find_kind(word).name for word in words))
    if not types:
        raise UsageError("no type to write", fix="--gguf f16")
    if any(name not in DIRECT for name in types):
        from tsugiki.formats.llama_cpp.process import require_library

        require_library()
    return types


def open_source(
    source: str, terminal: Terminal, model: str | None, untie: bool, accept_base: bool
) -> tuple[Joined, str, Path]:
    """What was named; what it is called; and the folder for what is made of it."""
    path = Path(source).expanduser()
    if is_adapter(path):
        folder = adapter_folder(path)
        base, notes = find_base(folder, model)
        joined = join(
            base.folder, folder, name=base.name, commit=base.commit, untie=untie,
            accept_base=accept_base,
        )  # fmt: skip
        for note in [*notes, *joined.notes]:
            terminal.note(note, loud=True)
        return joined, name_of(folder), beside(folder, "gguf")
    resolved = resolve_model(source)
    stem = resolved.name.rstrip("/").rpartition("/")[2]
    home = beside(path, "gguf") if path.is_dir() else Path(f"{stem}-gguf")
    return join(resolved.folder, None, name=resolved.name), stem, home


def file_names(types: Sequence[str], stem: str, output: Path) -> dict[str, Path]:
    """Type → file: NAME-TYPE.gguf in a folder; the first has the name that was given, if any."""
    if output.suffix != ".gguf":
        return {name: output / f"{stem}-{name.upper()}.gguf" for name in types}
    stem = output.stem
    for mark in (f"-{types[0]}", f".{types[0]}"):
        if stem.lower().endswith(mark):
            stem = stem[: -len(mark)]
    others = {name: output.with_name(f"{stem}-{name.upper()}.gguf") for name in types[1:]}
    return {types[0]: output, **others}


def _written(plan: ExportPlan, dtype: str, path: Path, terminal: Terminal) -> Shipped:
    began = time.monotonic()
    done = write_gguf(plan, dtype, path)
    shipped = Shipped(done.path, dtype, done.types, done.nbytes)
    _tell(shipped, terminal, time.monotonic() - began)
    return shipped


def _written_on(
    plan: ExportPlan, exact: str, paths: dict[str, Path], terminal: Terminal
) -> list[Shipped]:
    """All types of one base; quantised through a file that holds every number exactly."""
    done = [_written(plan, name, path, terminal) for name, path in paths.items() if name in DIRECT]
    wanted = {name: path for name, path in paths.items() if name not in DIRECT}
    if not wanted:
        return done
    if exact in paths:
        source = paths[exact]
        return done + [_quantise(source, name, path, terminal) for name, path in wanted.items()]
    with scratch_folder(next(iter(wanted.values()))) as temporary:
        source = temporary / f"{exact}.gguf"
        write_gguf(plan, exact, source)
        return done + [_quantise(source, name, path, terminal) for name, path in wanted.items()]


def _quantise_again(
    source: Path, types: list[str], output: Path | None, terminal: Terminal
) -> list[Shipped]:
    """From a GGUF file in F32, F16 or BF16."""
    stem = source.stem
    for mark in DIRECT:
        if stem.lower().endswith((f"-{mark}", f".{mark}")):
            stem = stem[: -len(mark) - 1]
    paths = file_names(types, stem, output or source.parent)
    refuse_existing(*paths.values())
    will_write(paths.values())
    return [_quantise(source, name, path, terminal) for name, path in paths.items()]


def _quantise(source: Path, dtype: str, path: Path, terminal: Terminal) -> Shipped:
    from tsugiki.formats.quantise import quantise_file

    began = time.monotonic()
    done = quantise_file(source, path, dtype, torch.get_num_threads())
    shipped = Shipped(done.path, dtype, done.counts, done.path.stat().st_size)
    _tell(shipped, terminal, time.monotonic() - began)
    return shipped


def _tell(shipped: Shipped, terminal: Terminal, seconds: float) -> None:
    kinds = ", ".join(f"{name} × {count}" for name, count in shipped.types.items())
    terminal.say(
        "exported",
        f"wrote {shipped.path}: {human_bytes(shipped.nbytes)}, {kinds}, in {seconds:.1f} s",
        path=str(shipped.path),
        dtype=shipped.dtype,
        types=shipped.types,
        bytes=shipped.nbytes,
        seconds=seconds,
    )
