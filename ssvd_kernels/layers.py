"""SSVDLinear: a frozen nn.Linear whose weight is W' = W + U core V^T."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch, reference
from .base_layers import check_linear
from .config import SSVDConfig
from .factorize import BASIS, BasisIdentity, Factorization, factorize, fingerprint, match_signs, sketch
from .functional import compute_dtype, rotation_delta, ssvd_linear, theta_length
from .handed import HandedRotations, unseen_by_checkpoints
from .merging import merged_weight
from .parked import TRAINED, ParkedAdapter, other_adapters
from .sharded import assign, gathered, is_sharded
from .workspace import Provenance, Workspace, capturing


class SSVDLinear(nn.Module):
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

    U: nn.Parameter
    sigma: nn.Parameter
    V: nn.Parameter
    theta: nn.Parameter
    theta_out: nn.Parameter | None
    bias: nn.Parameter | None
    _merged_weight: Tensor | None
    managed_by: str | None = None  # another library, e.g. PEFT

    def __init__(self, linear: nn.Linear, config: SSVDConfig, factorization: Factorization | None = None) -> None:
        super().__init__()
        weight = self._weight_of(linear)
        d_out, d_in = weight.shape
        k_in, k_out = config.resolve_ranks(d_in, d_out)
        self.in_features, self.out_features = d_in, d_out
        self.k_in, self.k_out, self.k = k_in, k_out, max(k_in, k_out or 0)
        self.side, self.rotation, self.band = config.resolve_side(d_in, d_out), config.rotation, config.band
        self.mode = "auto"
        self.active_adapter, self.disabled = "default", False  # see adapters.py
        found = factorization or factorize(weight, self.k)
        self.basis = BasisIdentity(found.fingerprint, found.gap, found.sketch)
        self._hold(linear)
        self._hold_basis(found)
        zeros = found.sigma.new_zeros  # float32 or float64, on the weight's device
        self.theta = nn.Parameter(zeros(theta_length(k_in, self.rotation, self.band)))
        theta_out = None if k_out is None else nn.Parameter(zeros(theta_length(k_out, self.rotation)))
        self.register_parameter("theta_out", theta_out)
        self.delta_sigma = nn.Parameter(zeros(self.k))
        self.register_buffer("_merged_weight", None, persistent=False)
        self.training = linear.training
        self._handed: HandedRotations | None = None
        self._cache: tuple[Provenance, Tensor] | None = None
        self._workspace = Workspace()

    @staticmethod
    def _weight_of(linear: nn.Linear) -> Tensor:
        check_linear(linear, "linear")
        return linear.weight

    def _hold(self, linear: nn.Linear) -> None:
        self.__dict__["_original"] = linear.requires_grad_(False)  # not a submodule: `original()` gives it back
        self._parameters["weight"] = linear._parameters["weight"]  # by hand: the name `weight` is a property
        self.register_parameter("bias", linear.bias)

    def _hold_basis(self, found: Factorization) -> None:
        for name in BASIS:
            # frozen parameters, not buffers: DDP broadcasts buffers, even non-persistent ones, every step
            self.register_parameter(name, nn.Parameter(getattr(found, name), requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SSVDConfig) -> SSVDLinear:
        """Factorises `linear` and adapts it as `config` says; see the class."""
        return cls(linear, config)

    # -- values ------------------------------------------------------------------------------------------------

    @property
    def base_weight(self) -> Tensor:
        """The untouched pretrained weight W (d_out, d_in)."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """The effective weight W' (d_out, d_in) in the base weight's dtype, differentiable; composed once a forward.

        Where FSDP2 has sharded the layer and it is not in use: the sharded base weight, by whose name FSDP2 asks.
        """
        if is_sharded(self.base_weight):
            self._share_parameters()  # not to keep the whole weight alive
            return self.base_weight
        try:
            return self._effective_weight()
        except AttributeError as error:  # nn.Module would take it for a missing property and give the base weight
            raise RuntimeError(f"the effective weight could not be composed: {error}") from error

    def core(self) -> Tensor:
        """M (k, k) with W' = W + U M V^T, in float32 at least; exactly zero before training."""
        handed = self._handed
        if handed is not None:
            E, E_out = handed.E, handed.E_out
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

    def compose(self) -> Tensor:
        """W + U core V^T (d_out, d_in), computed in float32 at least and rounded once to the base weight's dtype."""
        with unseen_by_checkpoints(), torch.autocast(self.sigma.device.type, enabled=False):
            return reference.compose_ref(self.base_weight, self.U, self.V, self.core())

    def _effective_weight(self) -> Tensor:
        if self._merged_weight is not None:
            return self._merged_weight
        if self.disabled:
            return self.base_weight
        if self._may_cache():
            return self._cached_weight()
        handed = self._handed
        if handed is None:
            return self.compose()
        if handed.weight is None or (torch.is_grad_enabled() and not handed.weight.requires_grad):
            handed.weight = self.compose()
        return handed.weight

    def forward(self, x: Tensor) -> Tensor:
        if self._merged_weight is not None:
            if self.training and torch.is_grad_enabled() and self.theta.requires_grad:
                raise RuntimeError("this SSVDLinear is merged and would not train: call unmerge() first, or eval()")
            return F.linear(x, self._merged_weight, self.bias)
        if self.disabled:
            return F.linear(x, self.base_weight, self.bias)
        if self._may_cache() and self._as_if_merged(x):
            return F.linear(x, self._cached_weight(), self.bias)
        core, frozen = self._core_for(x), (self.base_weight, self.U, self.V)
        workspace = None if self.sharded else self._workspace  # which would keep W' whole
        return ssvd_linear(x, *frozen, core, self.bias, self.mode, workspace=workspace)

    def _core_for(self, x: Tensor) -> Tensor:
        """The core for a call on x, which the root is told of as one that reads x."""
        if self._may_cache():
            return self._cached_core()
        self._cache = None
        inputs = None if self._handed is None else self._handed.inputs
        if inputs is not None and not self.sharded and torch.is_grad_enabled():
            inputs.note(x, self._workspace, self.k, compute_dtype(x))
        return self.core()

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has sharded the layer: its parameters are whole within a forward or backward only."""
        original = self.__dict__.get("_original")
        return is_sharded(self._parameters.get("weight")) or is_sharded(getattr(original, "weight", None))

    # -- adapters ----------------------------------------------------------------------------------------------

    @property
    def inactive(self) -> dict[str, ParkedAdapter]:
        """The adapters that are not in use, by name: the layer's submodule `parked`, which is there if they are."""
        return dict(self._modules.get("parked") or {})  # type: ignore[arg-type]

    def adapter_names(self) -> list[str]:
        """The adapter in use, then the others."""
        return [self.active_adapter, *self.inactive]

    def adapter(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """theta, delta_sigma (and theta_out) of the adapter `name`, or of the one in use."""
        if name is None or name == self.active_adapter:
            return {key: p for key in TRAINED if (p := self._parameters[key]) is not None}
        if name not in self.inactive:
            raise ValueError(f"adapter={name!r}: allowed are {', '.join(map(repr, self.adapter_names()))}")
        parked = self.inactive[name]
        return {key: parked[key] for key in TRAINED if key in parked}

    # -- merging -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the forward uses a fixed W' composed by `merge`."""
        return self._merged_weight is not None

    @property
    def in_use(self) -> bool:
        """Whether a forward of the model needs this layer's rotation."""
        return not (self.merged or self.disabled)

    def composed_for_merge(
        self, name: str = "weight", rounding: str = "nearest", unload: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """W' as `merge(model, unload)` stores it, see `merged_weight`; of a merged layer the one that it uses."""
        if self._merged_weight is not None:
            return self._merged_weight
        if self.disabled:
            raise ValueError(f"merging {name} while its adapter is disabled: leave the disable_adapter block first")
        return merged_weight(self.base_weight, self.U, self.V, self.core(), rounding, name, dtype)

    def merge(self, composed: Tensor | None = None, *, rounding: str = "nearest") -> None:
        """Uses W' as a fixed weight from now on; W is kept, so `unmerge` is exact and state dicts never hold W'.

        rounding: see `ssvd_kernels.merge`; `composed` is a W' that `composed_for_merge` has made already.
        """
        if self._merged_weight is None:
            self._merged_weight = self.composed_for_merge(rounding=rounding) if composed is None else composed
            self._forget()

    def unmerge(self) -> None:
        """Goes back to W + U core V^T computed at each forward."""
        self._merged_weight = None

    def unloaded(self, weight: Tensor) -> nn.Linear:
        """The plain layer that `merge(model, unload=True)` leaves: `original()` with W' for a weight."""
        linear = self.original()
        # a new Parameter: the old one may be in use elsewhere, e.g. in a copy of the base model
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def original(self) -> nn.Linear:
        """The nn.Linear that this layer was made from, with the present (base) weight and bias."""
        linear: nn.Linear = self.__dict__["_original"]
        self._share_parameters()
        return linear.train(self.training)

    # -- the basis ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_basis(self, U: Tensor, sigma: Tensor, V: Tensor) -> None:
        """Replaces the basis by another of the same weight, e.g. an adapter's own. Shapes as the present ones."""
        for name, value in zip(BASIS, (U, sigma, V)):
            present: Tensor = getattr(self, name)
            if value.shape != present.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: allowed is {tuple(present.shape)}, as the layer's own"
                )
            assign(present, value)
        self._recognise_basis()
        self._forget()

    @torch.no_grad()
    def flip_basis(self, signs: Tensor) -> None:
        """Multiplies each pair (u_i, v_i) by signs[i] = +-1: the same W, and the basis that another theta means."""
        for tensor in (self.U, self.V):
            assign(tensor, gathered(tensor) * signs.to(tensor.device, tensor.dtype))
        self.basis = self.basis._replace(sketch=self.basis.sketch * signs)
        self._forget()

    def _recognise_basis(self) -> None:
        """Brings `basis` up to date with U and V; one that W's own factorisation cannot give gets gap 0 (see save)."""
        found, known = sketch(gathered(self.U), gathered(self.V)), self.basis
        same = match_signs(known.sketch, found) is not None
        self.basis = BasisIdentity(fingerprint(gathered(self.base_weight)), known.gap if same else 0.0, found)

    # -- caching -----------------------------------------------------------------------------------------------

    def _may_cache(self) -> bool:
        return not (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or type(self.theta) is not nn.Parameter  # functional_call
            or self.sharded
            or self.theta.is_inference()
            or torch._C._are_functorch_transforms_active()
        )

    def _cached_core(self) -> Tensor:
        """The kept core, made anew unless everything it was made from is unchanged."""
        if not self.has_cache():
            made_from = Provenance(self._parameters.values(), self.adapter().values())
            with torch.inference_mode(False), torch.no_grad():
                core = self.core()
            if capturing(core):  # holds its values only after the first replay
                return core
            self._cache = (made_from, core)
        assert self._cache is not None
        return self._workspace.pin(self._cache[1])

    def _cached_weight(self) -> Tensor:
        core, dtype = self._cached_core(), self.base_weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            frozen = (self.base_weight, self.U, self.V)
            return self._workspace.composed(*frozen, core, dtype, reference.compose_ref, "nearest")

    def has_cache(self) -> bool:
        """Whether the next forward can use a kept core or weight (then it needs no rotation)."""
        return self._cache is not None and self._may_cache() and self._cache[0].holds(self._parameters.values())

    def _forget(self) -> None:
        self._cache = self._handed = None
        self._workspace.forget()

    def _as_if_merged(self, x: Tensor) -> bool:
        """Whether a kept W' serves x: in float32 and float64, where composing loses nothing and T does not matter."""
        if not x.dtype == self.base_weight.dtype == self.sigma.dtype or torch.is_autocast_enabled(x.device.type):
            return False
        if dispatch.backend_for("linear", x.device, x.dtype) != "reference":
            return False
        shape = self.base_weight.shape
        mode = dispatch.linear_mode(x.dtype, 1, shape, self.k, self.mode, backward=False, compositions=0)
        return mode == "composed"

    # -- nn.Module ---------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SSVDLinear:
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> SSVDLinear:
        self._forget()
        before = self.theta.dtype
        super()._apply(fn, recurse)
        if self.theta.dtype != before and self.theta.dtype.itemsize < 4:
            warnings.warn(  # once, not for each layer
                f"theta and delta_sigma of SSVD layers were rounded from {before} to {self.theta.dtype}, in which an "
                "optimizer's small steps are lost: cast the model before adapting it",
                stacklevel=2,
            )
        self._share_parameters()
        return self

    def _share_parameters(self) -> None:
        self.__dict__["_original"]._parameters.update(weight=self._parameters["weight"], bias=self._parameters["bias"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handed": None, "_cache": None, "disabled": False}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses another base weight without its basis, and any load while merged: both would be silently wrong."""
        self._forget()
        error_msgs: list[str] = args[-1]
        weight, basis = state_dict.get(prefix + "weight"), [state_dict.get(prefix + name) for name in ("U", "V")]
        if self.merged:
            error_msgs.append(f"{prefix[:-1]} is merged: unmerge before loading")
            return
        others = other_adapters(state_dict, prefix, self.adapter_names())
        if others is not None:
            error_msgs.append(others)
            return
        moved = weight is not None and weight.shape == self.base_weight.shape and not _same(weight, self.base_weight)
        if moved and any(tensor is None for tensor in basis):
            error_msgs.append(
                f"{prefix}weight differs from the base weight whose singular vectors this layer holds, and the state "
                "dict has no U and V: load base weights before inject"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(tensor is not None for tensor in basis):
            self._recognise_basis()

    def extra_repr(self) -> str:
        k = self.k if self.k_out is None else f"({self.k_in}, {self.k_out})"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"k={k}, side={self.side}, rotation={self.rotation}{', merged' if self.merged else ''}"
        )


def _pad(E: Tensor, k: int) -> Tensor:
    extra = k - E.shape[-1]
    return F.pad(E, (0, extra, 0, extra)) if extra else E


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)
