"""Which adapter each row of a batch has, while a model runs: of a thread's own call, and of its checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..ops import dispatch
from ..ops.functional import compute_dtype
from ..ops.places import Places

if TYPE_CHECKING:
    from .ssvd import SSVDAdapter

    Cores = dict[SSVDAdapter, Tensor]  # (N, k, k) of each layer

COMPILED = "a compiled model cannot have rows of several adapters: call the original one"


class Rows:
    """numbers: for each row that of its core among those of `make`, None for the base model's.

    make: the cores; with gradients, of adapters that train, they are computed for each forward of the model.
    trained: the Parameters that they are made from, if they change.
    """

    def __init__(
        self, numbers: list[int | None], make: Callable[[], Cores], trained: Sequence[Tensor], device: torch.device
    ) -> None:
        self.make, self.trained, self.trains = make, trained, bool(trained)
        self.alike = len(set(numbers)) == 1
        self.places = Places(numbers[:1] if self.alike else numbers, device)
        self.varied = 2 * len(self.places.groups) > len(self.places)
        self.batch = 0  # of the first call: rows that finish early must not leave it
        self._made: Cores = {}
        self._version = -1
        self._by_row: dict[tuple[SSVDAdapter, torch.dtype], Tensor] = {}

    def cores(self) -> Cores:
        """Made for each forward that has gradients, and else anew once an optimizer has changed what trains."""
        if self.trains and torch.is_grad_enabled():
            return self.make()
        version = sum(parameter._version for parameter in self.trained)
        if version != self._version:
            with torch.inference_mode(False), torch.no_grad():
                self._made, self._version = self.make(), version
        return self._made

    def by_row(self, layer: SSVDAdapter, cores: Tensor, dtype: torch.dtype) -> Tensor:
        """The core of each row (R, ...), which is copied once for many calls."""
        if (layer, dtype) not in self._by_row:
            with torch.inference_mode(False), torch.no_grad():
                self._by_row[layer, dtype] = self.places.by_row(cores).to(dtype)
        return self._by_row[layer, dtype]


class Pass:
    """One forward of the model, or what is called outside of one."""

    def __init__(self, rows: Rows, batch: int | None) -> None:
        self.rows, self.batch = rows, batch
        self.cores: Cores | None = None
        self.graphless: set[SSVDAdapter] = set()

    def adapted(self, layer: Any, x: Tensor) -> Tensor:
        """What `layer` computes on x (B, ..., d_in)."""
        rows, places = self.rows, self.rows.places
        if not places.groups:
            return layer.fixed(x)
        grad, recomputed = torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1
        if rows.trains and grad and self.batch is None:
            raise RuntimeError(
                "adapters of a bank train in forwards of the model that it was made for, not in those of a part of it"
            )
        if not rows.alike:
            self._check(layer, x)
        if self.cores is None:
            self.cores = rows.cores()
        cores = self.cores[layer]
        if not grad:
            self.graphless.add(layer)  # a reentrant checkpoint, recomputed with a graph
        elif recomputed and rows.trains:
            cores = rows.make()[layer] if layer in self.graphless else cores.detach().requires_grad_()
        dtype = compute_dtype(x)
        if rows.varied and not rows.trains and dispatch.linear_backend(x.device, dtype, dispatch.forced) != "triton":
            return layer.with_rows(x, rows.by_row(layer, cores, dtype), None)  # one product for all rows
        return layer.with_rows(x, cores, places)

    def _check(self, layer: Any, x: Tensor) -> None:
        """Raises ValueError unless the first dimension of x (B, ..., d_in) or (B T, d_in) has the rows of the batch."""
        entries, rows = x.shape[0], self.rows
        batch, count = self.batch or entries, len(rows.places)
        rows.batch = rows.batch or batch
        whole = entries == batch or (x.ndim == 2 and entries % batch == 0)
        if not whole or not batch or batch % count or batch % rows.batch:
            name = next(name for name, each in layer.bank.layers.items() if each is layer)
            raise ValueError(
                f"{name} must get the {count} rows that were named, or a multiple, in its input's first dimension, as "
                f"many as before ({rows.batch}) or a multiple, and as many as the model ({batch}), got an input of "
                f"shape {tuple(x.shape)}. If the layer is made for something else than the batch, `exclude` it from "
                "`inject`; generate() must not drop rows, as Whisper's does with long or repeated recordings: give it "
                "at most 30 s and one temperature"
            )


class State(threading.local):
    """Of a thread: the pass that is running, and that which a backward recomputes."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.running: Pass | None = None
        self.resumed: tuple[int, Pass | None] = (-1, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return State, ()  # a copy of the model has no bank

    def present(self) -> Pass | None:
        """What a layer that is called now belongs to."""
        if torch.compiler.is_compiling():
            if self.rows is not None:
                raise RuntimeError(COMPILED)
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
        if self.rows is None:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        if torch._C._current_graph_task_id() == -1:
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1)
            first = next(tensors, None)  # not positions (T,)
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
