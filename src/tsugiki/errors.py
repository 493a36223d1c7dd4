"""Typed errors for users: what was got, what is allowed, the one thing to do.

Knows nothing of any stage. A bug of ours is an `assert`; everything a user can
cause is a `TsugikiError`, which the CLI prints without a traceback.

    TsugikiError
    ├── UsageError          flags, YAML keys, values out of range          (exit 2)
    ├── DataError           files and rows that cannot be trained on
    ├── ModelError          base models: folder, tokenizer, architecture
    │   └── HubError        reaching or reading the model hub
    ├── AdapterError        adapter folders, targets, wrong base
    ├── RunError            run folders, locks, checkpoints, resume
    ├── DiskError           too little space, no permission
    ├── NonFiniteError      NaN or inf in loss or gradients
    ├── MemoryLimitError    the machine's or device's memory does not suffice
    │   └── KilledError     the kernel killed the process for it                (exit 137)
    └── Interrupted         stopped by a signal; the run is saved           (exit 128 + signal)
"""

from __future__ import annotations

import shlex


class TsugikiError(Exception):
    """An error that a user can mend.

    Args:
        problem: one sentence; names the file, line, tensor or flag it is about.
        got: what was found, if it helps.
        allowed: what would have been accepted.
        fix: the one thing to do, best as a command that can be pasted.
        flags: what is missing in the command that was typed; the CLI shows it whole.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        got: object = None,
        allowed: object = None,
        fix: str | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.problem = problem
        self.got = got
        self.allowed = allowed
        self.flags = flags
        if flags and fix is None:
            fix = f"add {shlex.join(flags)}"
        self.fix = fix
        lines = [problem]
        if got is not None:
            lines.append(f"  got:     {got}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed}")
        if fix is not None:
            lines.append(f"  fix:     {fix}")
        super().__init__("\n".join(lines))


class UsageError(TsugikiError):
    """A flag, a config key or a value that is not accepted."""

    exit_code = 2


class DataError(TsugikiError):
    """A file or rows that cannot be trained on."""


class ModelError(TsugikiError):
    """A base model that cannot be used: folder, tokenizer, weights, architecture."""


class HubError(ModelError):
    """The model hub: no network, not found, gated, cut connection."""


class AdapterError(TsugikiError):
    """An adapter folder, its targets, or a base it does not belong to."""


class RunError(TsugikiError):
    """A run folder: lock, checkpoint, resume with something changed."""


class DiskError(TsugikiError):
    """Too little space, or no permission to write."""


class NonFiniteError(TsugikiError):
    """NaN or inf in the loss or a gradient; the weights were not touched."""


class MemoryLimitError(TsugikiError):
    """Out of memory, seen before or after it happened."""


class KilledError(MemoryLimitError):
    """The kernel killed the process that did the work; told by its parent."""

    exit_code = 137


class Interrupted(TsugikiError):
    """Stopped by a signal after everything was saved; `exit_code` is 128 + its number."""

    def __init__(self, problem: str, signal: int, fix: str) -> None:
        super().__init__(problem, fix=fix)
        self.exit_code = 128 + signal


def ran_out(error: BaseException) -> bool:
    """Whether memory was asked for in vain: of Python, of numpy, or of torch, which says so."""
    said = str(error)
    told = "can't allocate memory" in said or "out of memory" in said
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and told)


def did_you_mean(word: str, choices: list[str] | tuple[str, ...]) -> str | None:
    """The choice nearest to a misspelt word, or None."""
    import difflib

    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return near[0] if near else None
