"""AdaptedLinear: what every adapted layer does, whatever it trains: a frozen nn.Linear with W' = W + U core V^T."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis.factorize import BASIS, BasisIdentity, Factorization, factorize, fingerprint, match_signs, sketch
from ..basis.linears import check_linear
from ..config import Config
from ..ops import dispatch, reference
from ..ops.weight_cache import Provenance, WeightCache, capturing
from ..utils.fsdp import assign, gathered, is_sharded
from .inactive import InactiveAdapter, other_adapters
from .merging import merged_weight
from .precomputed import unseen_by_checkpoints

Factors = tuple[Tensor, Tensor, Tensor]  # U (d_out, r), V (d_in, r), core (r, r)


class AdaptedLinear(nn.Module, ABC):
    """Base of `SSVDLinear` and `SpectralFTLinear`: base weight, basis, adapters, merging, caching, state dicts.

    A method is a subclass: its configuration, the names of what it trains, and the abstract members below.
    """

    config_type: ClassVar[type[Config]]
    trained_names: ClassVar[tuple[str, ...]]  # of an adapter's Parameters; every layer has the first

    U: nn.Parameter
    sigma: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    _merged_weight: Tensor | None
    managed_by: str | None = None  # another library, e.g. PEFT

    def __init__(self, linear: nn.Linear, config: Config, factorization: Factorization | None = None) -> None:
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"`config` of {type(self).__name__} must be of type {self.config_type.__name__}, got {config!r}"
            )
        super().__init__()
        weight = self._weight_of(linear)
        self.out_features, self.in_features = weight.shape
        self.k = config.triplets(self.in_features, self.out_features)
        self.mode = "auto"
        self.active_adapter, self.disabled = "default", False  # see adapters/switching.py
        found = factorization or factorize(weight, self.k)
        self.basis = BasisIdentity(found.fingerprint, found.gap, found.sketch)
        self._hold(linear)
        self._hold_basis(found)
        self.register_buffer("_merged_weight", None, persistent=False)
        self.training = linear.training
        self._cache: tuple[Provenance, Factors] | None = None
        self._weight_cache = WeightCache()

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

    # -- what a method defines ---------------------------------------------------------------------------------

    @abstractmethod
    def update_factors(self) -> Factors:
        """(U, V, core) in float32 at least with W' = W + U core V^T, exactly W before training."""

    @abstractmethod
    def orthonormal_factors(self) -> Factors:
        """`update_factors` with orthonormal columns in U and V."""

    @abstractmethod
    def new_adapter(self) -> dict[str, nn.Parameter]:
        """The Parameters of an adapter that changes nothing yet."""

    @abstractmethod
    def flipped(self, values: dict[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        """An adapter's values that mean in the basis (s_i u_i, s_i v_i) what the given ones mean in (u_i, v_i)."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What an adapter file says of this layer, as plain JSON values; see adapter_file.py."""

    @abstractmethod
    def summary(self) -> str:
        """Ranks and choices in a few words, for `InjectReport`."""

    @abstractmethod
    def _adapted(self, x: Tensor) -> Tensor:
        """x W'^T + b by the factors."""

    # -- values ------------------------------------------------------------------------------------------------

    @property
    def base_weight(self) -> Tensor:
        """The untouched pretrained weight W (d_out, d_in)."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def weight(self) -> Tensor:
        """The effective weight W' (d_out, d_in) in the base weight's dtype, differentiable; SSVD's is composed once a
        forward of the model, SpectralFT's at each reading.

        Where FSDP2 has sharded the layer and it is not in use: the sharded base weight, by whose name FSDP2 asks.
        """
        if is_sharded(self.base_weight):
            self._share_parameters()  # not to keep the whole weight alive
            return self.base_weight
        try:
            return self._effective_weight()
        except AttributeError as error:  # nn.Module would take it for a missing property and give the base weight
            raise RuntimeError(f"the effective weight could not be composed: {error}") from error

    def compose(self) -> Tensor:
        """W + U core V^T (d_out, d_in), computed in float32 at least and rounded once to the base weight's dtype."""
        with unseen_by_checkpoints(), torch.autocast(self.sigma.device.type, enabled=False):
            return reference.compose_ref(self.base_weight, *self.update_factors())

    def _effective_weight(self) -> Tensor:
        if self._merged_weight is not None:
            return self._merged_weight
        if self.disabled:
            return self.base_weight
        return self._cached_weight() if self._may_cache() else self.compose()

    def forward(self, x: Tensor) -> Tensor:
        if self._merged_weight is not None:
            if self.training and torch.is_grad_enabled() and self.first_trained.requires_grad:
                kind = type(self).__name__
                raise RuntimeError(f"this {kind} is merged and would not train: call unmerge() first, or eval()")
            return F.linear(x, self._merged_weight, self.bias)
        if self.disabled:
            return F.linear(x, self.base_weight, self.bias)
        if self._may_cache() and self._as_if_merged(x):
            return F.linear(x, self._cached_weight(), self.bias)
        return self._adapted(x)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has sharded the layer: its parameters are whole within a forward or backward only."""
        original = self.__dict__.get("_original")
        return is_sharded(self._parameters.get("weight")) or is_sharded(getattr(original, "weight", None))

    # -- adapters ----------------------------------------------------------------------------------------------

    @property
    def first_trained(self) -> nn.Parameter:
        """One of the Parameters that train, to ask for their dtype, device and kind."""
        parameter = self._parameters[self.trained_names[0]]
        assert parameter is not None
        return parameter

    @property
    def inactive(self) -> dict[str, InactiveAdapter]:
        """The adapters that are not in use, by name: the layer's submodule `parked`, which is there if they are."""
        return dict(self._modules.get("parked") or {})  # type: ignore[arg-type]

    def adapter_names(self) -> list[str]:
        """The adapter in use, then the others."""
        return [self.active_adapter, *self.inactive]

    def adapter(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The Parameters, by `trained_names`, of the adapter `name`, or of the one in use."""
        if name is None or name == self.active_adapter:
            return {key: p for key in self.trained_names if (p := self._parameters[key]) is not None}
        if name not in self.inactive:
            raise ValueError(f"`adapter` must be one of {', '.join(map(repr, self.adapter_names()))}, got {name!r}")
        parked = self.inactive[name]
        return {key: parked[key] for key in self.trained_names if key in parked}

    # -- merging -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the forward uses a fixed W' composed by `merge`."""
        return self._merged_weight is not None

    @property
    def in_use(self) -> bool:
        """Whether a forward of the model needs this layer's update."""
        return not (self.merged or self.disabled)

    def composed_for_merge(
        self, name: str = "weight", rounding: str = "nearest", unload: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """W' as `merge(model, unload)` stores it, see `merged_weight`; of a merged layer the one that it uses."""
        if self._merged_weight is not None:
            return self._merged_weight
        if self.disabled:
            raise ValueError(f"merging {name} while its adapter is disabled: leave the disable_adapter block first")
        return merged_weight(self.base_weight, *self.update_factors(), rounding, name, dtype)

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
                    f"`{name}` must have the layer's own shape {tuple(present.shape)}, got {tuple(value.shape)}"
                )
            assign(present, value)
        self._recognise_basis()
        self._forget()

    @torch.no_grad()
    def flip_basis(self, signs: Tensor) -> None:
        """Multiplies each pair (u_i, v_i) by signs[i] = +-1: the same W, and the basis that other values mean."""
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
            or type(self.first_trained) is not nn.Parameter  # functional_call
            or self.sharded
            or self.first_trained.is_inference()
            or torch._C._are_functorch_transforms_active()
        )

    def _cached_factors(self) -> Factors:
        """The kept `update_factors`, made anew unless everything they were made from is unchanged."""
        if not self.has_cache():
            made_from = Provenance(self._parameters.values(), self.adapter().values())
            with torch.inference_mode(False), torch.no_grad():
                factors = self.update_factors()
            if capturing(factors[-1]):  # hold their values only after the first replay
                return factors
            self._cache = (made_from, factors)
        assert self._cache is not None
        factors = self._cache[1]
        if capturing(factors[-1]):
            for made in (factor for factor in factors if not isinstance(factor, nn.Parameter)):
                self._weight_cache.pin(made)
        return factors

    def _cached_weight(self) -> Tensor:
        factors, dtype = self._cached_factors(), self.base_weight.dtype
        with torch.inference_mode(False), torch.no_grad():
            return self._weight_cache.composed(self.base_weight, *factors, dtype, reference.compose_ref, "nearest")

    def has_cache(self) -> bool:
        """Whether the next forward can use kept factors or a kept weight (then it needs no rotation)."""
        return self._cache is not None and self._may_cache() and self._cache[0].holds(self._parameters.values())

    def _forget(self) -> None:
        self._cache = None
        self._weight_cache.forget()

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

    def train(self, mode: bool = True) -> AdaptedLinear:
        self._forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        self._forget()
        before = self.first_trained.dtype
        super()._apply(fn, recurse)
        now = self.first_trained.dtype
        if now != before and now.itemsize < 4:
            warnings.warn(  # once, not for each layer
                f"{' and '.join(self.adapter())} of {self.config_type.method} layers were rounded from {before} to "
                f"{now}, in which an optimizer's small steps are lost: cast the model before adapting it",
                stacklevel=2,
            )
        self._share_parameters()
        return self

    def _share_parameters(self) -> None:
        self.__dict__["_original"]._parameters.update(weight=self._parameters["weight"], bias=self._parameters["bias"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "disabled": False}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses another base weight without its basis, and any load while merged: both would be silently wrong."""
        self._forget()
        error_msgs: list[str] = args[-1]
        weight, basis = state_dict.get(prefix + "weight"), [state_dict.get(prefix + name) for name in ("U", "V")]
        if self.merged:
            error_msgs.append(f"{prefix[:-1]} is merged: unmerge before loading")
            return
        others = other_adapters(state_dict, prefix, self.adapter_names(), self.trained_names[0])
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
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.device, b.dtype), b)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Name -> layer for every adapted layer of `model`, whatever the method."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def check_own(layers: Mapping[str, AdaptedLinear]) -> None:
    """Raises ValueError for layers that another library manages: this package's functions would get in its way."""
    for name, layer in layers.items():
        if layer.managed_by is not None:
            raise ValueError(
                f"{name} was adapted through {layer.managed_by}: use that library's own functions for saving, "
                "loading, merging, exporting and switching"
            )


def check_not_adapted(model: nn.Module) -> None:
    """Raises ValueError for a model that has adapted layers already."""
    present = adapted_layers(model)
    check_own(present)
    if present:
        raise ValueError(
            f"model has {len(present)} SSVD layers already, e.g. {next(iter(present))!r}: remove() them first"
        )
