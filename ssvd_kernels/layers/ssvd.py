"""SSVD: the top singular vectors of a frozen weight rotated, its top singular values shifted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..basis.factorize import Factorization, factorize
from ..config import SSVDConfig
from ..ops.functional import Kind, add_rows, compute_dtype, core_of, flip_theta, linear, theta_length
from ..ops.places import Places
from . import running
from .adapter import Adapter, Factors
from .base import AdaptedLinear
from .caching import LayerCache
from .inactive import TRAINED


class SSVDAdapter(Adapter):
    """Rotations theta of singular vectors of W (d_out, d_in) and shifts delta_sigma; the formula is in `SSVDLinear`."""

    config_type = SSVDConfig
    trained_names = TRAINED
    form = "weight"

    theta: nn.Parameter
    theta_out: nn.Parameter | None
    delta_sigma: nn.Parameter

    def __init__(self, weight: Tensor, config: SSVDConfig, factorization: Factorization | None = None) -> None:
        super().__init__(weight, config, factorization)
        if config.form == "activation" and self.composes:
            raise ValueError(f"`form` must be 'weight' or 'auto' for {type(self).__name__}, got 'activation'")
        self.given = running.Given()
        d_out, d_in = weight.shape
        self.k_in, self.k_out = config.resolve_ranks(d_in, d_out)
        self.side, self.rotation, self.band = config.resolve_side(d_in, d_out), config.rotation, config.band
        made = self.new_adapter()
        for name in TRAINED:
            self.register_parameter(name, made.get(name))

    @property
    def kind(self) -> Kind:
        """What, with the Parameters, makes the core."""
        return Kind(self.k, self.k_in, self.k_out, self.side, self.rotation, self.band, self.strength, self.form)

    def core(self) -> Tensor:
        """M (k, k) with W' = W + U M V^T, in float32 at least; exactly zero before training.

        Within a forward of the root it comes from the batch that the root computed for all layers.
        """
        return self.own_core()

    def own_core(self) -> Tensor:
        """`core_of` this layer's kind."""
        core, grad, compiling = self.given.core, torch.is_grad_enabled(), torch.compiler.is_compiling()
        if core is not None and (compiling or running.is_running(self.given)):
            if core.requires_grad or not (grad and self.first_trained.requires_grad):
                if not (grad or compiling) and core.requires_grad:  # a reentrant checkpoint, recomputed with a graph
                    running.forget(self)
                return core
        elif grad and not compiling and (found := running.recomputed(self)) is not None:
            return found
        if grad and not compiling:
            running.forget(self)
        with running.unseen_by_checkpoints():
            return core_of(self.kind, self.theta, self.theta_out, self.delta_sigma, self.sigma)

    def update_factors(self) -> Factors:
        return self.U, self.V, self.core()

    orthonormal_factors = update_factors

    def adapted(self, x: Tensor) -> Tensor:
        W, U, V, bias = self.frozen()
        return linear(x, W, U, V, self.core_for_call(), bias, self.mode, self)

    def with_rows(self, x: Tensor, cores: Tensor, places: Places | None) -> Tensor:
        """`adapted`, where each row of x (B, ..., d_in) has a core of its own: see `add_rows`."""
        _, U, V, _ = self.frozen()
        if x.is_cuda:  # in x's dtype already
            U, V = (basis[:, : self.k] for basis in self.bases(compute_dtype(x)))
        return add_rows(self.fixed(x), x, V, U, cores, places)

    def operands(self, core: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """U, V and, unless it would be made for one call alone, `core` as the Triton kernels read them in `dtype`."""
        return *self.bases(dtype), self.narrow_core(core, dtype)

    def bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and V as the Triton kernels read them in `dtype`."""
        cache, (_, U, V, _) = LayerCache() if self.sharded else self.cache, self.frozen()  # FSDP2 gathers them anew
        return cache.operand("U", U, dtype), cache.operand("V", V, dtype)

    def narrow_core(self, core: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`core` as the Triton kernels read it in `dtype`, unless it would be made for one call alone."""
        if (made := self.cache.made) is not None and core is made.factors.tensors[-1]:
            return self.cache.operand("core", core, dtype)
        return running.narrow(self, core, dtype)

    def update(self, x: Tensor) -> Tensor:
        """((x V) core^T) U^T (..., d_out), in x's dtype or autocast's."""
        if self.mode == "composed":
            raise ValueError(f"`mode` must be 'auto' or 'factored' for a quantised layer, got {self.mode!r}")
        _, U, V, _ = self.frozen()
        return linear(x, None, U, V, self.core_for_call(), None, self.mode)

    def core_for_call(self) -> Tensor:
        """The core that a forward uses: `core`, or in eval with gradients off a cached one."""
        if not self.training and self.cache.serves(self):
            return self.cache.factors(self)[-1]
        return self.own_core()

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
    vectors are rotated, the singular values shifted, the output vectors unchanged (SSVD, arXiv 2509.02830, eq. 8-13).

    Trains     theta (k(k-1)/2,), delta_sigma (k,); side="both" adds theta_out; rotation="free" has theta (k^2,)
               (rotation="banded", SVFT: theta the off-diagonals, delta_sigma the diagonal of M, see `reference.banded`)
    Frozen     U (d_out, k), sigma (k,), V (d_in, k); base weight and bias, under the keys "weight" and "bias" of the
               state dict, so that base checkpoints load both ways
    layer.weight   the effective weight (d_out, d_in), differentiable; layer.base_weight the untouched one
    layer.mode     "auto", "composed" or "factored" (see `ssvd_linear`)

    theta, delta_sigma, U, sigma and V are float32 (float64 over a float64 base), also over a half-precision base; x has
    the base's dtype or autocast's, or any if `linear` casts its weight to it. Casting an adapted model (`to(dtype)`,
    `half()`) casts them all, warning where theta becomes half precision, and casting back restores no precision. The
    core is computed in float32 even then.

    Before training the output is bit-identical to the base layer's. The Parameters of `linear` are shared and frozen.
    In training a composed weight lives from forward to backward, in eval with gradients off it is cached across
    calls. train(), eval(), loading, moving and merging drop it, and so does a change of the parameters (on the GPU,
    where comparing would stall the stream, one made through .data goes unseen until then). Raises as
    `SSVDConfig` and `factorize` do, and TypeError for anything but an nn.Linear.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SSVDConfig) -> SSVDLinear:
        """Factorises `linear` and adapts it as `config` says; see the class."""
        from .adapt import in_form  # the forms are subclasses

        kind, found = in_form(cls, linear, config), None
        if kind is not cls and config.form == "auto":  # if its singular values are large enough
            weight = kind.base_layer.read(linear)
            found = factorize(weight, config.triplets(*reversed(weight.shape)))
            kind = in_form(cls, linear, config, found)
        return kind(linear, config, found)
