"""Many adapters on one base for inference, each row of a batch with its own.

The layers hold a list of terms by index and no names; the pool keeps name → index. The engine
sets `pool.batch` before each forward; it belongs to this pool, so two engines never meet. Knows no
sampling and no requests.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from tsugiki.adapters.attach import refuse_attached
from tsugiki.adapters.storage import AdapterInfo, BaseIdentity, read_adapter
from tsugiki.adapters.targets import head_path
from tsugiki.errors import AdapterError
from tsugiki.kernels.batch import ForwardBatch
from tsugiki.kernels.linear import LoraTerm, grouped_linear
from tsugiki.models.projections import frozen_weight


class Cell:
    """The batch of the forward that is running, shared by the layers of one pool."""

    def __init__(self) -> None:
        self.batch: ForwardBatch | None = None


class PooledLinear(nn.Module):
    """A projection on which several adapters may have a term, chosen by the batch."""

    def __init__(self, base: nn.Module, cell: Cell) -> None:
        super().__init__()
        self.base = base
        self.cell = cell
        self.terms: list[LoraTerm | None] = []

    @property
    def weight(self) -> Tensor:
        """The frozen weight as stored; some architectures read its dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x (1, T, in) → (1, T, out)."""
        batch = self.cell.batch
        if batch is None or batch.adapters is None or max(batch.adapters) < 0:
            return grouped_linear(x, [frozen_weight(self.base)], [])[0]
        adapters = [[term] for term in self.terms]
        return grouped_linear(x, [frozen_weight(self.base)], adapters, batch)[0]


class AdapterPool:
    """Adapters loaded beside one base, by name."""

    def __init__(self, model: nn.Module, base: BaseIdentity | None = None) -> None:
        refuse_attached(model)
        self.model = model
        self.base = base
        self.cell = Cell()
        self._index: dict[str, int] = {}
        self._size = 0
        self._layers: dict[str, PooledLinear] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in the order of loading."""
        return tuple(self._index)

    def index(self, name: str) -> int:
        """The number that a `ForwardBatch` uses for this adapter.

        Raises:
            AdapterError: no adapter of that name is loaded.
        """
        if name not in self._index:
            raise AdapterError(
                f"no adapter named {name!r} is loaded",
                allowed=", ".join(self._index) or "none is loaded",
            )
        return self._index[name]

    def load(self, folder: Path | str, name: str, *, accept_base: bool = False) -> AdapterInfo:
        """Read an adapter, check it against the base, and make it available.

        Raises:
            AdapterError: whatever keeps it from being this base's; the name is taken; it adapts
                the output head, which sees only some positions of a batch.
        """
        if name in self._index:
            raise AdapterError(f"an adapter named {name!r} is loaded already")
        read = read_adapter(Path(folder), self._plain_modules(), self.base, accept_base=accept_base)
        head = head_path(self.model)
        if head in read.pairs:
            raise AdapterError(
                f"{folder} adapts the output head ({head}), which cannot be done beside others",
                fix="tsugiki.load_adapter puts it on a model alone",
            )
        device = next(self.model.parameters()).device
        for path in read.pairs:
            if path not in self._layers:
                layer = PooledLinear(self.model.get_submodule(path), self.cell)
                layer.terms = [None] * self._size
                self.model.set_submodule(path, layer)
                self._layers[path] = layer
        dtype = next(self.model.parameters()).dtype
        for path, layer in self._layers.items():
            pair = read.pairs.get(path)
            layer.terms.append(
                None
                if pair is None
                else LoraTerm(
                    pair[0].to(device, dtype), pair[1].to(device, dtype), read.scales[path]
                )
            )
        self._index[name] = self._size
        self._size += 1
        return read.info

    def unload(self, name: str) -> None:
        """Forget an adapter; its tensors are freed. Other indexes stay as they are."""
        gone = self.index(name)
        for layer in self._layers.values():
            layer.terms[gone] = None
        del self._index[name]

    def _plain_modules(self) -> dict[str, nn.Module]:
        """The module tree as it was before the pool."""
        found: dict[str, nn.Module] = {}
        inside: tuple[str, ...] = ()
        for path, module in self.model.named_modules():
            if isinstance(module, PooledLinear):
                found[path] = module.base
                inside = (*inside, f"{path}.")
            elif not path.startswith(inside):
                found[path] = module
        return found
