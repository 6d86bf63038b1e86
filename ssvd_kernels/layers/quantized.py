"""Quantised base layers: bitsandbytes' Linear4bit and Linear8bitLt, and nn.Linear with a torchao weight.

The quantisation library still computes the base product. SSVD factorises the dequantised weight and adds its update in
factored form, so the quantised weight is never modified.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..basis.factorize import Factorization
from ..basis.linears import base_weight, is_bitsandbytes, is_quantized
from ..config import Config, SpectralFTConfig
from ..ops.functional import ssvd_update
from .base import AdaptedLinear
from .spectralft import SpectralFTLinear
from .ssvd import SSVDLinear

logger = logging.getLogger(__name__)


def check_method(linear: nn.Linear, config: Config, name: str) -> None:
    """Raises TypeError for a quantised layer that the method of `config` cannot adapt."""
    if isinstance(config, SpectralFTConfig) and is_quantized(linear):
        raise TypeError(
            f"{name} is a quantised {type(linear).__name__}: SpectralFT supports unquantised nn.Linear layers only, "
            "SSVD both"
        )


def adapt(linear: nn.Linear, config: Config, factorization: Factorization | None = None) -> AdaptedLinear:
    """The layer of the method that `config` asks for, in place of a plain or (SSVD only) a quantised linear layer."""
    if isinstance(config, SpectralFTConfig):
        return SpectralFTLinear(linear, config, factorization)
    return (SSVDQuantizedLinear if is_quantized(linear) else SSVDLinear)(linear, config, factorization)


def prevent_repacking(model: nn.Module) -> None:
    """From now on bitsandbytes leaves the 4-bit weights of `model` as they are, adapted or not.

    On a CPU with AVX512-BF16 a forward in eval mode would repack them in place: rounded, never to be dequantised again,
    and passing no gradient to their input from then on, not in training mode either.
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


class SSVDQuantizedLinear(SSVDLinear):
    """SSVDLinear on a quantised layer: y = base(x) + ((x V) core^T) U^T; W' = dequantised W + U core V^T.

    base(x) and its part of dx are the quantising library's; the update is computed in x's dtype (autocast's, where
    that is on). U, sigma and V are those of the dequantised weight. The quantised layer is the submodule `base`, whose
    entries of the state dict are as its library writes them ("base.weight", ...). Reading `weight` dequantises.

    It does not merge: rounding W' to the quantised grid would lose the update. `merge(model, unload=True)` leaves a
    plain nn.Linear that holds W' in `unloaded_dtype`. Raises as `SSVDLinear` and `base_weight` do.
    """

    base: nn.Linear
    unloaded_dtype: torch.dtype | None = None  # by default what the library dequantises to

    @staticmethod
    def _weight_of(linear: nn.Linear) -> Tensor:
        if not is_quantized(linear):
            raise TypeError(
                f"`linear` must be a layer quantised by bitsandbytes or torchao, got {type(linear).__name__}"
            )
        return base_weight(linear)

    def _hold(self, linear: nn.Linear) -> None:
        self.base = linear.requires_grad_(False)
        prevent_repacking(linear)

    @property
    def base_weight(self) -> Tensor:
        """The pretrained weight W (d_out, d_in), dequantised anew."""
        return base_weight(self.base)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The base layer's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.disabled else y + self.update(x).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        """((x V) core^T) U^T (..., d_out), in x's dtype or autocast's."""
        if self.mode not in ("auto", "factored"):
            raise ValueError(f"`mode` must be 'auto' or 'factored' for a quantised layer, got {self.mode!r}")
        return ssvd_update(x, self.U, self.V, self._core_for(x), weight_cache=self._weight_cache)

    def composed_for_merge(
        self, name: str = "weight", rounding: str = "nearest", unload: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """W' for `merge(model, unload=True)`; else a ValueError."""
        if not unload:
            raise ValueError(
                f"cannot merge {name} in place: its base weight is quantised. Use merge(model, unload=True), which "
                "leaves plain layers with weight W', or do not merge"
            )
        return super().composed_for_merge(name, rounding, unload, dtype or self.unloaded_dtype)

    def unloaded(self, weight: Tensor) -> nn.Linear:
        """A new nn.Linear with W', and the base's bias in its dtype."""
        return plain_linear(weight, self.bias).train(self.training)

    def original(self) -> nn.Linear:
        """The quantised layer that this one was made from."""
        return self.base

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
