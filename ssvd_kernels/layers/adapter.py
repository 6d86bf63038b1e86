"""Adapter: what a method trains on one frozen weight W, and the effective weight W' = W + U core V^T."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..basis.factorize import BASIS, BasisIdentity, Factorization, factorize, match_signs, sketch
from ..basis.factorize import fingerprint as fingerprint_of
from ..config import Config
from ..ops.functional import compose
from ..utils.fsdp import assign, gathered, is_sharded
from .caching import LayerCache
from .running import structure, unseen_by_checkpoints

Factors = tuple[Tensor, Tensor, Tensor]  # U (d_out, r), V (d_in, r), core (r, r)


class Adapter(nn.Module, ABC):
    """A basis U, sigma, V of W and the Parameters that train; forward: x (..., d_in) -> x W'^T + b (..., d_out).

    A method is a subclass that names its configuration and what it trains, and defines `update_factors` and the
    methods after it. `AdaptedLinear`, which replaces a linear layer, and PEFT's `PeftAdapter` say where W and b are.
    """

    config_type: ClassVar[type[Config]]
    trained_names: ClassVar[tuple[str, ...]]  # of an adapter's Parameters; every layer has the first
    managed_by: ClassVar[str | None] = None  # another library, e.g. PEFT
    bank: Any = None  # the AdapterBank whose adapters rows of a batch may have
    quantized = False
    channels = -1  # the dimension of x and y that W maps
    composes = True  # whether W' may be composed, and kept, to serve several calls
    casts = False  # whether the layer takes x of any dtype and casts W and b to it, as the layer that it adapts

    U: Tensor
    sigma: Tensor
    V: Tensor

    def __init__(self, weight: Tensor, config: Config, factorization: Factorization | None = None) -> None:
        if not isinstance(config, self.config_type):
            raise TypeError(
                f"`config` of {type(self).__name__} must be of type {self.config_type.__name__}, got {config!r}"
            )
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.k = config.triplets(self.in_features, self.out_features)
        self.mode = "auto"
        self._strength = 1.0
        found = factorization or factorize(weight, self.k)
        self.basis = BasisIdentity(found.fingerprint, found.gap, found.sketch)
        self.cache = LayerCache()
        self.idle = False  # merged, disabled or inactive: a forward of the model does not need its update
        self.hold_basis(found, config, weight.dtype)
        structure.changed()

    # -- what a method defines ---------------------------------------------------------------------------------

    @abstractmethod
    def update_factors(self) -> Factors:
        """(U, V, core) in float32 at least with W' = W + U core V^T, exactly W before training."""

    @abstractmethod
    def orthonormal_factors(self) -> Factors:
        """`update_factors` with orthonormal columns in U and V."""

    def call_factors(self) -> tuple[Tensor, ...]:
        """What `adapted` computes from the Parameters, the core last: kept between calls in eval."""
        return self.update_factors()

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """x W'^T + b by the factors."""

    @abstractmethod
    def new_adapter(self) -> dict[str, nn.Parameter]:
        """The Parameters of an adapter that changes nothing yet."""

    @abstractmethod
    def flipped(self, values: dict[str, Tensor], signs: Tensor) -> dict[str, Tensor]:
        """An adapter's values that mean in the basis (s_i u_i, s_i v_i) what the given ones mean in (u_i, v_i)."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What an adapter file says of this layer, as plain JSON values; see adapters/file_format.py."""

    @abstractmethod
    def summary(self) -> str:
        """Ranks and choices in a few words, for `InjectReport`."""

    # -- where the frozen tensors are --------------------------------------------------------------------------

    @property
    @abstractmethod
    def base_weight(self) -> Tensor:
        """The untouched pretrained weight W (d_out, d_in)."""

    @property
    @abstractmethod
    def bias(self) -> nn.Parameter | None:
        """The base layer's b (d_out,), frozen."""

    @abstractmethod
    def frozen(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """(W, U, V, b); W is None where reading it takes work."""

    @abstractmethod
    def places(self) -> list[tuple[Mapping[str, Any], str]]:
        """(dictionary, key) of every tensor that W' is computed from."""

    @abstractmethod
    def fixed(self, x: Tensor) -> Tensor:
        """What an idle adapter computes: x W^T + b, or with a merged W'."""

    def hold_basis(self, found: Factorization, config: Config, dtype: torch.dtype) -> None:
        """Makes U, sigma and V of a weight of `dtype` attributes of the layer."""
        self.store({name: getattr(found, name) for name in BASIS})

    def store(self, basis: Mapping[str, Tensor]) -> None:
        for name, tensor in basis.items():
            # frozen parameters, not buffers: DDP broadcasts buffers, even non-persistent ones, every step
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def as_kept(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names under which the layer keeps them, those of `values` (U, sigma, V) that it keeps."""
        return dict(values)

    def replace_basis(self, values: Mapping[str, Tensor]) -> None:
        """Overwrites the basis with `values` of the same shapes; called with gradients off."""
        for name, value in self.as_kept(values).items():
            assign(getattr(self, name), value)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has sharded the layer: its parameters are unsharded within a forward or backward only."""
        original = self.__dict__.get("_original")  # its weight stays sharded even then
        return is_sharded(self._parameters.get("weight")) or is_sharded(getattr(original, "weight", None))

    def forward(self, x: Tensor) -> Tensor:
        if self.bank is not None and (rows := self.bank.present()) is not None:
            return rows.adapted(self, x)
        if self.idle:
            return self.fixed(x)
        if self.composes and not self.training and not torch.is_grad_enabled():
            made = self.cache.made
            if made is not None and x.dtype == made.dtype and not torch.compiler.is_dynamo_compiling():
                if not torch.is_autocast_enabled(x.device.type) and made.holds(self):
                    return F.linear(x, made.weight, made.bias)  # type: ignore[arg-type]
            weight = self.cache.composed_for(self, x)
            if weight is not None:
                return F.linear(x, weight, self.bias)
        return self.adapted(x)

    # -- values ------------------------------------------------------------------------------------------------

    @property
    def first_trained(self) -> nn.Parameter:
        """One of the trained Parameters; all have the same dtype, device and type."""
        parameter = self._parameters[self.trained_names[0]]
        assert parameter is not None
        return parameter

    @property
    def strength(self) -> float:
        """By which the adapter in use is scaled, see `set_strength`."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if strength != self._strength:
            self._strength = strength
            self.forget()
            structure.changed()  # roots batch their layers by strength

    def adapter(self) -> dict[str, nn.Parameter]:
        """The Parameters that train, by `trained_names`."""
        return {key: p for key in self.trained_names if (p := self._parameters[key]) is not None}

    @property
    def weight(self) -> Tensor:
        """The effective weight W' (d_out, d_in) in the base weight's dtype, differentiable; SSVD computes its core
        once per forward of the model, SpectralFT its factors at each access."""
        return self.composed_weight()

    def composed_weight(self) -> Tensor:
        """What `weight` reads; a method, because torch.compile traces no property through super()."""
        try:
            return self.effective_weight()
        except AttributeError as error:  # nn.Module would look for a Parameter `weight` instead
            raise RuntimeError(f"the effective weight could not be composed: {error}") from error

    def effective_weight(self) -> Tensor:
        return self.cache.composed(self) if self.composes and self.cache.serves(self) else self.compose()

    def compose(self) -> Tensor:
        """W + U core V^T (d_out, d_in), computed in float32 at least and rounded once to the base weight's dtype."""
        with unseen_by_checkpoints():
            return compose(self.base_weight, *self.update_factors())

    def forget(self) -> None:
        """Drops what is cached between calls."""
        self.cache.forget()

    # -- the basis ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_basis(self, U: Tensor, sigma: Tensor, V: Tensor) -> None:
        """Replaces the basis by another of the same weight and shapes, e.g. an adapter's own."""
        values = dict(zip(BASIS, (U, sigma, V)))
        for name, value in values.items():
            present: Tensor = getattr(self, name)
            if value.shape != present.shape:
                raise ValueError(
                    f"`{name}` must have the layer's own shape {tuple(present.shape)}, got {tuple(value.shape)}"
                )
        self.replace_basis(values)
        self.recognise_basis()
        self.forget()

    @torch.no_grad()
    def flip_basis(self, signs: Tensor) -> None:
        """Multiplies each pair (u_i, v_i) by signs[i] = +-1: the same W, and the basis that loaded values mean."""
        pairs = {name: gathered(getattr(self, name)) for name in ("U", "V")}
        self.replace_basis({name: tensor * signs.to(tensor.device, tensor.dtype) for name, tensor in pairs.items()})
        self.basis = self.basis._replace(sketch=self.basis.sketch * signs)
        self.forget()

    def recognise_basis(self) -> None:
        """Identifies changed U and V; gap 0 marks a basis that factorising W does not give (see `save_adapter`)."""
        found, known = sketch(gathered(self.U), gathered(self.V)), self.basis
        same = match_signs(known.sketch, found) is not None
        self.basis = BasisIdentity(fingerprint_of(gathered(self.base_weight)), known.gap if same else 0.0, found)

    # -- nn.Module ---------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Adapter:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Adapter:
        self.forget()
        structure.changed()  # roots batch their layers by dtype and device
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        structure.changed()  # assign=True may bring another dtype or device
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
