"""The layer with which PEFT replaces an nn.Linear: named SSVD adapters over one base weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapters.file_format import AdapterError
from ..basis.factorize import BASIS, SAFE_GAP, SKETCH_ROWS, Factorization, factorize, match_signs
from ..basis.forwards import casts
from ..basis.linears import base_weight, check_adaptable, features
from ..basis.pointwise import channels_of, like
from ..config import SSVDConfig, check_strength
from ..layers.activation import ActivationForm
from ..layers.adapt import check_basis, in_activation_form
from ..layers.merging import merged_weight
from ..layers.running import structure
from ..layers.ssvd import SSVDAdapter
from ..ops.functional import compose, ssvd_linear

BASE = "__base__"  # PEFT's name for no adapter
_FORMAT_VERSION = 1
_FINGERPRINT_BYTES = 16


class MixedBatch(NamedTuple):
    """PEFT's `adapter_names`: one for each input, and how often generate() repeats an input."""

    names: Sequence[str]
    times: set[int]


class SSVDPeftLinear(nn.Module, BaseTunerLayer):
    """y = x W'^T + b with W' = W + sum of U core V^T over the active adapters; x (..., d_in) -> y (..., d_out).

    Several active adapters add up their updates, as PEFT's additive methods do. `weight` is W', differentiable, so
    that modules which read it instead of calling the layer (WavLM's attention) train theta, too. `merge` puts W' in
    the base layer's weight and keeps W, so `unmerge` is exact; it always refuses NaN and infinity, which leaves
    nothing for PEFT's `safe_merge` to add. Raises TypeError for a base layer that is no nn.Linear.
    """

    adapter_layer_names = ("ssvd_adapter",)
    other_param_names = ()
    quantized = False

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        check_adaptable(base_layer, name)
        self.training = base_layer.training
        self.base_layer: nn.Linear = base_layer  # type: ignore[assignment]
        self.name = name
        self.in_features, self.out_features = features(base_layer)
        self.ssvd_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.running: list[PeftAdapter] = []  # what the forward applies: active, not disabled, not merged
        self.mixed: MixedBatch | None = None  # during a call with adapter names
        self._unmerged: Tensor | None = None  # W, while the base layer's weight is W'

    def update_layer(
        self, adapter_name: str, config: SSVDConfig, strength: float = 1.0, inference_mode: bool = False
    ) -> None:
        """Adds an adapter that changes nothing yet. Raises ValueError if its rank does not fit."""
        try:
            k = config.triplets(self.in_features, self.out_features)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        activation = in_activation_form(self.base_layer, config, self.name)
        found = self._factorization(k, activation)
        activation = in_activation_form(self.base_layer, config, self.name, found)
        check_basis(self.base_layer, config, found, self.name)
        adapter = (PeftActivationAdapter if activation else PeftAdapter)(self, config, found, strength)
        for other in self._adapters():
            adapter.share_basis(other)
        self.ssvd_adapter[adapter_name] = adapter
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @torch.no_grad()
    def draw(self, adapter_name: str) -> None:
        """Draws all that the adapter trains from a normal distribution of standard deviation 0.02."""
        for parameter in self.ssvd_adapter[adapter_name].parameters():
            parameter.normal_(std=0.02)

    def _factorization(self, k: int, rounded: bool) -> Factorization:
        """rounded: whether that of an adapter in the activation form does, of which one basis is rounded."""
        for adapter in self._adapters():
            if adapter.k == k and adapter.basis.gap >= SAFE_GAP and (rounded or adapter.composes):
                return Factorization(adapter.U, adapter.sigma, adapter.V, *adapter.basis)
        return factorize(self.base_weight, k, f"{self.name}.weight")

    def _adapters(self) -> list[PeftAdapter]:
        return list(self.ssvd_adapter.values())  # type: ignore[arg-type]

    def _choose(self) -> None:
        """After any change of what is active, disabled or merged."""
        off = self.disable_adapters or self.merged
        self.running = [] if off else self._active()
        for adapter in self._adapters():
            adapter.idle = not any(adapter is each for each in self.running)
            if adapter.idle:
                adapter.forget()  # a composed weight each

    @property
    def base_weight(self) -> Tensor:
        """The untouched pretrained weight W (d_out, d_in)."""
        return base_weight(self.base_layer, self.name) if self._unmerged is None else self._unmerged

    @property
    def weight(self) -> Tensor:
        """The effective weight W' (d_out, d_in) in the base weight's dtype, differentiable."""
        running = self.running
        if len(running) == 1:
            return running[0].weight
        if not running:
            merged = self.merged and not self.disable_adapters
            return base_weight(self.base_layer) if merged else self.base_weight.detach().clone()
        return compose(self.base_weight, *_sum(running))

    def forward(self, x: Tensor) -> Tensor:
        if self.mixed is not None and not self.disable_adapters:
            return self._mixed(x, *self.mixed)
        running = self.running
        if len(running) == 1:
            return running[0].forward(x)
        if running:
            W = self.base_weight
            rows = x.movedim(running[0].channels, -1)
            y = ssvd_linear(rows, W.to(x.dtype) if running[0].casts else W, *_sum(running), self.base_layer.bias)
            return y.movedim(-1, running[0].channels)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.base_layer(x)

    def _mixed(self, x: Tensor, names: Sequence[str], times: set[int]) -> Tensor:
        """Each row of x (B, ...) by the adapter that is named for it, those of one together. Errors in PEFT's words."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        repeated, rest = divmod(len(x), len(names))
        if rest or repeated not in times:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        rows: dict[str, list[int]] = {}
        for row in range(len(x)):
            rows.setdefault(names[row // repeated], []).append(row)
        parts = [
            (self.ssvd_adapter[name].adapted if name in self.ssvd_adapter else self.base_layer)(x[own])  # type: ignore
            for name, own in rows.items()
        ]
        order = torch.tensor([row for own in rows.values() for row in own], device=x.device)
        return torch.cat(parts)[order.argsort()]

    # -- what PEFT calls ---------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._choose()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._choose()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        structure.changed()
        self._choose()

    def set_scale(self, adapter: str, scale: float) -> None:
        """The adapter counts `scale` times its configuration's strength, see `ssvd_kernels.set_strength`."""
        if adapter in self.ssvd_adapter:
            found: PeftAdapter = self.ssvd_adapter[adapter]  # type: ignore[assignment]
            found.strength = check_strength(scale * found.configured_strength)

    def scale_layer(self, scale: float) -> None:
        """The active adapters count `scale` times as much as before."""
        for adapter in self._active():
            adapter.strength = check_strength(scale * adapter.strength)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`, or all changes of the active adapters' strengths."""
        for adapter in self._active():
            changed = adapter.configured_strength if scale is None else adapter.strength / scale
            adapter.strength = check_strength(changed)

    def _active(self) -> list[PeftAdapter]:
        return [self.ssvd_adapter[name] for name in self.active_adapters if name in self.ssvd_adapter]  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self._to_merge(adapter_names)
        if not names:
            return
        together = [*self.merged_adapters, *names]
        merged = self._merged_weight(together)
        self._unmerged = self.base_weight.data
        self._put(merged)
        self.merged_adapters = together
        self._choose()

    def _put(self, matrix: Tensor) -> None:
        weight = self.base_layer.weight
        weight.data = matrix if isinstance(self.base_layer, nn.Linear) else like(weight, matrix, self.base_layer)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ssvd_adapter]

    @torch.no_grad()
    def _merged_weight(self, names: list[str], dtype: torch.dtype | None = None) -> Tensor:
        adapters: list[PeftAdapter] = [self.ssvd_adapter[name] for name in names]  # type: ignore[misc]
        return merged_weight(self.base_weight, *_sum(adapters), "nearest", self.name, dtype)

    def unmerge(self) -> None:
        if self._unmerged is not None:
            self._put(self._unmerged)
        self._unmerged, self.merged_adapters = None, []
        self._choose()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update has rank k: PEFT's `convert_to_lora(model, rank=k)` is exact."""
        return True

    def get_delta_weight(self, adapter: str) -> Tensor:
        """U core V^T (d_out, d_in) in float32 at least."""
        U, V, core = _sum([self.ssvd_adapter[adapter]])  # type: ignore[list-item]
        return U @ core @ V.mT

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Not to its dtype, as PEFT's own would: a reloaded theta would be rounded to a bf16 base's."""
        adapter = self.ssvd_adapter[adapter_name] if adapter_name in self.ssvd_adapter else None
        if isinstance(adapter, PeftAdapter) and not adapter.theta.is_meta:
            adapter.to(device or self.base_layer.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SSVDPeftLinear:
        """Also moves what is not registered: W while merged, and the bases, which stay shared and are not rounded."""
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for adapter in self._adapters():
            for name in adapter.stored:
                tensor: Tensor = adapter.__dict__[name]
                if id(tensor) not in moved:
                    new = fn(tensor)
                    wide = torch.promote_types(new.dtype, tensor.dtype)
                    moved[id(tensor)] = tensor, new if new.dtype == wide else tensor.to(new.device)
                adapter.__dict__[name] = moved[id(tensor)][1]
        return self


class PeftAdapter(SSVDAdapter):
    """One adapter of an `SSVDPeftLinear`, whose base weight and bias it uses.

    State: theta, delta_sigma (theta_out) and, as extra state, the identity of its basis: format version, fingerprint
    of W (16 bytes), the sketch (6, k), and U, sigma, V where singular values lie too close to recompute them. U, sigma
    and V are plain attributes: neither saved nor counted nor emptied by PEFT, and shared by adapters of one rank.
    """

    layer: SSVDPeftLinear
    stored: tuple[str, ...]
    managed_by = "PEFT"

    def __init__(self, layer: SSVDPeftLinear, config: SSVDConfig, found: Factorization, strength: float = 1.0) -> None:
        self.__dict__["layer"] = layer  # not a submodule, but the other way round
        super().__init__(layer.base_weight, config, found)
        self.strength = self.configured_strength = strength
        self.training, self.casts = layer.training, casts(layer.base_layer)

    @property
    def quantized(self) -> bool:  # type: ignore[override]
        return self.layer.quantized

    def store(self, basis: Mapping[str, Tensor]) -> None:
        self.__dict__.update(basis, stored=tuple(basis))

    def share_basis(self, other: PeftAdapter) -> None:
        """Uses the tensors of `other`, if they are of the same basis."""
        own, theirs = self.__dict__, other.__dict__
        if self.stored == other.stored and all(torch.equal(own[name], theirs[name]) for name in self.stored):
            own.update({name: theirs[name] for name in self.stored})

    def replace_basis(self, values: Mapping[str, Tensor]) -> None:
        """By new tensors: other adapters share the present ones."""
        kept = self.as_kept(values)
        self.__dict__.update({name: value.to(getattr(self, name), copy=True) for name, value in kept.items()})

    @property
    def base_weight(self) -> Tensor:
        return self.layer.base_weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.layer.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base layer's weight holds this adapter's update."""
        return any(self.layer.ssvd_adapter[name] is self for name in self.layer.merged_adapters)

    def frozen(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        layer, own = self.__dict__["layer"], self.__dict__
        base = layer._modules["base_layer"]._parameters
        return None if layer.quantized else base["weight"], own["U"], own["V"], base["bias"]

    def places(self) -> list[tuple[Mapping[str, Any], str]]:
        frozen = self.layer.base_layer._parameters
        base = (
            [] if self.layer.quantized else [(frozen, name) for name in ("weight", "bias") if frozen[name] is not None]
        )
        trained = [(self._parameters, name) for name in self.adapter()]
        return [*base, *((self.__dict__, name) for name in self.stored), *trained]

    def fixed(self, x: Tensor) -> Tensor:
        return self.layer.base_layer(x)

    # -- state -------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """The identity of the basis as one vector in the basis' dtype."""
        parts = [torch.tensor([_FORMAT_VERSION, *bytes.fromhex(self.basis.fingerprint)]), self.basis.sketch.flatten()]
        if self.basis.gap < SAFE_GAP:
            parts += [getattr(self, name).detach().flatten().cpu() for name in BASIS]
        return torch.cat([part.to(self.sigma.dtype) for part in parts])

    def set_extra_state(self, state: Tensor) -> None:
        """Compares the basis that an adapter was trained on with this one, and repairs signs (in any order with theta).

        Raises AdapterError for another format, another base weight, or a basis that cannot be matched.
        """
        d_out, d_in, k, name = self.out_features, self.in_features, self.k, self.layer.name
        sizes = [1, _FINGERPRINT_BYTES, 2 * SKETCH_ROWS * k, d_out * k, k, d_in * k]
        if state.ndim != 1 or len(state) not in (sum(sizes[:3]), sum(sizes)):
            raise AdapterError(f"the adapter's basis for {name} must have rank {k}, got shape {tuple(state.shape)}")
        version, digest, flat_sketch, *basis = (
            state.detach().cpu().split(sizes if len(state) == sum(sizes) else sizes[:3])
        )
        if int(version) != _FORMAT_VERSION:
            raise AdapterError(
                f"the adapter must have format version {_FORMAT_VERSION}, got version {version.item():g}"
            )
        if bytes(digest.to(torch.uint8).tolist()).hex() != self.basis.fingerprint:
            raise AdapterError(
                f"the adapter was trained on another base model: the weight of {name} differs. If this model is a "
                "half-precision copy of that base, load the adapter before casting; if either is quantised, both must "
                "be quantised in the same way"
            )
        if basis:
            U, sigma, V = basis
            self.set_basis(U.view(d_out, k), sigma, V.view(d_in, k))
            return
        signs = match_signs(flat_sketch.view(-1, k).float(), self.basis.sketch)
        if signs is None:
            raise AdapterError(f"the singular vectors of {name} cannot be matched with those that were adapted")
        if bool((signs < 0).any()):
            self.flip_basis(signs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "theta" in state_dict and prefix + "_extra_state" not in state_dict:
            raise AdapterError(f"the adapter does not record the basis of {self.layer.name} it was trained with")
        if self.merged:
            args[-1].append(f"{prefix[:-1]} is merged: unmerge before loading")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class PeftActivationAdapter(ActivationForm, PeftAdapter):
    """`PeftAdapter` in the activation form."""

    def kept(self, name: str) -> Tensor | None:
        return self.__dict__.get(f"{name}h")

    @property
    def base(self) -> nn.Linear:  # type: ignore[override]
        return self.layer.base_layer

    @property
    def channels(self) -> int:  # type: ignore[override]
        return channels_of(self.base.weight)


def _sum(adapters: list[PeftAdapter]) -> tuple[Tensor, Tensor, Tensor]:
    """(U, V, core) of the sum of the adapters' updates U core V^T: bases side by side, cores along the diagonal."""
    if len(adapters) == 1:
        return adapters[0].U, adapters[0].V, adapters[0].core()
    U, V = (torch.cat([getattr(adapter, name) for adapter in adapters], dim=1) for name in ("U", "V"))
    return U, V, torch.block_diag(*[adapter.core() for adapter in adapters])
