"""Runs the Cayley op as one CUDA graph per bucket (batch size, rank, pass): SSVD_CUDA_GRAPHS=1.

The op consists of some fifty small launches. Where a step is limited by the host and not by the GPU, one graph replay
replaces them. Each bucket keeps its inputs, result and scratch memory on the device, about four matrices (B, k, k), so
graphs are opt-in. Inside a user's own graph, and under torch.compile, the op is called directly.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VARIABLE = "SSVD_CUDA_GRAPHS"
Op = Callable[..., Tensor]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    done: torch.cuda.Event  # the output has been read: the next replay, on whatever stream, may overwrite it


_graphs: dict[tuple, _Captured] = {}
_lock = threading.Lock()


def replayed(op: Op, tensors: tuple[Tensor, ...], k: int, variant: Callable[[Tensor], str]) -> Tensor:
    """op(*tensors, k), from a CUDA graph where those are wanted and possible.

    `variant` names what op depends on besides its arguments.
    """
    first = tensors[0]
    if not first.is_cuda or torch.compiler.is_compiling() or os.environ.get(VARIABLE, "0") in ("", "0"):
        return op(*tensors, k)
    if not first.numel() or torch.cuda.is_current_stream_capturing():
        return op(*tensors, k)
    key = (op, k, variant(first), first.device, *((tensor.shape, tensor.dtype) for tensor in tensors))
    with _lock, torch.cuda.device(first.device):
        found = _graphs.get(key)
        if found is None:
            found = _graphs[key] = _capture(op, tensors, k)
        stream = torch.cuda.current_stream()
        stream.wait_event(found.done)
        for kept, tensor in zip(found.inputs, tensors, strict=True):
            kept.copy_(tensor)
        found.graph.replay()
        output = found.output.clone()
        found.done.record(stream)
    return output


def _capture(op: Op, tensors: tuple[Tensor, ...], k: int) -> _Captured:
    inputs = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*inputs, k)  # compiles kernels and makes the library's handles, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = op(*inputs, k)
    return _Captured(graph, inputs, output, torch.cuda.Event())
