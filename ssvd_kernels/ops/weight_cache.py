"""What a layer keeps between calls to save time and memory: its composed weight, and what its backward needs of x.

None of it is state. Dropping a workspace costs a composition; results never depend on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 16  # columns

Compose = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]


class _Kept(NamedTuple):
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


class Workspace:
    """One layer's. `save_input`: the backward keeps x itself, which other layers read too, instead of z = x V."""

    def __init__(self) -> None:
        self.save_input = False
        self.inputs: SharedInputs | None = None  # of the forward that is running
        self._kept: _Kept | None = None
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
        kept = _Kept(key, (U, V), core.detach(), core._version, make(weight, U, V, core.detach(), dtype))
        if core.requires_grad or not capturing(core):  # in a graph: for the backward that follows there
            self._kept = kept  # at once: replicas of a layer may share a workspace between threads
        return kept.weight

    def forget(self) -> None:
        """Frees W' and the operands, but for what CUDA graphs read."""
        self._kept = None
        self._operands = {}

    def __getstate__(self) -> dict[str, Any]:
        return Workspace().__dict__

    def _find(self, key: tuple, core: Tensor) -> _Kept | None:
        kept = self._kept
        if kept is None or kept.key != key or kept.version != kept.core._version:
            return None
        same = kept.core.data_ptr() == core.data_ptr() and kept.version == core._version
        # by value only where no device must be waited for
        return kept if same or (core.is_cpu and torch.equal(kept.core, core)) else None


class _Reading:
    """One x: the bytes a token of it takes, and of all the z = x V made from it."""

    def __init__(self, x: Tensor) -> None:
        self.x = weakref.ref(x)
        self.of_x, self.of_z = x.shape[-1] * x.element_size(), 0
        self.readers: list[Workspace] = []


class SharedInputs:
    """Which layers read one and the same x during a forward of the root. Its graph holds it until its backward ran."""

    def __init__(self) -> None:
        self._latest: dict[int, _Reading] = {}  # by id, which is used again once an x is gone
        self._readings: list[_Reading] = []

    def note(self, x: Tensor, workspace: Workspace, k: int, dtype: torch.dtype) -> None:
        """A layer of rank k that computes in `dtype` reads x."""
        reading = self._latest.get(id(x))
        if reading is None or reading.x() is not x:
            reading = self._latest[id(x)] = _Reading(x)
            self._readings.append(reading)
        reading.readers.append(workspace)
        reading.of_z += k * dtype.itemsize
        workspace.inputs = self

    def choices(self) -> dict[Workspace, bool]:
        """Whether each layer should keep x: where it is no larger than the z of all who read it."""
        found: dict[Workspace, bool] = {}
        for reading in self._readings:
            for workspace in reading.readers:
                found[workspace] = found.get(workspace, True) and reading.of_x <= reading.of_z
        return found


class InputSharing:
    """Of a root module: lets the layers of the next forward keep min(sum of k, d_in) numbers a token of each x.

    The choice changes only while no earlier forward waits for its backward: non-reentrant checkpointing wants its
    recomputation to save the shapes that its forward saved.
    """

    def __init__(self) -> None:
        self._running: SharedInputs | None = None
        self._choices: dict[Workspace, bool] = {}
        self._graphs: list[weakref.ref[SharedInputs]] = []

    def begin(self) -> SharedInputs:
        """At the start of a forward."""
        self._graphs = [graph for graph in self._graphs if graph() is not None]
        if not self._graphs:
            for workspace, save_input in self._choices.items():
                workspace.save_input = save_input
        self._running = SharedInputs()
        return self._running

    def end(self) -> None:
        """At its end."""
        inputs, self._running = self._running, None
        choices = {} if inputs is None else inputs.choices()
        if inputs is not None and choices:
            self._choices = choices
            self._graphs.append(weakref.ref(inputs))
            for workspace in choices:
                workspace.inputs = None

    def __getstate__(self) -> dict[str, Any]:
        return InputSharing().__dict__  # a copy has layers of its own


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
