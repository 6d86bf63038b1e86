"""SpectralFTLinear: a frozen nn.Linear with low-rank updates of its top singular vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis.factorize import Factorization
from ..config import SpectralFTConfig
from ..ops import reference
from ..ops.functional import add_update, compute_dtype, product
from .adapter import Factors
from .base import AdaptedLinear


class SpectralFTLinear(AdaptedLinear):
    """Drop-in for nn.Linear: y = x W'^T + b; x (..., d_in) -> y (..., d_out), with

        W' = (U_p + A_out B_out) Sigma_p (V_p + A_in B_in)^T + (W - U_p Sigma_p V_p^T)
           = W + P Q^T,   P = [(U_p + A_out B_out) Sigma_p B_in^T, A_out],   Q = [A_in, V_p Sigma_p B_out^T]

    Trains     A_out (d_out, r), B_out (r, p), A_in (d_in, r), B_in (r, p): r (d_out + d_in + 2 p) in all. A is uniform
               in +-1/sqrt(r) (nn.Linear's own initialisation of an (n, r) weight, from torch's generator), B zero
    Frozen     U (d_out, p), sigma (p,), V (d_in, p); base weight and bias as in `SSVDLinear`

    P and Q have 2 r columns: in training y = x W^T + (x Q) P^T + b, two skinny products, and W' is never built; in eval
    with gradients off a composed W' is cached, as by `SSVDLinear`. Before training P Q^T is exactly zero and the output
    bit-identical to the base layer's. dtypes, casting and caching are those of `SSVDLinear`. Any shape with
    p <= min(d_in, d_out). Raises as `SpectralFTConfig` and `factorize` do, and TypeError for anything but an nn.Linear.
    Source: SpectralFT, arXiv 2501.03829, with the residual W - U_p Sigma_p V_p^T: without it W' would not start at W.
    """

    config_type = SpectralFTConfig
    trained_names = ("A_out", "B_out", "A_in", "B_in")

    A_out: nn.Parameter
    B_out: nn.Parameter
    A_in: nn.Parameter
    B_in: nn.Parameter

    def __init__(self, linear: nn.Linear, config: SpectralFTConfig, factorization: Factorization | None = None) -> None:
        super().__init__(linear, config, factorization)
        self.rank = config.rank
        for name, parameter in self.new_adapter().items():
            self.register_parameter(name, parameter)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SpectralFTConfig) -> SpectralFTLinear:
        """Factorises `linear` and adapts it as `config` says; see the class."""
        return cls(linear, config)

    def update_factors(self) -> Factors:
        P, Q = self._low_rank()
        return P, Q, torch.eye(2 * self.rank, dtype=P.dtype, device=P.device)

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """P (d_out, 2 r) and Q (d_in, 2 r), in float32 at least."""
        wide = torch.promote_types(self.A_out.dtype, torch.float32)
        A_out, B_out, A_in, B_in, U, sigma, V = (
            getattr(self, name).to(wide) for name in (*self.trained_names, "U", "sigma", "V")
        )
        with reference.without_autocast(U):
            inner, outer = sigma.unsqueeze(1) * B_in.mT, sigma.unsqueeze(1) * B_out.mT
            P = torch.cat([product(U, inner) + product(A_out, product(B_out, inner)), A_out], dim=1)
            P = P if self.strength == 1 else self.strength * P
            return P, torch.cat([A_in, product(V, outer)], dim=1)

    @torch.no_grad()
    def orthonormal_factors(self) -> Factors:
        """In float64: P = U R, Q = V S, and core = R S^T."""
        P, Q = self._low_rank()
        U, R = torch.linalg.qr(P.double())
        V, S = torch.linalg.qr(Q.double())
        return U, V, R @ S.mT

    def adapted(self, x: Tensor) -> Tensor:
        if self.mode not in ("auto", "factored"):
            raise ValueError(f"`mode` must be 'auto' or 'factored' for a SpectralFT layer, got {self.mode!r}")
        P, Q = self.cache.factors(self)[:2] if self.cache.serves(self) else self._low_rank()
        dtype = compute_dtype(x)
        return add_update(self.fixed(x), F.linear(x @ Q.to(dtype), P.to(dtype)))

    # -- adapters ----------------------------------------------------------------------------------------------

    def new_adapter(self) -> dict[str, nn.Parameter]:
        made: dict[str, nn.Parameter] = {}
        for end, width in (("out", self.out_features), ("in", self.in_features)):
            A = self.sigma.new_empty(width, self.rank).uniform_(-(self.rank**-0.5), self.rank**-0.5)
            made |= {f"A_{end}": nn.Parameter(A), f"B_{end}": nn.Parameter(self.sigma.new_zeros(self.rank, self.k))}
        return made

    def flipped(self, values: dict[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        """The changes of u_i and v_i, columns of A B, take the signs of u_i and v_i: so do the columns of B."""
        return values | {key: values[key] * signs.to(values[key]) for key in ("B_out", "B_in")}

    def description(self) -> dict[str, Any]:
        shape = [self.out_features, self.in_features]
        return {"method": self.config_type.method, "k": self.k, "rank": self.rank, "shape": shape}

    def summary(self) -> str:
        return f"SpectralFT, top={self.k}, rank={self.rank}"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, top={self.k}, rank={self.rank}"
