"""AdaptedLinear: what all adapted layers that replace a linear layer share, whatever they train."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..basis.factorize import BASIS, Factorization
from ..config import Config
from ..utils.fsdp import is_sharded
from .adapter import Adapter
from .base_layer import BASES, BaseLayer
from .inactive import InactiveAdapter, other_adapters
from .merging import merged_weight


class AdaptedLinear(Adapter):
    """A frozen linear layer with adapters, of which one is in use: base of `SSVDLinear` and `SpectralFTLinear`."""

    base_layer: ClassVar[BaseLayer] = BaseLayer()
    _merged_weight: Tensor | None

    def __init__(self, linear: nn.Linear, config: Config, factorization: Factorization | None = None) -> None:
        super().__init__(self.base_layer.read(linear), config, factorization)
        self.base_layer.attach(self, linear)
        self.active_adapter = "default"  # see adapters/switching.py
        self.register_buffer("_merged_weight", None, persistent=False)
        self.training = linear.training

    @property
    def base_weight(self) -> Tensor:
        return self.base_layer.weight(self)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias(self)

    @property
    def weight(self) -> Tensor:
        """`Adapter.weight`; outside the forward of a layer that FSDP2 has sharded, the sharded base weight, which FSDP2
        looks up by this name."""
        if is_sharded(self._parameters.get("weight")):
            self.original()  # takes over the sharded Parameters and releases the unsharded ones
            return self.base_weight
        return self.composed_weight()

    def effective_weight(self) -> Tensor:
        if self._merged_weight is not None:
            return self._merged_weight
        if self.disabled:
            return self.base_weight.detach().clone()  # callers may write into it
        return super().effective_weight()

    def frozen(self) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        own: dict[str, Any] = self._parameters
        return own["weight"], own["U"], own["V"], own["bias"]

    def places(self) -> list[tuple[Mapping[str, Any], str]]:
        own = self._parameters
        return [(own, name) for name in ("weight", "bias", *BASIS, *self.trained_names) if own.get(name) is not None]

    def fixed(self, x: Tensor) -> Tensor:
        merged = self._merged_weight
        if merged is not None and self.training and torch.is_grad_enabled() and self.first_trained.requires_grad:
            kind = type(self).__name__
            raise RuntimeError(f"this {kind} is merged and would not train: call unmerge() first, or eval()")
        weight = self.base_weight if merged is None else merged
        return self.base_layer.product(self, x, weight)

    # -- adapters ----------------------------------------------------------------------------------------------

    @property
    def inactive(self) -> dict[str, InactiveAdapter]:
        """The adapters that are not in use, by name: the submodule `parked`, which exists only if there are any."""
        return dict(self._modules.get("parked") or {})  # type: ignore[arg-type]

    def adapter_names(self) -> list[str]:
        """The adapter in use, then the others."""
        return [self.active_adapter, *self.inactive]

    def adapter(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """The Parameters, by `trained_names`, of the adapter `name`, or of the one in use."""
        if name is None or name == self.active_adapter:
            return super().adapter()
        if name not in self.inactive:
            raise ValueError(f"`adapter` must be one of {', '.join(map(repr, self.adapter_names()))}, got {name!r}")
        parked = self.inactive[name]
        return {key: parked[key] for key in self.trained_names if key in parked}

    def strength_of(self, name: str | None = None) -> float:
        """The strength of the adapter `name`, or of the one in use."""
        return self.strength if name in (None, self.active_adapter) else self.inactive[name].strength

    def set_strength(self, strength: float, name: str | None = None) -> None:
        """Of the adapter `name`, or of the one in use."""
        if name in (None, self.active_adapter):
            self.strength = strength
        else:
            self.inactive[name].strength = strength

    # -- merging -----------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the forward uses a fixed W' composed by `merge`."""
        return self._merged_weight is not None

    @property
    def disabled(self) -> bool:
        """Whether the forward is the base layer's."""
        return self.idle and not self.merged

    @disabled.setter
    def disabled(self, value: bool) -> None:
        self.idle = value or self.merged

    def composed_for_merge(
        self, name: str = "weight", rounding: str = "nearest", unload: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """W' as `merge(model, unload)` stores it, see `merged_weight`; for a merged layer the one in use."""
        if self._merged_weight is not None:
            return self._merged_weight
        refusal = None if unload else self.base_layer.merge_refusal(name)
        if self.disabled:
            refusal = f"merging {name} while its adapter is disabled: leave the disable_adapter block first"
        if refusal is not None:
            raise ValueError(refusal)
        return merged_weight(self.base_weight, *self.update_factors(), rounding, name, dtype)

    def merge(self, composed: Tensor | None = None, *, rounding: str = "nearest") -> None:
        """Uses W' as a fixed weight from now on; W is kept, so `unmerge` is exact and state dicts never hold W'.

        rounding: see `ssvd_kernels.merge`; `composed` is a W' that `composed_for_merge` has made already.
        """
        if self._merged_weight is None:
            self._merged_weight = self.composed_for_merge(rounding=rounding) if composed is None else composed
            self.idle = True
            self.forget()

    def unmerge(self) -> None:
        """Goes back to W + U core V^T computed at each forward."""
        if self._merged_weight is not None:
            self._merged_weight, self.idle = None, False

    def unloaded(self, weight: Tensor) -> nn.Linear:
        """The plain layer that `merge(model, unload=True)` leaves: one with W' for a weight."""
        return self.base_layer.unloaded(self, weight)

    def original(self) -> nn.Linear:
        """The layer that this one was made from, with the present (base) weight and bias."""
        return self.base_layer.original(self)

    # -- nn.Module ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLinear:
        before = self.first_trained.dtype
        super()._apply(fn, recurse)
        now = self.first_trained.dtype
        if now != before and now.itemsize < 4:
            warnings.warn(  # once, not for each layer
                f"{' and '.join(self.adapter())} of {self.config_type.method} layers were rounded from {before} to "
                f"{now}, in which an optimizer's small steps are lost: cast the model before adapting it",
                stacklevel=2,
            )
        self.original()  # takes over the present Parameters
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "idle": self.merged, "bank": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuses another base weight without its basis, and any load while merged: both would be silently wrong."""
        if self.merged:
            refusal: str | None = f"{prefix[:-1]} is merged: unmerge before loading"
        else:
            refusal = other_adapters(state_dict, prefix, self.adapter_names(), self.trained_names[0])
            refusal = refusal or self.base_layer.load_refusal(self, state_dict, prefix)
        if refusal is not None:
            error_msgs: list[str] = args[-1]
            error_msgs.append(refusal)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(f"{prefix}{name}" in state_dict for name in BASES):
            self.recognise_basis()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}{', merged' if self.merged else ''}"


def adapted_layers(model: nn.Module) -> dict[str, Adapter]:
    """Name -> layer for every adapted layer of `model`, whatever the method."""
    return {name: module for name, module in module_paths(model) if isinstance(module, Adapter)}


def module_paths(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, by the names that modules have where torch.compile has not wrapped them."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def own_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`adapted_layers`; ValueError if another library manages them: this package's functions would interfere."""
    layers: dict[str, AdaptedLinear] = {}
    for name, layer in adapted_layers(model).items():
        if not isinstance(layer, AdaptedLinear):
            raise ValueError(
                f"{name} was adapted through {layer.managed_by}: use that library's own functions for saving, "
                "loading, merging, exporting and switching"
            )
        layers[name] = layer
    return layers


def check_not_adapted(model: nn.Module) -> None:
    """Raises ValueError for a model that has adapted layers already, of this package or of PEFT."""
    present = own_layers(model)
    if present:
        raise ValueError(
            f"model has {len(present)} SSVD layers already, e.g. {next(iter(present))!r}: remove() them first"
        )
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in module_paths(model):
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(
                f"{name} was adapted through PEFT, whose parameters would be frozen: unload() or merge_and_unload() "
                "them first, or add SSVD to the PEFT model by SSVDPeftConfig"
            )
