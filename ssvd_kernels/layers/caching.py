"""What an adapter keeps between calls in eval mode with gradients off: its core, and W' where that is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import dispatch, reference
from ..ops.weight_cache import Provenance, WeightCache, capturing

if TYPE_CHECKING:
    from .adapter import Adapter, Factors


class EvalCache:
    """Of one adapter: `update_factors` and a composed W', made anew once anything that they were made from changes."""

    def __init__(self) -> None:
        self.weights = WeightCache()  # in training, too: it serves the backward of a composed forward
        self._factors: tuple[Provenance, Factors] | None = None

    @staticmethod
    def serves(adapter: Adapter) -> bool:
        """Whether a call may use what is kept, and keep what it makes."""
        return not (
            adapter.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(adapter.first_trained) is not nn.Parameter  # functional_call
            or adapter.sharded
            or adapter.first_trained.is_inference()
            or torch._C._are_functorch_transforms_active()
        )

    def holds(self, adapter: Adapter) -> bool:
        """Whether the next forward can use what is kept: then it needs no rotation."""
        kept = self._factors
        return kept is not None and self.serves(adapter) and kept[0].holds(adapter._parameters.values())

    def factors(self, adapter: Adapter) -> Factors:
        """`update_factors`, kept."""
        kept = self._factors
        if kept is None or not kept[0].holds(adapter._parameters.values()):
            made_from = Provenance(adapter._parameters.values(), adapter.adapter().values())
            with torch.inference_mode(False), torch.no_grad():
                kept = made_from, adapter.update_factors()
            if capturing(kept[1][-1]):  # hold their values only after the first replay
                return kept[1]
            self._factors = kept
        if capturing(kept[1][-1]):
            for made in (factor for factor in kept[1] if not isinstance(factor, nn.Parameter)):
                self.weights.pin(made)
        return kept[1]

    def weight(self, adapter: Adapter) -> Tensor:
        """W' in the base weight's dtype, kept."""
        factors, W = self.factors(adapter), adapter.base_weight
        with torch.inference_mode(False), torch.no_grad():
            return self.weights.composed(W, *factors, W.dtype, reference.compose_ref, "nearest")

    def drop_factors(self) -> None:
        """Before a call that may be followed by changes which leave no trace."""
        self._factors = None

    def forget(self) -> None:
        self.drop_factors()
        self.weights.forget()

    def __getstate__(self) -> dict[str, Any]:
        return EvalCache().__dict__


def multiplies_kept_weight(adapter: Adapter, x: Tensor) -> bool:
    """Whether a kept W' serves x: in float32 and float64, where composing loses nothing and T does not matter."""
    W = adapter.base_weight
    if not x.dtype == W.dtype == adapter.sigma.dtype or torch.is_autocast_enabled(x.device.type):
        return False
    if dispatch.backend_for("linear", x.device, x.dtype) != "reference":
        return False
    mode = dispatch.linear_mode(x.dtype, 1, W.shape, adapter.k, adapter.mode, backward=False, compositions=0)
    return mode == "composed"
