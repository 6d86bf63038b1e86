"""The cores that a root module made for all its layers at the start of a forward: they serve that forward, in its
thread, and the recomputations of its checkpoints, and nothing else."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..ops.triton_linear import ALIGNMENT, core_operand

if TYPE_CHECKING:
    from .ssvd import SSVDAdapter


Cores: TypeAlias = "dict[SSVDAdapter, Tensor]"
Batch: TypeAlias = "tuple[list[SSVDAdapter], Tensor]"  # layers and their cores (B, K, K), zero beyond a layer's rank


class Forward(NamedTuple):
    """A root's forward that is running in this thread."""

    before: dict[SSVDAdapter, Tensor | None]  # what its layers were given by the outer one
    batches: list[Batch]  # of the cores that it gave them
    narrow: dict[tuple[SSVDAdapter, torch.dtype], Tensor]
    caller: FrameType | None  # of the root's hooks; None while torch.compile traces
    outer: Forward | None


class Given(threading.local):
    """The core that a root has made for a layer. A compiled block reads it as an input, whichever layer it is of."""

    def __init__(self) -> None:  # in each thread: torch.compile guards on which attributes there are
        self.core: Tensor | None = None
        self.distance = 0  # frames between the root and whoever asked last whether it is running

    def __reduce__(self) -> tuple[type[Given], tuple[()]]:
        return Given, ()


class Values:
    """The detached cores of a forward, whose graph holds this object until its backward has run.

    It is made before the forward reads the parameters: of two, even in different threads, the newer has newer values.
    """

    def __init__(self) -> None:
        self.cores: dict[SSVDAdapter, Tensor] = {}
        _finished.append(weakref.ref(self, _finished.remove))

    def add(self, cores: dict[SSVDAdapter, Tensor], batch: Tensor) -> None:
        """The `cores` of `batch` (B, k, k)."""
        if batch.grad_fn is not None:
            self.cores.update({layer: core.detach() for layer, core in cores.items()})
            batch.grad_fn.metadata["cores"] = self  # type: ignore[index]


class _Structure:
    """Counts adapters that are made, removed, moved, cast or loaded: roots then look for their layers again."""

    number = 0

    def changed(self) -> None:
        self.number += 1


class _Thread(threading.local):
    def __init__(self) -> None:  # as above
        self.forward: Forward | None = None
        self.distance = 0


thread, structure = _Thread(), _Structure()
_finished: list[weakref.ref[Values]] = []  # of all forwards that may still have a backward, the newest last


def enter(cores: Cores, batches: list[Batch], caller: FrameType | None) -> None:
    """At the start of a root's forward, called with the frame that calls its hooks."""
    while thread.forward is not None and thread.forward.caller is not None and not is_running(thread):
        leave()
    before = {layer: layer.given.core for layer in cores}
    for layer, core in cores.items():
        layer.given.core = core
    thread.forward = Forward(before, batches, {}, caller, thread.forward)


def leave() -> None:
    """At the end of a root's forward."""
    if thread.forward is not None:
        for layer, core in thread.forward.before.items():
            layer.given.core = core
        thread.forward = thread.forward.outer


def is_running(asking: Given | _Thread) -> bool:
    """Whether the newest forward of this thread is: not after a KeyboardInterrupt, after which no hook of it runs.

    `asking` keeps the distance: Python makes an object of each frame on the way to the root's.
    """
    forward = thread.forward
    if forward is None or forward.caller is None:
        return forward is not None
    try:
        if sys._getframe(asking.distance) is forward.caller:
            return True
    except ValueError:  # the stack is not so deep
        pass
    frame: FrameType | None = sys._getframe()
    asking.distance = 0
    while frame is not None and frame is not forward.caller:
        frame, asking.distance = frame.f_back, asking.distance + 1
    return frame is not None


def narrow(layer: SSVDAdapter, core: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`core` as the Triton kernels read it in `dtype`, if the root made it: then all of its batch are, at once."""
    forward = thread.forward
    while forward is not None and layer not in forward.before:  # within another root's
        forward = forward.outer
    if forward is None or layer.given.core is not core:
        return None
    if (layer, dtype) not in forward.narrow:
        layers, batch = next(each for each in forward.batches if layer in each[0])
        made = core_operand(batch.detach(), dtype)
        for place, each in enumerate(layers):
            n = each.k + -each.k % ALIGNMENT
            forward.narrow[each, dtype] = made[place, ..., :n, :n]
    return forward.narrow[layer, dtype]


def recomputed(layer: SSVDAdapter) -> Tensor | None:
    """The core of the newest forward for a checkpoint that recomputes `layer` during the backward; None elsewhere."""
    if torch._C._current_graph_task_id() == -1 or not torch.is_grad_enabled():
        return None
    for ref in reversed(list(_finished)):
        values = ref()
        if values is not None and layer in values.cores:
            return values.cores[layer].detach().requires_grad_()
    return None


def forget(layer: SSVDAdapter) -> None:
    """`layer` computes a core of its own, or has run without gradients: a recomputation must do the same."""
    for ref in list(_finished):
        values = ref()
        if values is not None:
            values.cores.pop(layer, None)


@contextmanager
def unseen_by_checkpoints() -> Iterator[None]:
    """Saves tensors for backward as if no checkpoint were there.

    Non-reentrant checkpointing requires its recomputation to save as many tensors as its forward did, but one of them
    may compute a core where the other finds one.
    """
    if torch.compiler.is_compiling() or not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor):
        yield
