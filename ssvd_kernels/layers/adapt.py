"""The adapted layer that a configuration asks for in place of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..basis.factorize import Factorization
from ..basis.linears import is_quantized, quantizes_input
from ..basis.pointwise import is_pointwise, is_transposed
from ..config import Config, SpectralFTConfig, SSVDConfig
from .activation import (
    SSVDActivationLinear,
    SSVDActivationQuantizedLinear,
    SSVDPointwise,
    basis_dtype,
    check_sigma,
    divides,
)
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
    if isinstance(config, SSVDConfig):
        in_activation_form(layer, config, name)
    elif is_quantized(layer):
        raise TypeError(
            f"{name} is a quantised {type(layer).__name__}: SpectralFT supports unquantised nn.Linear layers only, "
            "SSVD supports both"
        )
    elif not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is a {type(layer).__name__}: SpectralFT supports nn.Linear layers only")


def in_activation_form(
    layer: nn.Module, config: SSVDConfig, name: str = "`linear`", found: Factorization | None = None
) -> bool:
    """Whether `config` asks for the activation form of `layer`, whose factorisation is `found` if it is known: "auto"
    takes it over a base that rounds its weight alone, unless a sigma is too small. Raises TypeError for a form that
    cannot serve the layer."""
    kind = type(layer).__name__
    if is_pointwise(layer) or is_transposed(layer):
        if config.form == "weight":
            raise TypeError(f"{name} is a {kind}: `form` must be 'activation' or 'auto' for it, got 'weight'")
        return True
    auto = False
    if is_quantized(layer):
        auto = not quantizes_input(layer)
        if config.form == "activation" and not auto:
            raise TypeError(
                f"{name} is a quantised {kind} that rounds its input as well, and with it a small change of the input: "
                "`form` must be 'weight' or 'auto' for it, got 'activation'"
            )
    if config.form != "auto":
        return config.form == "activation"
    return auto and (found is None or divides(found.sigma, _basis_dtype(layer, config, found)))


def check_basis(layer: nn.Module, config: Config, found: Factorization, name: str) -> None:
    """Raises ValueError for singular values that the form of `config` cannot divide by."""
    if isinstance(config, SSVDConfig) and in_activation_form(layer, config, name, found):
        check_sigma(found.sigma, _basis_dtype(layer, config, found), name)


def _basis_dtype(layer: nn.Module, config: SSVDConfig, found: Factorization) -> torch.dtype:
    return basis_dtype(found.sigma, config, layer.get_parameter("weight").dtype, is_quantized(layer))


def in_form(
    kind: type[SSVDLinear], layer: nn.Module, config: SSVDConfig, found: Factorization | None = None
) -> type[SSVDLinear]:
    """`kind`, or its subclass for this layer and the form that `config` asks for."""
    if kind is SSVDLinear and (is_pointwise(layer) or is_transposed(layer)):
        return SSVDPointwise
    activation = isinstance(config, SSVDConfig) and in_activation_form(layer, config, found=found)
    return ACTIVATION.get(kind, kind) if activation else kind


def adapt(layer: Any, config: Config, factorization: Factorization | None = None) -> AdaptedLinear:
    """The adapted layer of the method that `config` asks for."""
    if isinstance(config, SpectralFTConfig):
        return SpectralFTLinear(layer, config, factorization)
    kind = SSVDQuantizedLinear if is_quantized(layer) else SSVDLinear
    return in_form(kind, layer, config, factorization)(layer, config, factorization)
