"""Streams of a GPU that need not be here: finds what one reads before another has written it, or after it is freed.

Everything runs on the CPU, in order; vector clocks say what the queues, events and waits of a GPU would order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssvd_kernels.layers import caching

Clock = dict[int, int]  # operations of each stream that come before


class Stream:
    def __init__(self, number: int) -> None:
        self.number, self.clock = number, Clock({number: 0})
        self.waits = 0

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, event: Clock) -> None:
        self.waits += 1
        self.clock = {n: max(self.clock.get(n, 0), event.get(n, 0)) for n in self.clock | event}


class FakeStreams(TorchDispatchMode):
    """As long as it is active, operations are queued on the stream of the innermost `on(number)`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.streams = [Stream(number) for number in range(3)]
        self.current = self.streams[0]
        self.written: dict[int, tuple[Tensor, int, int]] = {}  # storage -> what keeps it, stream and time
        self.recorded: set[tuple[int, int]] = set()  # storages that are not freed before a stream is done with them
        self.faults: list[str] = []
        patch.setattr(caching, "stream_of", lambda tensor: self.current.number, raising=False)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(Tensor, "record_stream", lambda tensor, s: self.recorded.add((storage(tensor), s.number)))

    @contextmanager
    def on(self, number: int) -> Iterator[Stream]:
        before, self.current = self.current, self.streams[number]
        yield self.current
        self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten.equal.default:  # values are compared on the CPU alone
            return result
        stream = self.current
        stream.clock[stream.number] += 1
        for tensor in tensors((args, kwargs)):
            _, writer, time = self.written.get(storage(tensor), (tensor, stream.number, 0))
            if stream.clock.get(writer, 0) < time:
                self.faults.append(f"{func} reads on stream {stream.number} what {writer} has yet to write")
            elif writer != stream.number and (storage(tensor), stream.number) not in self.recorded:
                self.faults.append(f"{func} reads on stream {stream.number} what {writer} may free")
        for tensor in tensors(result):
            self.written[storage(tensor)] = tensor, stream.number, stream.clock[stream.number]
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
