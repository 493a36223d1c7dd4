"""What a run tells while it goes; the CLI shows these, nothing calls back. Knows no training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are nats per labelled token."""

    steps: int
    best_step: int
    best_loss: float | None
    first_held_out: float | None
    last_loss: float | None
    adapter: Path
    seconds: float
    tokens: int
    stopped_by: str


@dataclass(frozen=True)
class Logged:
    """One line of the log: mean loss since the last line; seconds, bytes, tokens a second."""

    step: int
    total: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: int
    eta_seconds: float | None
    grad_norms: dict[str, float] | None = None


@dataclass(frozen=True)
class Evaluated:
    """Held-out loss at a step, and whether it is the best so far."""

    step: int
    loss: float
    best: bool


@dataclass(frozen=True)
class Sampled:
    """What the model answers to a fixed prompt at a step."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint."""

    step: int
    path: Path


@dataclass(frozen=True)
class Noted:
    """Something that was decided or done, for the record."""

    text: str


@dataclass(frozen=True)
class Advice:
    """A symptom, and what to change."""

    text: str


@dataclass(frozen=True)
class Proven:
    """How the gradient agrees with fp32's where `what` is int8, and whether that is taken.

    tensors: name → (cosine, norm over fp32's norm); missed: bounds that are not kept.
    """

    step: int
    what: str
    taken: bool
    note: str
    missed: tuple[str, ...]
    tensors: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Resumed:
    """The run goes on from a checkpoint; notes name what was passed over."""

    step: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """The end."""

    result: TrainResult


Event = Logged | Evaluated | Sampled | Saved | Noted | Advice | Proven | Resumed | Finished
