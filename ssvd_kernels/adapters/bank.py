"""Many adapters over one base model in one batch: every row with its own adapter.

All adapters of a model share W, U and V; of an adapter a layer needs its core (k, k) alone. So a batch whose rows
belong to different adapters is multiplied as one adapter's is: x V, each row by its own core, and all rows by U^T.

    bank = sk.AdapterBank(model)
    bank.add("alice", "alice.safetensors")
    with bank.rows(["alice", None, "bob"]):  # None: the base model
        model.generate(batch)
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import check_strength
from ..layers.base import AdaptedLinear
from ..layers.rows import Rows, State, watch
from ..layers.ssvd import SSVDAdapter
from ..model.lookup import require_layers, saved_modules, unwrapped
from ..model.rotations import Member, cores_of
from .file_format import read_adapter
from .save_load import adapter_values, write_adapter

Values = Mapping[str, Mapping[str, Tensor]]  # layer -> what an adapter trains, by name


@dataclass
class _Entry:
    """An adapter: where its cores are in the pool, or its Parameters; and the file that it comes from."""

    strength: float
    path: Path | None = None
    slot: int | None = None
    trained: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    users: int = 0  # blocks of `rows` that are running

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.trained.values() for parameter in layer.values()]


class AdapterBank:
    """Adapters by name, in memory and ready for any row of a batch of `model`, which must have SSVD layers.

    memory: bytes that their cores may take; beyond it the ones that were used least recently leave, and come back from
    their files. Those that were added from memory stay. dtype: of the cores, by default that of theta.
    The adapters of the model itself are untouched: they serve calls outside of `rows`. Adapters may be added and
    removed while other threads call the model.
    Raises ValueError for a model without SSVD layers, adapted through PEFT (whose `adapter_names=` does this), merged,
    by SpectralFT, or with `modules_to_save`, which a batch cannot have several of.
    """

    def __init__(self, model: nn.Module, memory: int | None = None, dtype: torch.dtype | None = None) -> None:
        self.layers: dict[str, Any] = _layers(model)
        theta: Any = next(iter(self.layers.values())).theta
        self._device = theta.device
        self._shapes = {name: _core_shape(layer) for name, layer in self.layers.items()}
        self._pool = torch.empty(
            0, sum(map(math.prod, self._shapes.values())), dtype=dtype or theta.dtype, device=self._device
        )
        if memory is not None and memory < self.bytes_per_adapter:
            raise ValueError(f"`memory` must hold one adapter, {self.bytes_per_adapter} bytes, at least, got {memory}")
        self._most = None if memory is None else memory // self.bytes_per_adapter
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the one used least recently first
        self._lock = threading.RLock()
        self._state = State()
        self.present = self._state.present
        for layer in self.layers.values():
            layer.bank = self
        watch(unwrapped(model), self._state)

    # -- what is in the bank -----------------------------------------------------------------------------------

    @property
    def bytes_per_adapter(self) -> int:
        """Of the cores of all layers."""
        return self._pool.shape[1] * self._pool.element_size()

    def names(self) -> list[str]:
        """The adapters, sorted."""
        with self._lock:
            return sorted(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def add(
        self, name: str, source: str | os.PathLike[str] | Values | None = None, strength: float | None = None
    ) -> None:
        """Adds an adapter from a file of `save_adapter`, from its values by layer, or as the model's own is now.

        strength: see `set_strength`; by default the file's, or the model's own. Nothing is factorised. Raises
        ValueError for a name that is taken or no name, and as `add_adapter` does for a file of another base, rank, side
        or rotation, which it names.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"`name` must consist of letters, digits, '_' and '-', got {name!r}")
        if strength is not None:
            strength = check_strength(strength)
        path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        if path is None:
            values = self._own() if source is None else self._checked(source)  # type: ignore[arg-type]
            default = self._own_strength() if source is None else 1.0
        else:
            values, default = self._read(path)
        entry = _Entry(default if strength is None else strength, path)
        with self._lock:
            if name in self._entries:
                raise ValueError(f"`name` must not be taken, got {name!r}: the bank has {', '.join(self.names())}")
            self._fill(entry, values)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Raises ValueError for an unknown adapter, and for one that a running `rows` uses."""
        with self._lock:
            entry = self._entry(name)
            if entry.users:
                raise ValueError(f"`name` must not be in use, got {name!r}: leave its `rows` block first")
            del self._entries[name]

    # -- batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, in this thread, each row of the model's batches has the adapter named for it, None none.

        The first dimension of every adapted layer's input must be the batch; of a multiple of len(names) rows, names
        repeat as by repeat_interleave, which is how `generate` expands a batch to beams. Raises ValueError for unknown
        names, a nested block, merged or disabled layers, and in the forward for an input whose first dimension is no
        such multiple.
        """
        if self._state.rows is not None:
            raise ValueError("`rows` must not be nested in another block of the same bank")
        if isinstance(names, str) or not names:
            raise ValueError(f"`names` must be a list with a name or None for each row, got {names!r}")
        for layer_name, layer in self.layers.items():
            if layer.merged or layer.disabled:
                raise ValueError(f"{layer_name} is merged or disabled: undo that before using `rows`")
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        with self._lock:
            entries = [self._entry(name) for name in distinct]
            for name, entry in zip(distinct, entries):
                entry.users += 1
                self._entries.move_to_end(name)
        try:
            with self._lock:
                for entry in entries:
                    if entry.slot is None and not entry.trained:
                        assert entry.path is not None
                        self._fill(entry, self._read(entry.path)[0])
                trained = [parameter for entry in entries for parameter in entry.parameters()]
                at = dict(zip(distinct, range(len(distinct)) if trained else (entry.slot for entry in entries)))
                numbers = [None if name is None else at[name] for name in names]
                rows = Rows(numbers, self._maker(entries), trained, self._device)
            with self._state.block(rows):
                yield
        finally:
            with self._lock:
                for entry in entries:
                    entry.users -= 1

    # -- training ----------------------------------------------------------------------------------------------

    def trainable(self, names: Sequence[str]) -> list[nn.Parameter]:
        """Makes adapters train, new ones from the base model, and returns their Parameters, for one optimizer over all.

        In `rows` each row's loss then reaches its own adapter alone. With gradients on, call the model itself, not a
        part of it. Raises ValueError for an adapter that a running `rows` uses, and for one that was added from memory,
        whose values are not at hand.
        """
        for name in names:
            with self._lock:
                entry = self._entries.get(name)
                if entry is None:
                    entry = self._entries.setdefault(name, _Entry(1.0))
                    values: Values = {key: layer.new_adapter() for key, layer in self.layers.items()}
                elif entry.trained:
                    continue
                elif entry.users:
                    raise ValueError(f"`names` must not be in use, got {name!r}: leave its `rows` block first")
                elif entry.path is None:
                    raise ValueError(f"the bank has only the cores of {name!r}: add it from a file to train it")
                else:
                    values = self._read(entry.path)[0]
                entry.slot, entry.path = None, None
                entry.trained = {
                    key: {
                        own: nn.Parameter(value.detach().to(self.layers[key].theta, copy=True))
                        for own, value in v.items()
                    }
                    for key, v in values.items()
                }
        return [parameter for name in names for parameter in self._entry(name).parameters()]

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Writes an adapter that trains here to a file, as `save_adapter` does."""
        entry = self._entry(name)
        if not entry.trained:
            raise ValueError(f"`name` must be an adapter that trains in the bank, got {name!r}")
        values = {key: (entry.trained[key], layer.description()) for key, layer in self.layers.items()}
        write_adapter(path, self.layers, values, {}, entry.strength)

    # -- cores -------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"`name` must be one of {', '.join(self.names()) or '(the bank is empty)'}, got {name!r}")
        return self._entries[name]

    def _own(self) -> Values:
        return {name: layer.adapter() for name, layer in self.layers.items()}

    def _own_strength(self) -> float:
        return next(iter(self.layers.values())).strength

    def _checked(self, values: Values) -> Values:
        own = self._own()
        for name, layer in own.items():
            for key, tensor in layer.items():
                given = values.get(name, {}).get(key)
                if given is None or given.shape != tensor.shape or not bool(torch.isfinite(given).all()):
                    found = "none" if given is None else f"shape {tuple(given.shape)}"
                    raise ValueError(
                        f"`source` must have finite {name}.{key} of shape {tuple(tensor.shape)}, got {found}"
                    )
        return values

    def _read(self, path: Path) -> tuple[Values, float]:
        file = read_adapter(path)
        return adapter_values(self.layers, {}, file), file.strength

    @torch.inference_mode(False)  # whose tensors could not be changed outside of it
    @torch.no_grad()
    def _fill(self, entry: _Entry, values: Values) -> None:
        """Computes the cores and puts them into a free slot of the pool."""
        members = []
        for name, layer in self.layers.items():
            own = {key: value.to(layer.sigma.device) for key, value in values[name].items()}
            members.append(Member(layer, own, entry.strength))
        made = cores_of(members)
        entry.slot = self._free_slot()
        torch.cat([core.flatten() for core in made], out=self._pool[entry.slot])

    def _free_slot(self) -> int:
        taken = {entry.slot for entry in self._entries.values()}
        free = next((slot for slot in range(len(self._pool)) if slot not in taken), None)
        if free is not None:
            return free
        size = len(self._pool)
        if self._most is None or size < self._most:
            more = max(1, size) if self._most is None else min(max(1, size), self._most - size)
            self._pool = torch.cat(
                [self._pool, self._pool.new_empty(more, self._pool.shape[1])]
            )  # others may read the old
            return size
        for entry in self._entries.values():
            if entry.slot is not None and entry.path is not None and not entry.users:
                slot, entry.slot = entry.slot, None
                return slot
        raise ValueError(f"`memory` holds {self._most} adapters, all of which are in use or were added from memory")

    def _maker(self, entries: list[_Entry]) -> Callable[[], dict[SSVDAdapter, Tensor]]:
        """What gives each layer's cores (N, k, k) of the entries: views of the pool, or computed from what trains."""
        pool, layers = self._pool, self.layers
        parts = pool.split([math.prod(shape) for shape in self._shapes.values()], dim=1)
        cores = {
            layer: part.view(len(pool), *shape)
            for layer, part, shape in zip(layers.values(), parts, self._shapes.values())
        }
        if not any(entry.trained for entry in entries):
            return lambda: cores  # views of the pool

        def make() -> dict[SSVDAdapter, Tensor]:
            trained = [entry for entry in entries if entry.trained]
            members = [Member(layer, e.trained[name], e.strength) for e in trained for name, layer in layers.items()]
            made = iter(cores_of(members))
            own = [
                dict(zip(layers.values(), made)) if e.trained else {la: c[e.slot] for la, c in cores.items()}
                for e in entries
            ]
            return {layer: torch.stack([each[layer] for each in own]) for layer in layers.values()}

        return make


def _layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    layers = require_layers(model)
    for name, layer in layers.items():
        if not isinstance(layer, SSVDAdapter):
            raise ValueError(f"{name} is adapted by {layer.config_type.method}: a bank holds adapters of SSVD")
        if layer.merged or layer.sharded or layer.bank is not None:
            why = "merged" if layer.merged else "sharded by FSDP2" if layer.sharded else "in another bank"
            raise ValueError(f"`model` must be unmerged, unsharded and in no other bank: {name} is {why}")
    if any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in model.modules()):
        raise ValueError("`model` must have the batch in its layers' first dimension, got attention with time first")
    if saved_modules(model):
        raise ValueError("`model` has modules_to_save, of which a batch cannot have several")
    return layers


def _core_shape(layer: Any) -> tuple[int, ...]:
    return (2, layer.k, layer.k) if layer.kind.form == "activation" and layer.side == "both" else (layer.k, layer.k)
