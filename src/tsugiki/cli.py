"""The command line: one verb, one function. Parses, prints errors, sets exit codes.

Heavy rooms are imported inside the verbs, so that `tsugiki --help` loads no torch. Knows nothing
of how a verb does its work, nor that some of them run under a parent (`guarding.py`).
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tsugiki import __version__
from tsugiki.config import RunConfig, build_config, read_yaml
from tsugiki.doctor import doctor
from tsugiki.errors import TsugikiError, UsageError
from tsugiki.export_verb import export
from tsugiki.flags import Accept, EvalData, Json, Model, NoVerify, Untie, Verbs, with_config_flags
from tsugiki.presets import PRESETS, preset
from tsugiki.quantizing import quantize_base
from tsugiki.stopping import stoppable, verify_command
from tsugiki.talk_verbs import chat, generate
from tsugiki.terminal import Terminal

app = typer.Typer(
    name="tsugiki",
    cls=Verbs,
    help="LoRA for the whole life of an adapter, on the machine you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look at rows before training.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """LoRA for the whole life of an adapter, on the machine you have."""
    if version:
        print(f"tsugiki {__version__}")
        raise typer.Exit


def train(
    source: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="rows: a file or a folder")
    ] = None,
    *,
    config: Annotated[Path | None, typer.Option(help="settings as YAML")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run folder")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the plan, train nothing")
    ] = False,
    as_json: Json = False,
    settings: dict[str, Any],
) -> None:
    """Train an adapter on DATA. Precedence: flag > --config > --preset > chosen default."""
    if source is not None:
        if "path" in settings.get("data", {}):
            raise UsageError("the data was given twice", fix="give DATA or --data, not both")
        settings.setdefault("data", {})["path"] = source
    terminal = Terminal(as_json=as_json)
    if resume is not None:
        from tsugiki.resuming import resumed_config

        whole = [f for f, k in (("--preset", "preset"), ("--output", "output")) if k in settings]
        whole += ["--config"] if config is not None else []
        run_config = resumed_config(resume, settings, whole, terminal)
    else:
        run_config = configure(settings, config)
        if run_config.output is not None:
            from tsugiki.training.place import refuse_used

            refuse_used(run_config.output)

    from tsugiki.sources import find_sources

    # What is wrong with them is told before torch is loaded.
    sources = find_sources(run_config, terminal, resumed=resume is not None)

    from tsugiki.pipelines import run_training

    run_training(run_config, terminal, resume=resume, dry_run=dry_run, sources=sources)


app.command("train")(with_config_flags(train))


def configure(settings: dict[str, Any], config: Path | None) -> RunConfig:
    """Flags over `--config` over `--preset`.

    Raises:
        UsageError: unknown keys, bad values, no such preset.
    """
    from_file = read_yaml(config) if config else {}
    name = settings.get("preset", from_file.get("preset"))
    return build_config(preset(name) if name else {}, from_file, settings)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the run and its report")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="seed of the whole demo")] = 0,
    as_json: Json = False,
) -> None:
    """Train the embedded model on bundled rows and show everything (about 3 minutes, offline)."""

    from tsugiki.demo.show import run_demo

    run_demo(output, Terminal(as_json=as_json), seed=seed)


app.command()(generate)
app.command()(chat)

Asked = Annotated[str | None, typer.Option("--dtype", help="f32, bf16 or f16; default: the base's")]


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="an adapter folder, or a run folder")],
    output: Annotated[Path | None, typer.Option(help="folder of the merged model")] = None,
    dtype: Asked = None,
    model: Model = None,
    untie: Untie = False,
    accept_base: Accept = False,
    eval_data: EvalData = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, and prove that both compute the same.

    Exit code 0: proven equal, or --no-verify. 1: an error, or not what it was made of. 3: written,
    and not proven whole: the memory does not suffice for the proof.
    """
    terminal = Terminal(as_json=as_json)
    how: dict[str, Any] = {"model": model, "dtype": dtype, "accept_base": accept_base}
    with stoppable("the merge"):
        from tsugiki.joining import merge_adapter, verify_pair

        merged = merge_adapter(adapter, output, terminal, untie=untie, eval_data=eval_data, **how)
        if no_verify:
            return
        later = verify_command(adapter, merged.folder, model, accept_base)
        with stoppable(f"the proof of {merged.folder}", later):
            proof = verify_pair(str(adapter), str(merged.folder), terminal, **how)
    raise typer.Exit(proof.value)


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="A", help="adapter, run or model folder")],
    candidate: Annotated[str, typer.Argument(metavar="B", help="what should equal A")],
    model: Model = None,
    dtype: Asked = None,
    max_error: Annotated[float | None, typer.Option(help="of logits, relative to spread")] = None,
    max_kl: Annotated[float | None, typer.Option(help="limit of the mean KL, in nats")] = None,
    max_ratio: Annotated[
        float | None, typer.Option(help="how far the perplexities' ratio may be from 1")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a text to compare perplexities on")] = None,
    layer_by_layer: Annotated[
        bool, typer.Option("--layer-by-layer", help="never hold a whole model in memory")
    ] = False,
    accept_base: Accept = False,
    as_json: Json = False,
) -> None:
    """Compare two artefacts: settings, tensors, token ids, template, logits.

    Exit code 0: equal. 1: an error, or something differs. 3: nothing differs, and not everything
    could be compared: llama.cpp is not installed, or the memory does not suffice.
    """
    how: dict[str, Any] = {"model": model, "dtype": dtype, "accept_base": accept_base}
    limits: dict[str, Any] = {"max_error": max_error, "max_kl": max_kl, "max_ratio": max_ratio}
    limits |= {"text": text, "layer_by_layer": layer_by_layer}
    with stoppable(f"the proof of {candidate}"):
        from tsugiki.joining import verify_pair

        proof = verify_pair(reference, candidate, Terminal(as_json=as_json), **how, **limits)
    raise typer.Exit(proof.value)


