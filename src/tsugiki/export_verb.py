"""The verb `tsugiki export`: its flags. Knows nothing of how files are written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tsugiki.errors import UsageError
from tsugiki.flags import Accept, EvalData, Json, Model, NoVerify, Untie
from tsugiki.stopping import stoppable, verify_command
from tsugiki.terminal import Terminal


def export(
    source: Annotated[str, typer.Argument(help="an adapter, run or model folder, or FILE.gguf")],
    gguf: Annotated[
        list[str] | None,
        typer.Option(help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q3_k_m, q2_k; repeatable"),
    ] = None,
    gguf_lora: Annotated[
        bool, typer.Option("--gguf-lora", help="the adapter alone, for llama.cpp --lora")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="the adapter for PEFT, vLLM, SGLang alike")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="folder, or a name ending in .gguf")] = None,
    model: Model = None,
    untie: Untie = False,
    accept_base: Accept = False,
    eval_data: EvalData = None,
    no_verify: NoVerify = False,
    as_json: Json = False,
) -> None:
    """Write a model or an adapter for llama.cpp, Ollama, vLLM or SGLang, and prove it.

    Exit code 0: proven equal, or --no-verify. 1: an error, or not what it was made of. 3: written,
    and not proven whole: disk or memory do not suffice for it, or llama.cpp is not installed.
    """
    chosen = [bool(gguf), gguf_lora, portable]
    if sum(chosen) != 1:
        raise UsageError(
            "say what to export to" if not any(chosen) else "one kind of export at a time",
            allowed="--gguf TYPE, --gguf-lora, --portable",
            fix=f"tsugiki export {source} --gguf f16",
        )
    terminal = Terminal(as_json=as_json)
    how: dict[str, Any] = {"model": model, "accept_base": accept_base}
    with stoppable("the export"):
        from tsugiki import shipping

        if portable:
            paths = [shipping.export_portable(source, output, terminal, **how)]
        else:
            if gguf:
                done = shipping.export_gguf(
                    source, gguf, output, terminal, untie=untie, eval_data=eval_data, **how
                )
            else:
                done = [shipping.export_lora(source, output, terminal, **how)]
            paths = [one.path for one in done]
        if no_verify:
            return
        what = ", ".join(str(path) for path in paths)
        candidate = f"BASE.gguf+{paths[0]}" if gguf_lora else paths[0]
        later = verify_command(source, candidate, model, accept_base)
        with stoppable(f"the proof of {what}", later):
            from tsugiki import proving

            if portable:
                proof = proving.prove_portable(source, paths[0], terminal, **how)
            else:
                proof = proving.prove(source, done, terminal, **how)
    raise typer.Exit(proof.value)
