"""The verbs that run under a parent, and what it says of one that the kernel killed for memory.

Imports next to nothing until something is wrong: a guarded verb starts with this. Knows the verbs'
names and the flags that save memory, not their work.
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

from tsugiki import supervise

GUARDED = ("train", "demo", "merge", "export", "verify", "quantize-base")
STREAMED = "--layer-by-layer"
LESS = (
    "--quantize nf4, --gradient-checkpointing always, "
    "--batch-size 1 --gradient-accumulation-steps 16, --lora-r 8, fewer --targets, "
    "a smaller --max-length"
)


def wants_parent(arguments: list[str]) -> bool:
    """Whether this command line may take more memory than there is."""
    return bool(arguments) and arguments[0] in GUARDED and "--help" not in arguments


def watch(arguments: list[str]) -> int:
    """Run a verb in a child; its exit code. Removes what it left half-written if a signal ended it.

    Raises:
        KilledError: by SIGKILL, which nobody but the kernel sends unasked.
    """
    outcome = supervise.supervise(arguments)
    if outcome.code >= 128:
        from tsugiki.files import sweep_left_over

        for path in outcome.told.get("outputs", []):
            with contextlib.suppress(OSError):
                sweep_left_over(Path(path))
    if outcome.killed:
        _explain(arguments, outcome)
    return outcome.code


def _explain(arguments: list[str], outcome: supervise.Outcome) -> None:
    from rich.console import Console

    from tsugiki.errors import KilledError
    from tsugiki.files import human_bytes
    from tsugiki.stopping import what_is_left

    Console().show_cursor()  # a progress bar hides it
    told = outcome.told
    left, rest = what_is_left(map(Path, told.get("outputs", [])))
    work, again = told.get("work"), told.get("again")
    fix = f"end other programs, or take a machine with more memory, then {rest}"
    if again or arguments[0] == "verify":
        command = again or shlex.join(["tsugiki", *arguments])
        fix = f"end other programs, then: {command}" + f" {STREAMED}" * (STREAMED not in arguments)
    elif arguments[0] == "train":
        fix = f"less memory: {LESS}"
        if "run" in told:
            fix += f"; or go on as it was: tsugiki train --resume {told['run']}"
    sure = "was killed by the kernel for memory"
    likely = "was killed (SIGKILL); without a kill by hand this means out of memory"
    raise KilledError(
        f"{work or 'tsugiki ' + arguments[0]} {sure if outcome.out_of_memory else likely}"
        + (f"; {left}" if work else ""),
        got=f"up to {human_bytes(outcome.peak)} held; "
        f"{human_bytes(supervise.memory_left())} free without it",
        fix=fix,
    )