app.command()(export)


def data_show(
    source: Annotated[Path, typer.Argument(metavar="DATA", help="rows: a file or a folder")],
    *,
    count: Annotated[int, typer.Option("--count", min=0, help="how many examples")] = 5,
    as_json: Json = False,
    settings: dict[str, Any],
) -> None:
    """Show rows as the model sees them, the trained tokens coloured."""
    from tsugiki.sources import find_sources

    terminal = Terminal(as_json=as_json)
    settings.setdefault("data", {})["path"] = source
    sources = find_sources(build_config(settings), terminal)

    from tsugiki.looking import show_data

    show_data(sources, terminal, count)


def data_check(
    source: Annotated[Path, typer.Argument(metavar="DATA", help="rows: a file or a folder")],
    *,
    as_json: Json = False,
    settings: dict[str, Any],
) -> None:
    """Count what would be trained on, and list every row left out, with its reason."""
    from tsugiki.sources import find_sources

    terminal = Terminal(as_json=as_json)
    settings.setdefault("data", {})["path"] = source
    sources = find_sources(build_config(settings), terminal)

    from tsugiki.looking import check_data

    if not check_data(sources, terminal):
        raise typer.Exit(1)


DATA_SECTIONS = ("data", "model")
data_app.command("show")(with_config_flags(data_show, DATA_SECTIONS))
data_app.command("check")(with_config_flags(data_check, DATA_SECTIONS))


@data_app.command("clean")
def data_clean(
    source: Annotated[Path, typer.Argument(metavar="DATA", help="Aozora Bunko texts")],
    output: Annotated[Path, typer.Option(help="folder for the clean UTF-8 texts")],
    as_json: Json = False,
) -> None:
    """Write Aozora Bunko texts without ruby, notes, header and colophon."""
    from tsugiki.looking import clean_data

    clean_data(source, output, Terminal(as_json=as_json))


@app.command()
def presets(as_json: Json = False) -> None:
    """List the guides' settings that --preset takes."""
    from rich.table import Table

    table = Table("preset", "for", "settings", box=None, pad_edge=False)
    for name, (text, values) in PRESETS.items():
        flat = ", ".join(
            f"{key} {value if isinstance(value, str) else format(value, 'g')}"
            for part in values.values()
            for key, value in part.items()
        )
        table.add_row(name, text, flat)
    Terminal(as_json=as_json).say("presets", table, presets={k: v for k, (_, v) in PRESETS.items()})


app.command("quantize-base")(quantize_base)
app.command("doctor")(doctor)


def main() -> None:
    """Run the CLI; every TsugikiError becomes a message and an exit code, never a traceback."""
    from tsugiki.errors import TsugikiError

    for stream in (sys.stdin, sys.stdout):
        # bytes that are no text, signs that a terminal lacks: shown as ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Read when torch is loaded, here or in the child. Threads that spin while they wait keep the
    # one they wait for off a busy core: a step then takes many times as long (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(prog_name="tsugiki")  # in the child too, which `python -m` started
    except TsugikiError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path that the system refuses: too long, no permission on the way
        place = "" if error.filename is None else f"{str(error.filename)[:80]}: "
        fail(TsugikiError(f"{place}{error.strerror or error}", fix="check the path"))


def fail(error: TsugikiError) -> NoReturn:
    """Print an error, for machines too where --json asks for it, and leave with its code."""
    if error.flags:  # the user's own command, whole
        fix = shlex.join(["tsugiki", *sys.argv[1:], *error.flags])
        error = type(error)(error.problem, got=error.got, allowed=error.allowed, fix=fix)
    sys.stdout.flush()
    if "--json" in sys.argv:
        import json

        shown = {
            "kind": "error",
            "error": type(error).__name__,
            "problem": error.problem,
            "got": None if error.got is None else str(error.got),
            "allowed": None if error.allowed is None else str(error.allowed),
            "fix": error.fix,
        }
        print(json.dumps(shown, ensure_ascii=False))
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
