"""What a run is made of between two steps, as tensors and JSON, and back again.

Trained weights, AdamW's moments, random states, the place in the data, and the counters that
decide what is best. Knows no files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.data.loader import Loader
from tsugiki.training.ranks import Ranks
from tsugiki.training.scaling import LossScale


@dataclass
class Progress:
    """Counters of a run. Losses are nats per labelled token; log_* since the last log line.

    evaluated, sampled, proven: the last step whose held-out loss, samples or proof of int8
    gradients were done. int8_level: which products are int8 (`models/int8.py`).
    scaling: of the loss, used in float16 only.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    segment: int = 0
    evaluated: int = -1
    sampled: int = -1
    first_held_out: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    since_best: int = 0
    last_loss: float | None = None
    log_loss: float = 0.0
    log_labels: int = 0
    proven: int = -1
    int8_level: int = 0
    scaling: LossScale = field(default_factory=LossScale)


def pack(
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    progress: Progress,
    device: str,
    ranks: Ranks,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next step depends on."""
    states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    tensors: dict[str, Tensor] = {}
    for place, state in states.items():
        for rank, one in enumerate(ranks.gather(state)):
            tensors[f"rng.{place}.{rank}"] = one
    for name, parameter in trained.items():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim.{key}.{name}"] = torch.as_tensor(value)
    return tensors, {"progress": asdict(progress), "loader": loader.state_dict()}


def unpack(
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    device: str,
    ranks: Ranks,
) -> Progress:
    """The inverse of `pack`, onto fresh objects of the same run."""
    moments: dict[str, dict[str, Any]] = {}
    for stored, value in tensors.items():
        kind, _, rest = stored.partition(".")
        if kind == "optim":
            key, _, name = rest.partition(".")
            # torch counts steps in a float tensor, bitsandbytes in an int
            counted = value.dim() == 0 and not value.is_floating_point()
            place = trained[name].device
            moments.setdefault(name, {})[key] = int(value) if counted else value.clone().to(place)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"weights.{name}"])
            if name in moments:
                optimizer.state[parameter] = moments[name]
    torch.set_rng_state(tensors[f"rng.cpu.{ranks.rank}"])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(tensors[f"rng.cuda.{ranks.rank}"], device)
    loader.load_state_dict(state["loader"])
    counters = dict(state["progress"])
    scaling = LossScale(**counters.pop("scaling", {}))  # older checkpoints have none
    return Progress(**counters, scaling=scaling)
