"""What an adapter caches between calls: in eval with gradients off its core and W', for Triton its padded basis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..config import check_choice
from ..ops import dispatch, reference, triton_linear

if TYPE_CHECKING:
    from .adapter import Adapter

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


class Kept(Generic[Tensors]):
    """Tensors that are kept for later calls, on whatever stream of a GPU."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, stream = tensors, stream_of(tensors[0])
        self.after = {stream}  # the streams whose work comes after that which fills the tensors
        self.filled: Any = None if stream is None else torch.cuda.current_stream(tensors[0].device).record_event()

    def read(self) -> Tensors:
        """The tensors; at its first read a stream is made to wait until they are filled."""
        first = self.tensors[0]
        if (number := stream_of(first)) not in self.after and not capturing(first):  # a capture starts when all is done
            stream = torch.cuda.current_stream(first.device)
            stream.wait_event(self.filled)
            for tensor in self.tensors:
                tensor.record_stream(stream)
            self.after.add(number)
        return self.tensors

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.tensors,)  # events cannot be copied


class Made:
    """The factors of one adapter, W' where it was composed, and what they were made from."""

    def __init__(self, adapter: Adapter, factors: tuple[Tensor, ...]) -> None:
        self.owner, self.choices, self.factors = adapter._parameters, (adapter.mode, dispatch.forced), Kept(factors)
        self.sources = [(place, name, place[name], place[name]._version) for place, name in adapter.places()]
        self.values = [(tensor, tensor.detach().clone()) for tensor in adapter.adapter().values() if tensor.is_cpu]
        self.composed: Kept[tuple[Tensor]] | None = None  # W'
        self.weight: Tensor | None = None  # its tensor
        self.dtype: torch.dtype | None = None  # of the x that W' serves, whatever its shape
        self.bias: Tensor | None = None

    def holds(self, adapter: Adapter) -> bool:
        """Whether it was made from the present parameters."""
        if self.owner is not adapter._parameters or self.choices != (adapter.mode, dispatch.forced):
            return False  # replicas of DataParallel share this object
        for place, name, tensor, version in self.sources:
            if place[name] is not tensor or tensor._version != version:
                return False
        for now, value in self.values:
            if not torch.equal(now, value):
                return False
        return True

    def hold(self, weight: Tensor) -> None:
        self.sources.append((self.__dict__, "weight", weight, weight._version))  # callers may write into it
        self.composed, self.weight = Kept((weight,)), weight


class LayerCache:
    """The cache of one adapter. Everything is computed again once its sources change, so dropping it costs only time.

    Sources are compared by identity and version, which .data writes and fused optimizers do not change: on the CPU the
    trained values are compared as well; on a GPU that would stall the stream, so train() and eval() drop the cache.
    `made` is replaced and never emptied: another thread may be reading it.
    """

    def __init__(self) -> None:
        self.made: Made | None = None
        self._operands: dict[tuple[str, torch.dtype], tuple[Tensor, int, Kept[tuple[Tensor]]]] = {}  # source, version
        self._in_graphs: list[object] = []  # what captured CUDA graphs read; `forget` leaves it

    def holds(self, adapter: Adapter) -> bool:
        """Whether something is cached that was made from the present parameters."""
        made = self.made
        return made is not None and made.holds(adapter)

    def serves(self, adapter: Adapter) -> bool:
        """Whether a call may use and fill the cache."""
        return not (
            adapter.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(adapter.first_trained) is not nn.Parameter  # functional_call
            or adapter.sharded
            or "_hf_hook" in adapter.__dict__  # accelerate's: offloaded, so that nothing stays on the device
            or adapter.first_trained.is_inference()
            or torch._C._are_functorch_transforms_active()
        )

    def factors(self, adapter: Adapter) -> tuple[Tensor, ...]:
        """Cached `call_factors`."""
        return self._current(adapter).factors.read()

    def composed(self, adapter: Adapter) -> Tensor:
        """W' in the base weight's dtype."""
        return self._composed(adapter, self._current(adapter))

    def composed_for(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        """W', if a call of `adapter` on x is to use it: in float32 and float64, where composing loses nothing."""
        dtype, device = x.dtype, x.device
        check_choice("mode", adapter.mode, dispatch.MODES)
        if adapter.mode == "factored" or not dtype == adapter.base_weight.dtype == adapter.sigma.dtype:
            return None
        if dtype.itemsize < 4 or torch.is_autocast_enabled(device.type) or not self.serves(adapter):
            return None
        if dispatch.backend_for("linear", device, dtype) != "reference":
            return None
        made = self._current(adapter)
        weight = self._composed(adapter, made)
        if weight is made.weight and weight.is_cpu:
            made.bias, made.dtype = adapter.bias, dtype
        return weight

    def _current(self, adapter: Adapter) -> Made:
        made = self.made
        if made is not None and made.holds(adapter):
            if capturing(adapter.first_trained):
                self._in_graphs.append(made)
            return made
        self.forget()
        with torch.inference_mode(False), torch.no_grad():
            made = Made(adapter, adapter.call_factors())
        if not capturing(adapter.first_trained):  # else it has its values only after the first replay
            self.made = made
        return made

    def _composed(self, adapter: Adapter, made: Made) -> Tensor:
        if made.composed is not None:
            return made.composed.read()[0]
        with torch.inference_mode(False), torch.no_grad():
            U, V, core = made.factors.read()
            weight = reference.compose_ref(adapter.base_weight, U, V, core)
        if not capturing(weight):
            made.hold(weight)
        return weight

    def operand(self, name: str, source: Tensor, dtype: torch.dtype) -> Tensor:
        """U, V or the core, whose `name` it is, as the Triton kernels read it in `dtype`."""
        found = self._operands.get((name, dtype))
        if found is None or found[0] is not source or found[1] != source._version:
            make = triton_linear.core_operand if name == "core" else triton_linear.operand
            made = make(source.detach(), dtype)
            if not capturing(source):
                self._operands[name, dtype] = source, source._version, Kept((made,))
            return made
        if capturing(source):
            self._in_graphs.append(found)
        return found[2].read()[0]

    def forget(self) -> None:
        self.made, self._operands = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return LayerCache().__dict__


def stream_of(tensor: Tensor) -> int | None:
    """The number of the stream on which work on `tensor` is queued; None on the CPU, and while torch.compile traces."""
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return None
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())


def capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is being captured in a CUDA graph rather than done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
