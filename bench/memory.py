"""What a forward leaves behind, and what is alive at the peak of a step, counted by storage."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def static_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the unique storages of `tensors`."""
    return sum({storage._cdata: storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)}.values())


def saved_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, held: Iterable[Tensor]) -> tuple[int, int]:
    """(bytes that forward(x) made and that still live after it, bytes of x if it does).

    Whatever the graph saves for backward or the module keeps for it is counted, however it is kept; the output and the
    storages of `held` and x are not. A copy of x goes in as an activation that nobody else holds: it lives on only if
    the forward keeps it.
    """
    made = _Made()
    with made:
        activation = x * 1
        y = forward(activation)
    entry = activation.untyped_storage()
    known = {y.untyped_storage()._cdata, entry._cdata, *(tensor.untyped_storage()._cdata for tensor in held)}
    reference = StorageWeakRef(entry)
    size = entry.nbytes()
    del activation, entry
    gc.collect()
    kept = sum(bytes_ for ref, bytes_ in made.storages.values() if not ref.expired() and ref.cdata not in known)
    return kept, 0 if reference.expired() else size


class _Made(TorchDispatchMode):
    """Remembers, without holding them, the storages of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


class Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, by kind: `live` now, `peak` when there were most of them.

    Counts what is noted, and whatever the operations within it make, by kind_of(result). What an operation allocates
    and frees inside is not seen.
    """

    def __init__(self, kind_of: Callable[[Tensor], str]) -> None:
        super().__init__()
        self.kind_of, self.live, self.peak, self._known = kind_of, Counter[str](), Counter[str](), set[int]()

    def note(self, tensor: Tensor, kind: str) -> None:
        """Counts the storage of `tensor`, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live[kind] += size
        weakref.finalize(storage, self._freed, key, kind, size)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _freed(self, key: int, kind: str, size: int) -> None:
        self._known.remove(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor, self.kind_of(tensor))
        return result
