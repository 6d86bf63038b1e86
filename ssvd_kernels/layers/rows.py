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
        self.alike = len(set(places)) == 1
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
            if self.alike:
                return [(place, 0, batch) for place in self.places[:1] if place is not None]
            if rest or not times:
                return None
            runs: Runs = []
            for row, place in enumerate(self.places):
                if runs and runs[-1][::2] == (place, row * times):
                    runs[-1] = (runs[-1][0], runs[-1][1], (row + 1) * times)
                elif place is not None:
                    runs.append((place, row * times, (row + 1) * times))
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
                "adapters of a bank train in forwards of the model that it was made for, not in those of a part of it"
            )
        batch, expected = x.shape[0], self.batch
        flattened = x.ndim == 2 and expected is not None and batch % expected == 0
        runs = self.rows.runs(batch) if expected in (None, batch) or flattened or self.rows.alike else None
        if runs is None:
            raise ValueError(
                f"a layer of shape ({layer.out_features}, {layer.in_features}) must get {len(self.rows.places)} rows, or "
                f"a multiple, in its input's first dimension (the model got {expected}), got an input of shape "
                f"{tuple(x.shape)}: `exclude` that layer, or give all rows the same adapter"
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
