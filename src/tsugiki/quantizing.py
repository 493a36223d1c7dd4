"""`tsugiki quantize-base`: a base in few bits as a folder that loads in seconds.

Quantised while it is read, written whole or not at all, and read back. Knows no adapters.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tsugiki.flags import Json
from tsugiki.stopping import stoppable, will_write
from tsugiki.terminal import Terminal


def quantize_base(
    model: Annotated[str, typer.Argument(metavar="BASE", help="local folder or Hub name")],
    output: Annotated[Path, typer.Option(help="folder of the quantised base")],
    quantize: Annotated[str, typer.Option("--quantize", help="nf4 or int8")] = "nf4",
    dtype: Annotated[str, typer.Option(help="compute type of what stays as it is")] = "auto",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit on the Hub")] = None,
    as_json: Json = False,
) -> None:
    """Write a base in four or eight bits; --model takes the folder, adapters belong to BASE."""
    with stoppable(f"the quantising of {model}"):
        _quantize(model, output, quantize, dtype, revision, Terminal(as_json=as_json))


def _quantize(
    model: str, output: Path, quantize: str, dtype: str, revision: str | None, terminal: Terminal
) -> None:
    from tsugiki.device import decide
    from tsugiki.errors import UsageError
    from tsugiki.files import human_bytes, refuse_existing
    from tsugiki.models.hub import resolve_model
    from tsugiki.models.load import load_base
    from tsugiki.models.quantized import check_method
    from tsugiki.models.quantized_store import Origin, save_quantized
    from tsugiki.models.shards import open_model
    from tsugiki.models.spec import ModelSpec

    if check_method(quantize) == "none":
        raise UsageError("nothing would be quantised", got="--quantize none", allowed="nf4, int8")
    refuse_existing(output)
    began = time.monotonic()
    resolved = resolve_model(model, revision)
    stored = open_model(resolved.folder)
    spec = ModelSpec.from_folder(resolved.folder)
    decisions = decide("cpu", dtype, hidden_size=spec.hidden_size)
    decisions.apply()
    base = load_base(resolved, dtype=decisions.torch_dtype, quantize=quantize)
    found = base.fingerprint()
    origin = Origin(
        resolved.lasting_name,
        base.commit,
        found.exact,
        found.rounded,
        tuple(stored.tensors),
        quantize,
        decisions.dtype,
    )
    will_write([output])
    size = save_quantized(base.model, origin, resolved.folder, output)
    seconds = time.monotonic() - began
    terminal.say(
        "quantized",
        f"{output}: {quantize}, {human_bytes(size)} of {human_bytes(stored.nbytes)} "
        f"({seconds:.1f} s); use it: tsugiki train my.jsonl --model {output}",
        folder=str(output),
        method=quantize,
        bytes=size,
        of=stored.nbytes,
        seconds=seconds,
    )
