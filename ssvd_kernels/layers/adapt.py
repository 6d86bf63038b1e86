"""The adapted layer that a configuration asks for in place of a linear layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..basis.factorize import Factorization
from ..basis.linears import is_quantized
from ..basis.pointwise import is_pointwise, is_transposed
from ..config import Config, SpectralFTConfig, SSVDConfig
from .activation import SSVDActivationLinear, SSVDActivationQuantizedLinear, SSVDPointwise
from .base import AdaptedLinear
from .quantized import SSVDQuantizedLinear
from .spectralft import SpectralFTLinear
from .ssvd import SSVDLinear

ACTIVATION: dict[type[SSVDLinear], type[SSVDLinear]] = {
    SSVDLinear: SSVDActivationLinear,
    SSVDQuantizedLinear: SSVDActivationQuantizedLinear,
}


def check_method(layer: nn.Module, config: Config, name: str) -> None:
    """Raises TypeError for a layer that the method or the form of `config` cannot adapt."""
    kind = type(layer).__name__
    if isinstance(config, SpectralFTConfig) and is_quantized(layer):
        raise TypeError(
            f"{name} is a quantised {kind}: SpectralFT supports unquantised nn.Linear layers only, SSVD supports both"
        )
    if not isinstance(layer, nn.Linear):
        if isinstance(config, SpectralFTConfig):
            raise TypeError(f"{name} is a {kind}: SpectralFT supports nn.Linear layers only")
        if config.form == "weight":
            raise TypeError(f"{name} is a {kind}: `form` must be 'activation' or 'auto' for it, got 'weight'")


def in_form(kind: type[SSVDLinear], layer: nn.Module, config: SSVDConfig) -> type[SSVDLinear]:
    """`kind`, or its subclass for this layer and the form that `config` names."""
    if kind is SSVDLinear and (is_pointwise(layer) or is_transposed(layer)):
        return SSVDPointwise
    return ACTIVATION.get(kind, kind) if config.form == "activation" else kind


def adapt(layer: Any, config: Config, factorization: Factorization | None = None) -> AdaptedLinear:
    """The adapted layer of the method that `config` asks for."""
    if isinstance(config, SpectralFTConfig):
        return SpectralFTLinear(layer, config, factorization)
    kind = SSVDQuantizedLinear if is_quantized(layer) else SSVDLinear
    return in_form(kind, layer, config)(layer, config, factorization)
