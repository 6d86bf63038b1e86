"""The activation form of SSVD: what a layer reads and writes changes instead of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..basis.factorize import BasisIdentity, Factorization, fingerprint, match_rounded, sketch
from ..basis.linears import input_dtype
from ..basis.pointwise import channels_of
from ..ops.functional import activation, add_rows, linear
from ..ops.places import Places
from ..utils.fsdp import gathered
from .base_layer import PointwiseBase
from .quantized import SSVDQuantizedLinear
from .ssvd import SSVDAdapter, SSVDLinear

KEPT = {"input": ("V",), "output": ("U",), "both": ("U", "V")}
# sigma_k / sigma_1 at which rounding the basis puts the update off by about 1 % in half precision and 1e-6 in float32
# if delta_sigma is 0.04 of sigma_1 ||K||, the most in a trained Whisper tiny.en: by eps delta_sigma / sigma_k (float64:
# not measured)
SMALLEST = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1.25e-4, torch.bfloat16: 1e-3}


def basis_dtype(sigma: Tensor, config: Any, weight: torch.dtype, quantized: bool) -> torch.dtype:
    """Of the bases over a base weight of dtype `weight`."""
    if config.basis_dtype != "auto":
        return getattr(torch, config.basis_dtype)
    return torch.bfloat16 if quantized or weight.itemsize < 4 else sigma.dtype


def divides(sigma: Tensor, dtype: torch.dtype) -> bool:
    """Whether bases in `dtype` allow to divide by `sigma`."""
    return float(sigma[-1] / sigma[0]) >= SMALLEST[dtype]


def check_sigma(sigma: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raises ValueError unless bases in `dtype` allow to divide by the `sigma` of the layer `name`."""
    if not divides(sigma, dtype):
        raise ValueError(
            f"{name}: form='activation' divides by singular values, so sigma_k / sigma_1 must be at least "
            f"{SMALLEST[dtype]:g} for a basis in {dtype}, got {float(sigma[-1] / sigma[0]):.1e} at k = {len(sigma)}: "
            "use a smaller rank, or form='weight'"
        )


