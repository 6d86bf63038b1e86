"""The adapted layer that a configuration asks for in place of a linear layer."""

from __future__ import annotations

from torch import nn

from ..basis.factorize import Factorization
from ..basis.linears import is_quantized
from ..config import Config, SpectralFTConfig, SSVDConfig
from .activation import SSVDActivationLinear, SSVDActivationQuantizedLinear
from .base import AdaptedLinear
from .quantized import SSVDQuantizedLinear
from .spectralft import SpectralFTLinear
from .ssvd import SSVDLinear

ACTIVATION: dict[type[SSVDLinear], type[SSVDLinear]] = {
    SSVDLinear: SSVDActivationLinear,
    SSVDQuantizedLinear: SSVDActivationQuantizedLinear,
}


def check_method(linear: nn.Linear, config: Config, name: str) -> None:
    """Raises TypeError for a quantised layer that the method of `config` cannot adapt."""
    if isinstance(config, SpectralFTConfig) and is_quantized(linear):
        raise TypeError(
            f"{name} is a quantised {type(linear).__name__}: SpectralFT supports unquantised nn.Linear layers only, "
            "SSVD supports both"
        )


def in_form(kind: type[SSVDLinear], config: SSVDConfig) -> type[SSVDLinear]:
    """`kind` in the form that `config` names."""
    return ACTIVATION.get(kind, kind) if config.form == "activation" else kind


def adapt(linear: nn.Linear, config: Config, factorization: Factorization | None = None) -> AdaptedLinear:
    """The layer of the method that `config` asks for, in place of a plain or (SSVD only) a quantised linear layer."""
    if isinstance(config, SpectralFTConfig):
        return SpectralFTLinear(linear, config, factorization)
    kind = SSVDQuantizedLinear if is_quantized(linear) else SSVDLinear
    return in_form(kind, config)(linear, config, factorization)
