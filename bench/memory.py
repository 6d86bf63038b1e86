"""What a forward leaves behind, counted by storage."""

from __future__ import annotations

import gc
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
