"""Quantised base layers: bitsandbytes' Linear4bit and Linear8bitLt, and nn.Linear with a torchao weight.

The quantisation library still computes the base product. SSVD factorises the dequantised weight and adds its update in
factored form, so the quantised weight is never modified.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..basis.linears import base_weight, is_bitsandbytes, is_quantized, share_hooks
from ..ops.functional import add_update
from .base import AdaptedLinear
from .base_layer import OTHER_WEIGHT, REMEDY, BaseLayer
from .ssvd import SSVDLinear

logger = logging.getLogger(__name__)


def prevent_repacking(model: nn.Module) -> None:
    """From now on bitsandbytes leaves the 4-bit weights of `model` as they are, adapted or not.

    On a CPU with AVX512-BF16 a forward in eval mode would repack them in place: that rounds them, and from then on they
    cannot be dequantised and pass no gradient to their input, not even in training mode.
    """
    for module in model.modules():
        if is_bitsandbytes(module, "Linear4bit"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that holds `weight`, and `bias` in its dtype."""
    d_out, d_in = weight.shape
    linear = nn.Linear(d_in, d_out, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return linear


def plain_like(base: nn.Linear, weight: Tensor) -> nn.Linear:
    """`plain_linear` with the bias, mode and hooks of `base`."""
    linear = plain_linear(weight, base.bias).train(base.training)
    share_hooks(base, linear)
    return linear


def forget_quantization(model: nn.Module) -> None:
    """After unloading: a transformers model that holds no quantised layer any more is saved as a plain one."""
    left = [name for name, module in model.named_modules() if is_quantized(module)]
    if left:
        logger.warning(
            "%d layers are still quantised, e.g. %s, while others are now plain layers with weight W': the model runs, "
            "but transformers may be unable to load it once saved",
            len(left),
            left[0],
        )
    elif (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


class QuantizedBase(BaseLayer):
    """A layer quantised by bitsandbytes or torchao, the adapted layer's submodule `base`."""

    def read(self, linear: nn.Linear) -> Tensor:
        if not is_quantized(linear):
            raise TypeError(
                f"`linear` must be a layer quantised by bitsandbytes or torchao, got {type(linear).__name__}"
            )
        return base_weight(linear)

    def attach(self, layer: AdaptedLinear, linear: nn.Linear) -> None:
        layer.base = linear.requires_grad_(False)
        prevent_repacking(linear)

    def weight(self, layer: AdaptedLinear) -> Tensor:
        """Dequantised anew."""
        return base_weight(self.original(layer))

    def bias(self, layer: AdaptedLinear) -> nn.Parameter | None:
        return self.original(layer).bias

    def original(self, layer: AdaptedLinear) -> nn.Linear:
        return layer.base  # type: ignore[return-value]

    def unloaded(self, layer: AdaptedLinear, weight: Tensor) -> nn.Linear:
        """A new one, and the bias in its dtype."""
        return plain_like(self.original(layer), weight)

    def merge_refusal(self, name: str) -> str | None:
        return (
            f"cannot merge {name} in place: its base weight is quantised. Use merge(model, unload=True), which "
            "leaves plain layers with weight W', or do not merge"
        )

    def load_refusal(self, layer: AdaptedLinear, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """The base itself is loaded by its library."""
        loaded = state_dict.get(f"{prefix}base.weight")
        if loaded is None or _same(loaded, self.original(layer).weight):
            return None
        return f"{prefix}base.weight {OTHER_WEIGHT}: {REMEDY}"


class SSVDQuantizedLinear(SSVDLinear):
    """SSVDLinear on a quantised layer: y = base(x) + ((x V) core^T) U^T; W' = dequantised W + U core V^T.

    The quantisation library computes base(x) and its part of dx; the update is computed in x's dtype (autocast's, where
    that is on). U, sigma and V are those of the dequantised weight. The quantised layer is the submodule `base`, whose
    entries of the state dict are as its library writes them ("base.weight", ...). Reading `weight` dequantises. Over
    bases that do not quantise x as well, form="auto" makes it an `SSVDActivationQuantizedLinear`.

    It does not merge: rounding W' to the quantised grid would lose the update. `merge(model, unload=True)` leaves a
    plain nn.Linear that holds W' in `unloaded_dtype`. Raises as `SSVDLinear` and `base_weight` do.
    """

    base: nn.Linear
    base_layer = QuantizedBase()
    quantized = True
    composes = False
    unloaded_dtype: torch.dtype | None = None  # by default what the library dequantises to

    def adapted(self, x: Tensor) -> Tensor:
        return add_update(self.fixed(x), self.update(x))

    def fixed(self, x: Tensor) -> Tensor:
        return self.base(x)

    def frozen(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        own: dict[str, Any] = self._parameters
        return None, own["U"], own["V"], None

    def composed_for_merge(
        self, name: str = "weight", rounding: str = "nearest", unload: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        return super().composed_for_merge(name, rounding, unload, dtype or self.unloaded_dtype)


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor.data for tensor in (a, b))
    return a.shape == b.shape and torch.equal(a.to(b.device), b)
