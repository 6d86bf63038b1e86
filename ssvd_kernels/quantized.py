"""Quantised base layers: bitsandbytes' Linear4bit and Linear8bitLt, and nn.Linear with a torchao weight.

Their library goes on making the base product. SSVD factorises the dequantised weight and adds its update in factored
form, so that the quantised numbers are never rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .base_layers import base_weight, is_bitsandbytes, is_quantized
from .config import SSVDConfig
from .factorize import Factorization
from .functional import ssvd_update
from .layers import SSVDLinear


def adapt(linear: nn.Linear, config: SSVDConfig, factorization: Factorization | None = None) -> SSVDLinear:
    """The SSVD layer for a plain or quantised linear layer."""
    return (SSVDQuantizedLinear if is_quantized(linear) else SSVDLinear)(linear, config, factorization)


class SSVDQuantizedLinear(SSVDLinear):
    """SSVDLinear on a quantised layer: y = base(x) + ((x V) core^T) U^T; W' = dequantised W + U core V^T.

    base(x) and its part of dx are the quantising library's; the update is computed in x's dtype (autocast's, where
    that is on). U, sigma and V are those of the dequantised weight. The quantised layer is the submodule `base`, whose
    entries of the state dict are as its library writes them ("base.weight", ...). Reading `weight` dequantises.

    It does not merge: rounding W' to the quantised grid would lose the update. `merge(model, unload=True)` leaves a
    plain nn.Linear that holds W' in the dtype its library dequantises to. Raises as `SSVDLinear` and `base_weight` do.
    """

    base: nn.Linear

    def __init__(self, linear: nn.Linear, config: SSVDConfig, factorization: Factorization | None = None) -> None:
        super().__init__(linear, config, factorization)
        self.train(linear.training)

    @staticmethod
    def _weight_of(linear: nn.Linear) -> Tensor:
        if not is_quantized(linear):
            raise TypeError(
                f"linear is a {type(linear).__name__}: allowed is one that bitsandbytes or torchao quantised"
            )
        return base_weight(linear)

    def _hold(self, linear: nn.Linear) -> None:
        self.base = linear.requires_grad_(False)

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight W (d_out, d_in), dequantised anew."""
        return base_weight(self.base)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The base layer's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.mode not in ("auto", "factored"):
            raise ValueError(f"mode={self.mode!r} cannot serve a quantised layer: allowed are 'auto' and 'factored'")
        y = self.base(x)
        if self.disabled:
            return y
        return y + ssvd_update(x, self.U, self.V, self._core_for(x), workspace=self._workspace).to(y.dtype)

    def composed_for_merge(self, name: str = "weight", rounding: str = "nearest", unload: bool = False) -> Tensor:
        """W' for `merge(model, unload=True)`; else a ValueError."""
        if not unload:
            raise ValueError(
                f"merging {name}: its base weight is quantised, and W' is not: allowed is merge(model, unload=True), "
                "which leaves plain layers that hold W', or no merging"
            )
        return super().composed_for_merge(name, rounding)

    def unloaded(self, weight: Tensor) -> nn.Linear:
        """A new nn.Linear with W', and the base's bias in its dtype."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(weight.dtype), requires_grad=False)
        return linear.train(self.training)

    def original(self) -> nn.Linear:
        """The quantised layer that this one was made from."""
        return self.base.train(self.training)

    def train(self, mode: bool = True) -> SSVDQuantizedLinear:
        super().train(mode)
        if is_bitsandbytes(self.base, "Linear4bit"):
            # its forward in eval mode would, on a CPU with AVX512-BF16, repack the weight in place: rounded, never to
            # be dequantised or trained through again
            self.base.train()
        return self

    def _share_parameters(self) -> None:
        """Nothing to do: the base layer is a submodule."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses another base weight, as the plain layer does; the base itself is loaded by its library."""
        loaded = state_dict.get(f"{prefix}base.weight")
        if loaded is not None and not _same(loaded, self.base.weight):
            args[-1].append(
                f"{prefix}base.weight differs from the base weight whose singular vectors this layer holds: load base "
                "weights before inject"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor.data for tensor in (a, b))
    return a.shape == b.shape and torch.equal(a.to(b.device), b)
