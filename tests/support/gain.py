"""How much of an adapter's update arrives at the output of a layer that computes in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

GAIN = 0.02  # promised: the projection of the realised update on the true one is 1 within this


def gain(realised: Tensor, true: Tensor) -> float:
    """Projection of the realised update on the true one."""
    return float((realised.double() * true.double()).sum() / true.double().square().sum())


def train(layer: nn.Module, kappa: float, seed: int = 0) -> None:
    """Gives `layer` an adapter that changes W by a share of kappa: for SSVD about ||K||_2 = kappa."""
    generator = torch.Generator().manual_seed(seed)
    scales = {"theta": 1 / (2 * layer.k**0.5), "B_in": layer.in_features**-0.5, "B_out": layer.out_features**-0.5}
    if getattr(layer, "band", None) is not None:
        scales = {name: float(layer.sigma.mean()) for name in ("theta", "delta_sigma")}
    with torch.no_grad():
        for name, parameter in layer.adapter().items():
            scale = kappa * scales.get(name, 0.0 if name == "delta_sigma" else 1.0)
            if not name.startswith("A"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def output_gain(
    layer: Callable[[Tensor], Tensor], base: Callable[[Tensor], Tensor], update: Tensor, kappa: float
) -> float:
    """Of `layer` over `base`, whose weights differ by `update` (d_out, d_in), in bfloat16."""
    # stochastic rounding's noise is 16 times the update at 1e-4: of so many outputs its mean deviates by 0.004
    tokens = max(4096, math.ceil(16e6 * (1e-4 / kappa) ** 2 / update.shape[0]))
    x = torch.randn(tokens, update.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    y, plain = layer(x).detach(), base(x).detach()
    assert y.dtype == plain.dtype == torch.bfloat16
    return gain(y.double() - plain.double(), x.double() @ update.double().mT)
