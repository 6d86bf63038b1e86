"""What a layer caches between calls to save time and memory: its composed weight, and what its backward needs of x.

None of it is state. Dropping a cache costs one composition; results never depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 16  # columns

Compose = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


class _Cached(NamedTuple):
    key: tuple  # rounding, dtype and the frozen tensors
    factors: tuple[Tensor, Tensor]  # U and V, whose addresses are in the key: nothing else may get them meanwhile
    core: Tensor
    version: int  # of core
    weight: Tensor  # W'


class Provenance:
    """What a kept tensor was made from: every parameter's place and version, and the values of those that train.

    .data writes, half() and fused optimizers leave no trace in a version: on the CPU the values are compared; on the
    GPU that would stall the stream.
    """

    def __init__(self, parameters: Iterable[Tensor | None], trained: Iterable[Tensor]) -> None:
        self.versions = _versions(parameters)
        self.values = [(tensor, tensor.detach().clone()) for tensor in trained if tensor.is_cpu]

    def holds(self, parameters: Iterable[Tensor | None]) -> bool:
        """Whether `parameters` are still what they were."""
        if self.versions != _versions(parameters):
            return False
        return all(torch.equal(tensor, value) for tensor, value in self.values)


def _versions(parameters: Iterable[Tensor | None]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor._version) for tensor in parameters if tensor is not None]


class WeightCache:
    """One layer's. `save_input`: the backward keeps x itself, which other layers read too, instead of z = x V."""

    def __init__(self) -> None:
        self.save_input = False
        self.inputs: object | None = None  # what the running forward's layers read, kept alive for its backward
        self._cached: _Cached | None = None
        self._operands: dict[str, tuple[tuple, Tensor]] = {}
        self._in_graphs: dict[int, Tensor] = {}

    def pin(self, tensor: Tensor) -> Tensor:
        """`tensor`, which lives on whatever is forgotten if a CUDA graph is being captured, as its replays read it."""
        if capturing(tensor):
            self._in_graphs[id(tensor)] = tensor
        return tensor

    def operand(self, name: str, basis: Tensor, dtype: torch.dtype) -> Tensor:
        """U or V (d, k) in `dtype` and `padded`, kept under `name` while the basis is unchanged."""
        if not _plain(basis):
            return padded(basis.to(dtype))
        key, kept = (dtype, basis.device, basis.data_ptr(), basis._version), self._operands.get(name)
        if kept is None or kept[0] != key:
            kept = (key, padded(basis.detach().to(dtype)))
            if capturing(basis):  # holds its values only after the first replay
                return kept[1]
            self._operands[name] = kept
        return self.pin(kept[1])

    def composed(
        self, weight: Tensor, U: Tensor, V: Tensor, core: Tensor, dtype: torch.dtype, make: Compose, rounding: str
    ) -> Tensor:
        """W' = weight + U core V^T in `dtype`: the kept one if it was made from these very values with the same
        `rounding`, else a new one by `make`."""
        if not _plain(weight, U, V, core):
            return make(weight, U, V, core, dtype)
        key = (rounding, dtype, *((t.device, t.data_ptr(), t._version) for t in (weight, U, V)))
        kept = self._find(key, core)
        if kept is not None:
            return self.pin(kept.weight)
        kept = _Cached(key, (U, V), core.detach(), core._version, make(weight, U, V, core.detach(), dtype))
        if core.requires_grad or not capturing(core):  # in a graph: for the backward that follows there
            self._cached = kept  # at once: replicas of a layer may share a weight_cache between threads
        return kept.weight

    def forget(self) -> None:
        """Frees W' and the operands, but for what CUDA graphs read."""
        self._cached = None
        self._operands = {}

    def __getstate__(self) -> dict[str, Any]:
        return WeightCache().__dict__

    def _find(self, key: tuple, core: Tensor) -> _Cached | None:
        kept = self._cached
        if kept is None or kept.key != key or kept.version != kept.core._version:
            return None
        same = kept.core.data_ptr() == core.data_ptr() and kept.version == core._version
        # by value only where no device must be waited for
        return kept if same or (core.is_cpu and torch.equal(kept.core, core)) else None


def capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is being captured in a CUDA graph rather than done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def padded(matrix: Tensor, both: bool = False) -> Tensor:
    """`matrix` with columns (`both`: and rows) of zeros up to a multiple of ALIGNMENT, which changes no product.

    Rows of 409 half-precision numbers, say, cannot be read in wide loads.
    """
    extra = [-n % ALIGNMENT for n in matrix.shape]
    return F.pad(matrix, (0, extra[1], 0, extra[0] if both else 0)) if any(extra[1:] + extra[: int(both)]) else matrix


def _plain(*tensors: Tensor) -> bool:
    """Whether the tensors have an address and a version: not wrapped, traced, or made in inference mode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in tensors)
