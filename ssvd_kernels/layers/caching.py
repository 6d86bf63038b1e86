"""What an adapter caches between calls: in eval with gradients off its core and W', for Triton its basis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import check_choice
from ..ops import dispatch, reference, triton_linear

if TYPE_CHECKING:
    from .adapter import Adapter, Factors


class LayerCache:
    """Of one adapter. Dropping it costs time alone: everything is computed again once its sources change.

    Another tensor or another version of it is noticed. .data writes and fused optimizers leave no such trace: on the
    CPU the values of what trains are compared; on a GPU that would stall the stream, and train() and eval() drop what
    is kept.
    """

    def __init__(self) -> None:
        self.dtype: torch.dtype | None = None  # of the x that W' serves whatever its length
        self.weight: Tensor | None = None  # W'
        self.bias: Tensor | None = None
        self._factors: Factors | None = None
        self._made_from: list[tuple[Mapping[str, Any], str, Tensor, int]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._choices: tuple[object, ...] = ()
        self._owner: object = None
        self._operands: dict[torch.dtype, tuple[tuple[Tensor, int], tuple[Tensor, int], tuple[Tensor, Tensor]]] = {}
        self._in_graphs: list[Tensor] = []

    def holds(self, adapter: Adapter) -> bool:
        """Whether the cache was made from the present parameters."""
        if self._owner is not adapter._parameters or self._choices != (adapter.mode, dispatch.forced):
            return False  # replicas of DataParallel share this object
        for place, name, tensor, version in self._made_from:
            if place[name] is not tensor or tensor._version != version:
                return False
        for now, value in self._values:
            if not torch.equal(now, value):
                return False
        return True

    def serves(self, adapter: Adapter) -> bool:
        """Whether a call may use and fill the cache."""
        return not (
            adapter.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(adapter.first_trained) is not nn.Parameter  # functional_call
            or adapter.sharded
            or adapter.first_trained.is_inference()
            or torch._C._are_functorch_transforms_active()
        )

    def factors(self, adapter: Adapter) -> Factors:
        """`update_factors`."""
        if self._factors is not None and self.holds(adapter):
            for factor in self._factors:
                self._pin(factor)
            return self._factors
        self.forget()
        with torch.inference_mode(False), torch.no_grad():
            factors = adapter.update_factors()
        if not capturing(factors[-1]):  # else it has its values only after the first replay
            trained, places = adapter.adapter().values(), adapter.places()
            self._owner, self._choices = adapter._parameters, (adapter.mode, dispatch.forced)
            self._made_from = [(place, name, place[name], place[name]._version) for place, name in places]
            self._values = [(tensor, tensor.detach().clone()) for tensor in trained if tensor.is_cpu]
            self._factors = factors
        return factors

    def composed(self, adapter: Adapter) -> Tensor:
        """W' in the base weight's dtype."""
        factors = self.factors(adapter)
        if self.weight is None:
            with torch.inference_mode(False), torch.no_grad():
                weight = reference.compose_ref(adapter.base_weight, *factors)
            if capturing(weight):
                return weight
            self.weight = weight
            self._made_from.append((self.__dict__, "weight", weight, weight._version))  # it may be written into
        return self._pin(self.weight)

    def composed_for(self, adapter: Adapter, x: Tensor) -> Tensor | None:
        """W', if a call of `adapter` on x is to use it: in float32 and float64, where composing loses nothing."""
        dtype, device = x.dtype, x.device
        check_choice("mode", adapter.mode, dispatch.MODES)
        if adapter.mode == "factored" or not dtype == adapter.base_weight.dtype == adapter.sigma.dtype:
            return None
        if dtype.itemsize < 4 or torch.is_autocast_enabled(device.type) or not self.serves(adapter):
            return None
        if dispatch.linear_backend(device, dtype) != "reference":
            return None
        weight = self.composed(adapter)
        self.dtype, self.bias = None if weight is not self.weight or weight.is_cuda else dtype, adapter.bias
        return weight

    def operands(self, U: Tensor, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and V as the Triton kernels read them in `dtype`."""
        kept = self._operands.get(dtype)
        if kept is None or any(now is not old or now._version != version for now, (old, version) in zip((U, V), kept)):
            made = triton_linear.operand(U.detach(), dtype), triton_linear.operand(V.detach(), dtype)
            if capturing(made[0]):
                return made
            kept = self._operands[dtype] = (U, U._version), (V, V._version), made
        return self._pin(kept[2][0]), self._pin(kept[2][1])

    def forget(self) -> None:
        graphs = self._in_graphs
        self.__init__()  # type: ignore[misc]
        self._in_graphs = graphs

    def _pin(self, tensor: Tensor) -> Tensor:
        """`tensor`, which lives on whatever is forgotten if a CUDA graph is being captured, whose replays read it."""
        if capturing(tensor):
            self._in_graphs.append(tensor)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return LayerCache().__dict__


def capturing(tensor: Tensor) -> bool:
    """Whether work on `tensor` is being captured in a CUDA graph rather than done."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
