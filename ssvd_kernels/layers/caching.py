"""What an adapter caches between calls: in eval with gradients off its core and W', for Triton its padded basis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import check_choice
from ..ops import dispatch, reference, triton_linear

if TYPE_CHECKING:
    from .adapter import Adapter, Factors


class Made:
    """The factors of one adapter, W' where it was composed, and what they were made from."""

    def __init__(self, adapter: Adapter, factors: Factors) -> None:
        self.owner, self.choices, self.factors = adapter._parameters, (adapter.mode, dispatch.forced), factors
        self.sources = [(place, name, place[name], place[name]._version) for place, name in adapter.places()]
        self.values = [(tensor, tensor.detach().clone()) for tensor in adapter.adapter().values() if tensor.is_cpu]
        self.weight: Tensor | None = None  # W'
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
        self.weight = weight


class LayerCache:
    """The cache of one adapter. Everything is computed again once its sources change, so dropping it costs only time.

    Sources are compared by identity and version, which .data writes and fused optimizers do not change: on the CPU the
    trained values are compared as well; on a GPU that would stall the stream, so train() and eval() drop the cache.
    `made` is replaced and never emptied: another thread may be reading it.
    """

    def __init__(self) -> None:
        self.made: Made | None = None
        self._operands: dict[torch.dtype, tuple[tuple[Tensor, int], tuple[Tensor, int], tuple[Tensor, Tensor]]] = {}
        self._in_graphs: list[object] = []  # what captured CUDA graphs read; `forget` leaves it

    def holds(self, adapter: Adapter) -> bool:
        """Whether something is cached that was made from the present parameters."""
        return self.made is not None and self.made.holds(adapter)

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

    def factors(self, adapter: Adapter) -> Factors:
        """Cached `update_factors`."""
        return self._current(adapter).factors

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
            if capturing(made.factors[-1]):
                self._in_graphs.append(made)
            return made
        self.forget()
        with torch.inference_mode(False), torch.no_grad():
            made = Made(adapter, adapter.update_factors())
        if not capturing(made.factors[-1]):  # else it has its values only after the first replay
            self.made = made
        return made

    def _composed(self, adapter: Adapter, made: Made) -> Tensor:
        weight = made.weight
        if weight is None:
            with torch.inference_mode(False), torch.no_grad():
                weight = reference.compose_ref(adapter.base_weight, *made.factors)
            if not capturing(weight):
                made.hold(weight)
        return weight

    def operands(self, U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and V as the Triton kernels read them in `dtype`."""
        found = self._operands.get(dtype)
        sources = (U, U._version), (V, V._version)
        if found is None or any(now is not old or n != m for (now, n), (old, m) in zip(sources, found)):
            made = triton_linear.operand(U.detach(), dtype), triton_linear.operand(V.detach(), dtype)
            if not capturing(made[0]):
                self._operands[dtype] = *sources, made
            return made
        if capturing(found[2][0]):
            self._in_graphs.append(found)
        return found[2]

    def forget(self) -> None:
        self.made, self._operands = None, {}

    def __getstate__(self) -> dict[str, Any]:
        return LayerCache().__dict__


def capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is being captured in a CUDA graph rather than done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
