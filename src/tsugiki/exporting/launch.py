"""How to run what was exported: one command for each server. Knows no files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from tsugiki.adapters.portable import DEFAULT_RANK, Verdict, max_rank


def run_gguf(model: Path, modelfile: Path, name: str) -> dict[str, str]:
    """For a model file."""
    word = _q(name.lower())
    return {
        "llama-server": f"llama-server -m {_q(model)} --jinja",
        "Ollama": f"ollama create {word} -f {_q(modelfile)} && ollama run {word}",
    }


def run_lora(adapter: Path) -> dict[str, str]:
    """For an adapter file, beside any quant of its base."""
    return {"llama-server": f"llama-server -m BASE.gguf --lora {_q(adapter)} --jinja"}


def run_portable(
    base: str, folder: Path, name: str, rank: int, verdicts: Sequence[Verdict], export: str
) -> dict[str, str]:
    """For the portable form, where a server takes it; llama.cpp and Ollama take GGUF.

    Args:
        export: the command that writes the adapter, up to the flag that says what as.
    """
    takes = {verdict.reader for verdict in verdicts if verdict.takes}
    lines = {}
    if "vLLM" in takes:
        more = f" --max-lora-rank {max_rank(rank)}" if rank > DEFAULT_RANK else ""
        lines["vLLM"] = (
            f"vllm serve {_q(base)} --enable-lora --lora-modules {_q(f'{name}={folder}')}{more}"
        )
    if "SGLang" in takes:
        lines["SGLang"] = (
            f"python -m sglang.launch_server --model-path {_q(base)} --enable-lora "
            f"--lora-paths {_q(f'{name}={folder}')}"
        )
    lora, model = (folder.with_name(f"{name}-{kind}.gguf") for kind in ("LoRA", "Q8_0"))
    to_run = run_lora(lora) | {
        "Ollama": run_gguf(model, folder.with_name(f"{name}.Modelfile"), name)["Ollama"]
    }
    for server, flags in (
        ("llama-server", f"--gguf-lora --output {_q(lora)}"),
        ("Ollama", f"--gguf q8_0 --output {_q(model)}"),
    ):
        lines[server] = f"{export} {flags} && {to_run[server]}"
    return lines


def _q(text: object) -> str:
    return shlex.quote(str(text))
