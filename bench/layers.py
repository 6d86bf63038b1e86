"""A layer in plain PyTorch, as anybody would write it, and the random data that every version of it is given.

W = U_r diag(sigma_r) V_r^T exactly, r = min(d_in, d_out), so that every version has its factors without an SVD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis.factorize import Factorization, fingerprint, sketch
from ssvd_kernels.config import Form
from ssvd_kernels.layers.adapt import adapt
from ssvd_kernels.ops import reference


def cayley_by_solve(theta: Tensor, k: int) -> Tensor:
    """E = -2 (I + K)^-1 K by torch.linalg.solve; theta (..., m). On the CPU one matrix at a time: see reference.py."""
    if theta.ndim > 1 and theta.device.type == "cpu":
        return torch.stack([cayley_by_solve(row, k) for row in theta])
    K = reference.skew(theta, k)
    return -2 * torch.linalg.solve(torch.eye(k, dtype=K.dtype, device=K.device) + K, K)


def naive(x: Tensor, core: Tensor, weight: Tensor, bias: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """y = x W^T + ((x V) core^T) U^T + b."""
    return F.linear(x, weight, bias) + F.linear(F.linear(F.linear(x, V.mT), core.to(x.dtype)), U)


class Factors(NamedTuple):
    """A frozen weight (d_out, d_in), its factors, and a rotation and shift to adapt it by; theta (m,), delta (k,)."""

    weight: Tensor
    bias: Tensor
    U_r: Tensor
    V_r: Tensor
    sigma_r: Tensor
    theta: Tensor
    delta: Tensor

    @classmethod
    def draw(cls, dtype: torch.dtype, d_in: int, d_out: int, k: int, device: torch.device) -> Factors:
        """weight and bias in `dtype`, the rest in float32."""
        U_r, V_r, sigma_r = _triplets(d_in, d_out, device)
        weight, bias = (U_r * sigma_r) @ V_r.mT, _normal(device, d_out)
        theta = 0.15 / k**0.5 * _normal(device, k * (k - 1) // 2)  # ||K||_2 about 0.3
        rest = (U_r, V_r, sigma_r, theta, 0.02 * _normal(device, k))
        return cls(weight.to(dtype), bias.to(dtype), *(tensor.float() for tensor in rest))

    @property
    def k(self) -> int:
        return len(self.delta)

    def top(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (d_out, k), sigma (k,), V (d_in, k)."""
        U, sigma, V = (t[..., : self.k].contiguous() for t in (self.U_r, self.sigma_r, self.V_r))
        return U, sigma, V

    def factorization(self) -> Factorization:
        """What `factorize` would find."""
        U, sigma, V = self.top()
        return Factorization(U, sigma, V, fingerprint(self.weight), 0.0, sketch(U, V))

    def clone(self) -> Factors:
        """The same values in storages of their own."""
        return Factors(*(tensor.clone() for tensor in self))


class Problem(NamedTuple):
    """A layer's data: x (T, d_in) and dy (T, d_out) in `dtype`, and its factors, the weight in `base`."""

    x: Tensor
    dy: Tensor
    factors: Factors

    @classmethod
    def draw(
        cls,
        dtype: torch.dtype,
        T: int,
        d_in: int,
        d_out: int,
        k: int,
        device: torch.device,
        base: torch.dtype | None = None,
    ) -> Problem:
        factors = Factors.draw(base or dtype, d_in, d_out, k, device)
        return cls(_normal(device, T, d_in).to(dtype), _normal(device, T, d_out).to(dtype), factors)


@lru_cache(maxsize=2)  # the cases of one shape follow each other
def _triplets(d_in: int, d_out: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    r = min(d_in, d_out)
    U_r, V_r = (torch.linalg.qr(_normal(device, d, r))[0] for d in (d_out, d_in))
    return U_r, V_r, torch.linspace(2, 0.1, r, device=device, dtype=torch.float64)


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float64)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class NaiveLayer(nn.Module):
    """y = x W^T + ((x V) core^T) U^T + b with core = diag(delta) + diag(sigma + delta) E, under autograd."""

    def __init__(self, f: Factors) -> None:
        super().__init__()
        U, sigma, V = f.top()
        self.weight, self.bias, self.sigma = frozen(f.weight), frozen(f.bias), frozen(sigma)
        self.U, self.V = frozen(U.to(f.weight.dtype)), frozen(V.to(f.weight.dtype))
        self.theta, self.delta = nn.Parameter(f.theta.clone()), nn.Parameter(f.delta.clone())

    def forward(self, x: Tensor) -> Tensor:
        E = cayley_by_solve(self.theta, len(self.sigma))
        core = torch.diag(self.delta) + (self.sigma + self.delta)[:, None] * E
        return naive(x, core, self.weight, self.bias, self.U, self.V)


class RebuiltLayer(nn.Module):
    """y = x W'^T + b with W' = U_r (Sigma + dSigma) G V_r^T rebuilt at full rank within autograd, G padded by I."""

    def __init__(self, f: Factors) -> None:
        super().__init__()
        dtype = f.weight.dtype
        self.bias, self.sigma = frozen(f.bias), frozen(f.sigma_r)
        self.U, self.V = frozen(f.U_r.to(dtype)), frozen(f.V_r.to(dtype))
        self.theta, self.delta = nn.Parameter(f.theta.clone()), nn.Parameter(f.delta.clone())

    def forward(self, x: Tensor) -> Tensor:
        k, r = len(self.delta), len(self.sigma)
        E = F.pad(cayley_by_solve(self.theta, k), (0, r - k, 0, r - k))
        G = E + torch.eye(r, dtype=E.dtype, device=E.device)
        scale = self.sigma + F.pad(self.delta, (0, r - k))
        return F.linear(x, (self.U * scale.to(x.dtype)) @ (G.to(x.dtype) @ self.V.mT), self.bias)


def linear(f: Factors, trained: bool = False) -> nn.Linear:
    """nn.Linear whose weight is frozen or trained; the bias is frozen, as in every version."""
    module = nn.Linear(f.weight.shape[1], f.weight.shape[0], device="meta")
    module.weight, module.bias = nn.Parameter(f.weight, requires_grad=trained), frozen(f.bias)
    return module


def ssvd_layer(f: Factors, form: Form = "weight") -> sk.SSVDLinear:
    """This package's layer, made from the known factors."""
    return adapted(adapt(linear(f), sk.SSVDConfig(rank=f.k, form=form), f.factorization()), f)  # type: ignore[arg-type]


@torch.no_grad()
def adapted(layer: sk.SSVDLinear, f: Factors) -> sk.SSVDLinear:
    """`layer` after some training."""
    layer.theta.copy_(f.theta)
    layer.delta_sigma.copy_(f.delta)
    return layer


COUNTERPARTS: dict[str, Callable[[Factors], nn.Module]] = {
    "frozen linear": linear,
    "full fine-tuning": lambda f: linear(f, trained=True),
    "naive": NaiveLayer,
    "rebuilt weight": RebuiltLayer,
}
CAPTURABLE = ("frozen linear", "full fine-tuning")  # torch.linalg.solve waits for the device
