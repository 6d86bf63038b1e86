"""SSVD: the top singular vectors of a frozen weight rotated, its top singular values shifted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis.factorize import Factorization
from ..config import SSVDConfig
from ..ops import reference
from ..ops.functional import compute_dtype, flip_theta, rotation_delta, ssvd_linear, ssvd_update, theta_length
from .adapter import Adapter, Factors
from .base import AdaptedLinear
from .inactive import TRAINED
from .precomputed import PrecomputedRotation, unseen_by_checkpoints


class SSVDAdapter(Adapter):
    """Rotations theta of singular vectors of W (d_out, d_in) and shifts delta_sigma; the formula is in `SSVDLinear`."""

    config_type = SSVDConfig
    trained_names = TRAINED

    theta: nn.Parameter
    theta_out: nn.Parameter | None
    delta_sigma: nn.Parameter

    def __init__(self, weight: Tensor, config: SSVDConfig, factorization: Factorization | None = None) -> None:
        super().__init__(weight, config, factorization)
        d_out, d_in = weight.shape
        self.k_in, self.k_out = config.resolve_ranks(d_in, d_out)
        self.side, self.rotation, self.band = config.resolve_side(d_in, d_out), config.rotation, config.band
        made = self.new_adapter()
        for name in TRAINED:
            self.register_parameter(name, made.get(name))
        self._precomputed: PrecomputedRotation | None = None

    def core(self) -> Tensor:
        """M (k, k) with W' = W + U M V^T, in float32 at least; exactly zero before training."""
        precomputed = self._precomputed
        if precomputed is not None:
            E, E_out = precomputed.E, precomputed.E_out
        else:
            with unseen_by_checkpoints():
                E, E_out = rotation_delta(self.theta, self.k_in, self.rotation, self.band), None
                if self.theta_out is not None:
                    assert self.k_out is not None
                    E_out = rotation_delta(self.theta_out, self.k_out, self.rotation)
        if E_out is not None:
            E, E_out = _pad(E, self.k), _pad(E_out, self.k)
        with torch.autocast(E.device.type, enabled=False):
            if self.rotation == "banded":
                return reference.banded_core_ref(E, self.delta_sigma.to(E.dtype))
            return reference.core_ref(E, self.sigma.to(E.dtype), self.delta_sigma.to(E.dtype), self.side, E_out)

    def update_factors(self) -> Factors:
        return self.U, self.V, self.core()

    orthonormal_factors = update_factors

    def effective_weight(self) -> Tensor:
        precomputed = self._precomputed
        if precomputed is None or self.kept.serves(self):
            return super().effective_weight()
        if precomputed.weight is None or (torch.is_grad_enabled() and not precomputed.weight.requires_grad):
            precomputed.weight = self.compose()
        return precomputed.weight

    def adapted(self, x: Tensor) -> Tensor:
        weight_cache = None if self.sharded else self.kept.weights  # which would keep W' whole
        core = self.core_for(x)
        return ssvd_linear(x, self.base_weight, self.U, self.V, core, self.bias, self.mode, weight_cache=weight_cache)

    def update(self, x: Tensor) -> Tensor:
        """((x V) core^T) U^T (..., d_out), in x's dtype or autocast's."""
        if self.mode not in ("auto", "factored"):
            raise ValueError(f"`mode` must be 'auto' or 'factored' for a quantised layer, got {self.mode!r}")
        return ssvd_update(x, self.U, self.V, self.core_for(x), weight_cache=self.kept.weights)

    def core_for(self, x: Tensor) -> Tensor:
        """The core for a call on x, which the root is told of as one that reads x."""
        if self.kept.serves(self):
            return self.kept.factors(self)[-1]
        self.kept.drop_factors()
        inputs = None if self._precomputed is None else self._precomputed.inputs
        if inputs is not None and not self.sharded and torch.is_grad_enabled():
            inputs.note(x, self.kept.weights, self.k, compute_dtype(x))
        return self.core()

    def forget(self) -> None:
        super().forget()
        self._precomputed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_precomputed": None}

    # -- adapters ----------------------------------------------------------------------------------------------

    def new_adapter(self) -> dict[str, nn.Parameter]:
        lengths = {"theta": theta_length(self.k_in, self.rotation, self.band)}
        if self.k_out is not None:
            lengths["theta_out"] = theta_length(self.k_out, self.rotation)
        lengths["delta_sigma"] = self.k
        return {name: nn.Parameter(self.sigma.new_zeros(length)) for name, length in lengths.items()}

    def flipped(self, values: dict[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        thetas = {key: signs[:k] for key, k in (("theta", self.k_in), ("theta_out", self.k_out)) if key in values}
        return values | {key: flip_theta(values[key], s, self.rotation, self.band) for key, s in thetas.items()}

    def description(self) -> dict[str, Any]:
        return {
            "k": self.k_in,
            "k_out": self.k_out,
            "side": self.side,
            "rotation": self.rotation,
            **({} if self.band is None else {"band": self.band}),
            "shape": [self.out_features, self.in_features],
        }

    def summary(self) -> str:
        rank = str(self.k) if self.k_out is None else f"{self.k_in}+{self.k_out}"
        return f"k={rank}, {self.side}, {self.rotation}" + ("" if self.band is None else f", band={self.band}")

    def extra_repr(self) -> str:
        k = self.k if self.k_out is None else f"({self.k_in}, {self.k_out})"
        band = "" if self.band is None else f", band={self.band}"
        options = f"k={k}, side={self.side}, rotation={self.rotation}{band}"
        return f"{super().extra_repr()}, {options}"


class SSVDLinear(AdaptedLinear, SSVDAdapter):
    """Drop-in for nn.Linear: y = x W'^T + b, W' = W + U core V^T; x (..., d_in) -> y (..., d_out).

    Input side: W' = U_k (Sigma + dSigma) G V_k^T + (W - U_k Sigma V_k^T), G = cayley(theta): the top-k input singular
    vectors are rotated, the singular values shifted, the output vectors kept (SSVD, arXiv 2509.02830, eq. 8-13).

    Trains     theta (k(k-1)/2,), delta_sigma (k,); side="both" adds theta_out; rotation="free" has theta (k^2,)
               (rotation="banded", SVFT: theta the off-diagonals, delta_sigma the diagonal of M, see `reference.banded`)
    Frozen     U (d_out, k), sigma (k,), V (d_in, k); base weight and bias, under the keys "weight" and "bias" of the
               state dict, so that base checkpoints load both ways
    layer.weight   the effective weight (d_out, d_in), differentiable; layer.base_weight the untouched one
    layer.mode     "auto", "composed" or "factored" (see `ssvd_linear`)

    theta, delta_sigma, U, sigma and V are float32 (float64 over a float64 base), also over a half-precision base; x has
    the base's dtype or autocast's. Casting an adapted model (`to(dtype)`, `half()`) casts them all, warning where theta
    becomes half precision, and casting back restores no digits. The core is computed in float32 even then.

    Before training the output is bit-identical to the base layer's. The Parameters of `linear` are shared and frozen.
    A composed weight is kept: in training from forward to backward and over micro-batches, in eval with gradients off
    from call to call. train(), eval(), loading, moving and merging drop it, and so does a change of the parameters (in
    eval on the GPU, where comparing would stall the stream, one made through .data goes unseen until then). Raises as
    `SSVDConfig` and `factorize` do, and TypeError for anything but an nn.Linear.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SSVDConfig) -> SSVDLinear:
        """Factorises `linear` and adapts it as `config` says; see the class."""
        return cls(linear, config)


def _pad(E: Tensor, k: int) -> Tensor:
    extra = k - E.shape[-1]
    return F.pad(E, (0, extra, 0, extra)) if extra else E
