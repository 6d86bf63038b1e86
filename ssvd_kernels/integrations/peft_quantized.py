"""The layer with which PEFT replaces a linear layer quantised by bitsandbytes or torchao."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.quantized import plain_like
from ..ops.functional import add_update
from .peft_layer import SSVDPeftLinear


class SSVDPeftQuantizedLinear(SSVDPeftLinear):
    """y = base(x) + sum of ((x V) core^T) U^T over the active adapters; x (..., d_in) -> y (..., d_out).

    base(x) is computed by the quantisation library; the rest is as in `SSVDQuantizedLinear` and `SSVDPeftLinear`.
    `weight` is W' in the dtype that the library dequantises to. `merge` refuses; PEFT's merge_and_unload leaves an
    nn.Linear that holds W' in `unloaded_dtype`.
    """

    quantized = True
    unloaded_dtype: torch.dtype | None = None  # by default the dequantised weight's

    def forward(self, x: Tensor) -> Tensor:
        if len(self.running) == 1 and not self.running[0].composes:
            return self.running[0].forward(x)
        y = self.base_layer(x)
        updates = [adapter.update(x) for adapter in self.running]
        return add_update(y, sum(updates[1:], updates[0])) if updates else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError if there is something to merge."""
        if self._to_merge(adapter_names):
            raise ValueError(
                f"cannot merge {self.name} in place: its base weight is quantised. Use merge_and_unload(), which "
                "leaves plain layers with weight W', or do not merge"
            )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Linear:
        """What PEFT's unload and merge_and_unload leave here: the base layer, or an nn.Linear that holds W'."""
        names = self._to_merge(adapter_names) if merge else []
        if names:
            # as `base_layer`, because PEFT gives the new module the weight and bias that it finds there
            weight = self._merged_weight(names, self.unloaded_dtype)
            self.base_layer = plain_like(self.base_layer, weight)
        return self.base_layer
