"""Which adapter each row of a batch has, while a model runs: of a thread's own call, and of its checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..ops.reference import Runs

if TYPE_CHECKING:
    from .ssvd import SSVDAdapter

    Cores = dict[SSVDAdapter, Tensor]  # (N, k, k) of each layer


class Rows:
    """places: for each row the index of its core among those of `make`, None for the base model's.

    make: the cores; of adapters that train they are computed for each forward of the model.
    """

    def __init__(self, places: list[int | None], make: Callable[[], Cores], trains: bool) -> None:
        self.places, self.make, self.trains = places, make, trains
        self._made: Cores | None = None
        self._runs: dict[int, Runs] = {}

    def cores(self) -> Cores:
        """Made for each forward that has gradients, and else once."""
        if self.trains and torch.is_grad_enabled():
            return self.make()
        if self._made is None:
            with torch.no_grad():
                self._made = self.make()
        return self._made

    def runs(self, batch: int) -> Runs | None:
        """Of a batch in which each row comes `batch` / len(places) times, one after the other; None for another."""
        if batch not in self._runs:
            times, rest = divmod(batch, len(self.places))
            if rest or not times:
                one = set(self.places) if batch else set()
                if len(one) > 1:
                    return None
                return [(place, 0, batch) for place in one if place is not None]  # all rows are alike
            runs: Runs = []
            for row, place in enumerate(self.places):
                if place is not None:
                    core, start, stop = (
                        runs.pop() if runs and runs[-1][::2] == (place, row * times) else (place, row * times, 0)
                    )
                    runs.append((core, start, (row + 1) * times))
            self._runs[batch] = runs
        return self._runs[batch]


class Pass:
    """One forward of the model, or what is called outside of one."""

    def __init__(self, rows: Rows, batch: int | None) -> None:
        self.rows, self.batch = rows, batch
        self.cores: Cores | None = None
        self.graphless: set[SSVDAdapter] = set()

    def adapted(self, layer: SSVDAdapter, x: Tensor) -> Tensor:
        """What `layer` computes on x (B, ..., d_in)."""
        grad, recomputed = torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1
        if self.rows.trains and grad and self.batch is None:
            raise RuntimeError(
                "adapters of a bank train in forwards of the model that it was made for, and not in those of a part of it"
            )
        if self.batch is not None and x.shape[0] != self.batch and (x.ndim > 2 or x.shape[0] % self.batch):
            runs = self.rows.runs(0 if len(set(self.rows.places)) > 1 else x.shape[0])
        else:
            runs = self.rows.runs(x.shape[0])
        if runs is None:
            raise ValueError(
                f"a layer of shape ({layer.out_features}, {layer.in_features}) must get its rows in the first dimension, "
                f"{len(self.rows.places)} of them or a multiple, in a batch of {self.batch or 'any size'}, got an input of "
                f"shape {tuple(x.shape)}: leave that layer out (`exclude`), or give all rows the same adapter"
            )
        if self.cores is None:
            self.cores = self.rows.cores()
        cores = self.cores[layer]
        if not grad:
            self.graphless.add(layer)  # a reentrant checkpoint, recomputed with a graph
        elif recomputed and self.rows.trains:
            cores = self.rows.make()[layer] if layer in self.graphless else cores.detach().requires_grad_()
        return layer.with_rows(x, cores, runs)


class State(threading.local):
    """Of a thread: the pass that is running, and that which a backward recomputes."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.running: Pass | None = None
        self.resumed: tuple[int, Pass | None] = (-1, None)

    def present(self) -> Pass | None:
        """What a layer that is called now belongs to."""
        if torch.compiler.is_compiling():
            if self.running is not None:
                raise RuntimeError("a compiled model cannot have rows of several adapters: call the original one")
            return None
        task = torch._C._current_graph_task_id()
        if task != -1:
            return self.resumed[1] if self.resumed[0] == task else None
        return self.running

    @contextmanager
    def block(self, rows: Rows) -> Iterator[None]:
        self.rows, self.running = rows, Pass(rows, None)
        try:
            yield
        finally:
            self.rows = self.running = None

    def begin(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model."""
        if self.rows is not None and torch._C._current_graph_task_id() == -1:
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
            first = next(tensors, None)
            if first is not None:
                self.running = Pass(self.rows, first.shape[0])
                self.running.cores = self.rows.cores()  # now, as the layers of a reentrant checkpoint have no gradients

    def end(self, root: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the model."""
        running = self.running
        if self.rows is None or running is None or running.batch is None:
            return output
        self.running = Pass(self.rows, None)
        if not torch.is_grad_enabled():
            return output
        marked = tree_map(lambda leaf: _Mark.apply(leaf, self, running) if _has_graph(leaf) else leaf, output)
        return marked


def _has_graph(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


class _Mark(torch.autograd.Function):
    """The identity, whose backward says which pass the checkpoints below it belong to."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, state: State, running: Pass) -> Tensor:
        ctx.state, ctx.running = state, running
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.state.resumed = torch._C._current_graph_task_id(), ctx.running
        return grad, None, None


def watch(root: nn.Module, state: State) -> None:
    """From now on the forwards of `root` are passes of `state`."""
    root.register_forward_pre_hook(state.begin, with_kwargs=True)
    root.register_forward_hook(state.end)
