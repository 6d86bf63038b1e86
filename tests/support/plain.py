"""Adapted models in plain PyTorch: in their own dtype the yardstick of the error bounds, in float64 the exact results.

See bounds.py for the rule. Nothing here computes with the package: the formulas are those of its documentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssvd_kernels.basis.linears import base_weight, is_quantized
from ssvd_kernels.layers.base import AdaptedLinear

Values = dict[str, Tensor]


def update(layer: AdaptedLinear, values: Values) -> Tensor:
    """W' - W (d_out, d_in) of the adapter `values`, in their dtype."""
    U, sigma, V = (t.detach().to(next(iter(values.values()))) for t in (layer.U, layer.sigma, layer.V))
    if "A_out" not in values:
        return U @ core(layer, values) @ V.T
    left, right = U + values["A_out"] @ values["B_out"], V + values["A_in"] @ values["B_in"]
    return left * sigma @ right.T - U * sigma @ V.T


def core(layer: AdaptedLinear, values: Values) -> Tensor:
    """M (k, k) of SSVD and SVFT: W' = W + U M V^T."""
    theta, sigma = values["theta"], layer.sigma.detach().to(values["theta"])
    if layer.rotation == "banded":
        offsets = [sign * distance for sign in (1, -1) for distance in range(1, layer.band + 1)]
        parts = theta.split([layer.k - abs(offset) for offset in offsets])
        return sum((torch.diag(*part) for part in zip(parts, offsets)), torch.diag(values["delta_sigma"]))
    G, shifted = rotation(layer, theta, layer.k_in), torch.diag(sigma + values["delta_sigma"])
    M = G.T @ shifted if layer.side == "output" else shifted @ G
    if layer.side == "both":
        M = rotation(layer, values["theta_out"], layer.k_out).T @ M
    return M - torch.diag(sigma)


def rotation(layer: AdaptedLinear, theta: Tensor, k: int) -> Tensor:
    """G (layer.k, layer.k), which turns the first k directions."""
    eye = torch.eye(k).to(theta)
    if layer.rotation == "free":
        G = eye + theta.view(k, k)
    else:
        i, j = torch.triu_indices(k, k, 1)
        K = torch.zeros_like(eye).index_put((i, j), theta)
        K = K - K.T
        G = eye - 2 * K if layer.rotation == "linear" else torch.linalg.solve(eye + K, eye - K)
    return torch.block_diag(G, torch.eye(layer.k - k).to(theta))


class PlainLinear(nn.Module):
    """x W'^T + b by torch's own functions in `dtype`; W' = W + the adapters' updates, composed in float32 at least."""

    def __init__(self, W: Tensor, bias: Tensor | None, adapters: Iterable[AdaptedLinear], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, wide = dtype, torch.promote_types(dtype, torch.float32)
        self.base_weight, self.bias = W.detach().to(wide), None if bias is None else bias.detach().to(dtype)
        self.adapters, self.values = list(adapters), nn.ModuleList()
        for adapter in self.adapters:
            self.values.append(nn.ParameterDict())
            for key, p in adapter.adapter().items():
                self.values[-1][key] = nn.Parameter(p.detach().to(wide), p.requires_grad)

    @property
    def weight(self) -> Tensor:
        updates = (update(adapter, dict(values)) for adapter, values in zip(self.adapters, self.values))
        return sum(updates, self.base_weight).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> PlainLinear:
        return self  # cast already, and not all of it to `dtype`


def plain(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in `dtype` with a PlainLinear for each layer that is adapted, by PEFT too, or quantised."""
    twin, done = copy.deepcopy(model), "-"
    for name, layer in model.named_modules():
        if hasattr(layer, "ssvd_adapter"):
            found = [layer.ssvd_adapter[each] for each in layer.active_adapters if each in layer.ssvd_adapter]
            W, bias = layer.base_weight, layer.base_layer.bias
        elif isinstance(layer, AdaptedLinear):
            W, bias, found = layer.base_weight, layer.bias, [layer]
        elif isinstance(layer, nn.Linear) and is_quantized(layer):
            W, bias, found = base_weight(layer), layer.bias, []
        else:
            continue
        if not name.startswith(done):  # else a part of the last one
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, PlainLinear(W, bias, found, dtype))
            done = name + "."
    return twin.to(dtype)


def effective(W: Tensor, *adapters: AdaptedLinear, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """W' in plain PyTorch: (in `dtype`, by default that of W, in float64)."""
    both = (PlainLinear(W, None, adapters, of) for of in (dtype or W.dtype, torch.float64))
    return tuple(linear.weight.detach() for linear in both)