class ActivationForm(SSVDAdapter):
    """W' = (I + U C_out U^T) W (I + V C V^T), computed without W' and, on one side, from one basis.

    input    y = W x' + b,              x' = x + ((x V) C^T) V^T,                       C = Sigma^-1 M
    output   y = y0 + (((y0 - b) U) C^T) U^T,   y0 = W x + b,                           C = M Sigma^-1
    both     one after the other; Sigma and its shift belong to the input side.

    It is the W' = W + U M V^T of `SSVDLinear`, as U = W V Sigma^-1; the base computes W x + b by itself, whatever it
    is. The basis of a side that changes is kept as "Vh" (k, d_in) or "Uh" (k, d_out), in `SSVDConfig.basis_dtype`; the
    other one is computed when it is asked for. In bfloat16 x' and y are rounded stochastically (see
    `reference.add_update`). Raises ValueError where sigma_k is so small that Sigma^-1 would lose precision.
    """

    base: nn.Linear  # of a quantised layer
    form = "activation"
    composes = False

    def hold_basis(self, found: Factorization, config: Any, dtype: torch.dtype) -> None:
        dtype = basis_dtype(found.sigma, config, dtype, self.quantized)
        check_sigma(found.sigma, dtype, "`linear`")
        side = config.resolve_side(self.in_features, self.out_features)
        bases = {f"{name}h": getattr(found, name).to(dtype).mT.contiguous() for name in KEPT[side]}
        self.store({"sigma": found.sigma, **bases})

    # -- the basis ---------------------------------------------------------------------------------------------

    @property
    def U(self) -> Tensor:  # type: ignore[override]
        """(d_out, k) in sigma's dtype: as kept, or W V Sigma^-1."""
        return self._basis("U")

    @property
    def V(self) -> Tensor:  # type: ignore[override]
        """(d_in, k) in sigma's dtype: as kept, or W^T U Sigma^-1."""
        return self._basis("V")

    def kept(self, name: str) -> Tensor | None:
        """The transpose of U or V, if it is kept."""
        return self._parameters.get(f"{name}h")

    def _basis(self, name: str) -> Tensor:
        sigma, kept = gathered(self.sigma), self.kept(name)
        if kept is not None:
            return gathered(kept).mT.to(sigma.dtype)
        W = gathered(self.base_weight).detach().to(sigma.dtype)
        other = gathered(self.kept("V" if name == "U" else "U")).mT.to(sigma.dtype)
        return (W if name == "U" else W.mT) @ other / sigma

    def as_kept(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {f"{name}h": values[name].mT for name in KEPT[self.side] if name in values}
        return kept | {name: value for name, value in values.items() if name == "sigma"}

    def recognise_basis(self) -> None:
        """As for the weight form; but a kept basis in half precision is the known one, rounded."""
        known = self.basis
        signs = match_rounded(known.sketch, {name: gathered(self.kept(name)).mT for name in KEPT[self.side]})
        self.basis = BasisIdentity(
            fingerprint(gathered(self.base_weight)),
            0.0 if signs is None else known.gap,
            sketch(self.U, self.V) if signs is None else known.sketch * signs,
        )

    def update(self, x: Tensor) -> Tensor:
        return linear(x, None, *self.update_factors(), None, self.mode)

    # -- the forward -------------------------------------------------------------------------------------------

    def call_factors(self) -> tuple[Tensor, ...]:
        return (self.own_core(),)

    def core(self) -> Tensor:
        C, sigma = self.own_core(), self.sigma
        if self.side == "output":
            return C * sigma
        if self.side == "input":
            return sigma.unsqueeze(-1) * C
        C, C_out = C.unbind()
        right = sigma.unsqueeze(-1) * C
        return right + C_out * sigma + C_out @ right

    def adapted(self, x: Tensor) -> Tensor:
        if self.mode == "composed":
            raise ValueError(f"`mode` must be 'auto' or 'factored' for form='activation', got {self.mode!r}")
        core, Vh, Uh = self.core_for_call(), self.kept("V"), self.kept("U")
        if Vh is not None:
            x = self._input(x, Vh, core)
        y = self.fixed(x)
        if Vh is not None and x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"the base layer, a {type(self.base).__name__}, passes no gradient to its input, through which "
                "form='activation' trains: use form='weight'"
            )
        if Uh is None:
            return y
        b = self.bias
        if b is None or not b.requires_grad:
            return self._changed(y, Uh, core, 1, b)
        # `shift` passes no gradient: a zero takes b's past the change
        zero = (b - b.detach()).to(y.dtype).reshape(-1, *(1,) * (-1 - self.channels))
        return self._changed(y - zero, Uh, core, 1, b.detach()) + zero

    def _input(self, x: Tensor, Vh: Tensor, core: Tensor) -> Tensor:
        """x'. A base that reads x in a narrower dtype would round x' to nearest: it is rounded to that before."""
        if not self.quantized:
            return self._changed(x, Vh, core, 0)
        return self._changed(x.to(input_dtype(self.base, x.dtype)), Vh, core, 0).to(x.dtype)

    def _changed(self, x: Tensor, basis: Tensor, core: Tensor, side: int, shift: Tensor | None = None) -> Tensor:
        one, narrow = core if core.ndim == 2 else core[side], partial(self._narrow, core, side)
        if self.channels == -1:
            return activation(x, basis.mT, one, shift, narrow)
        rows = activation(x.movedim(self.channels, -1), basis.mT, one, shift, narrow)
        return rows.movedim(-1, self.channels).contiguous()

    def with_rows(self, x: Tensor, cores: Tensor, places: Places | None) -> Tensor:
        Vh, Uh = self.kept("V"), self.kept("U")
        x = x.movedim(self.channels, -1)
        if Vh is not None:
            x = add_rows(x, x, Vh.mT, Vh.mT, cores if cores.ndim == 3 else cores[:, 0], places)
        y = self.fixed(x.movedim(-1, self.channels)).movedim(self.channels, -1)
        if Uh is not None:
            y = add_rows(y, y, Uh.mT, Uh.mT, cores if cores.ndim == 3 else cores[:, 1], places, self.bias)
        return y.movedim(-1, self.channels)

    def _narrow(self, core: Tensor, side: int, dtype: torch.dtype) -> Tensor | None:
        narrow = self.narrow_core(core, dtype)
        return narrow if narrow is None or core.ndim == 2 else narrow[side]


class SSVDActivationLinear(ActivationForm, SSVDLinear):
    """`SSVDLinear` in the activation form."""


class SSVDActivationQuantizedLinear(ActivationForm, SSVDQuantizedLinear):
    """`SSVDQuantizedLinear` in the activation form."""


class SSVDPointwise(SSVDActivationLinear):
    """`SSVDLinear` over a convolution of kernel 1 or transformers' Conv1D, whose Parameters it keeps: x (B, d_in, ...)
    -> y (B, d_out, ...), or x (..., d_in) -> y (..., d_out)."""

    base_layer = PointwiseBase()

    @property
    def channels(self) -> int:  # type: ignore[override]
        """-2 for Conv1d, -3 for Conv2d."""
        return channels_of(self._parameters["weight"])  # type: ignore[arg-type]
