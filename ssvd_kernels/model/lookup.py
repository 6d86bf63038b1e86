"""Finds adapted layers in a model, also through wrappers, and refuses models that cannot be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.adapter import Adapter
from ..layers.base import AdaptedLinear, adapted_layers, module_paths, own_layers
from ..layers.inactive import InactiveAdapters
from ..layers.saved import SavedModule
from ..layers.ssvd import SSVDAdapter


def ssvd_layers(model: nn.Module) -> dict[str, SSVDAdapter]:
    """Name -> layer for every layer of `model` that is adapted by SSVD (or SVFT)."""
    return {name: layer for name, layer in adapted_layers(model).items() if isinstance(layer, SSVDAdapter)}


def require_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`adapted_layers` of the model within wrappers; ValueError if there is none, or if PEFT put them there."""
    layers = own_layers(unwrapped(model))
    if not layers:
        raise ValueError(f"`model` ({type(model).__name__}) has no SSVD layer: call inject() first")
    return layers


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """Name -> view of every module of the model within wrappers that trains whole, see `SSVDConfig.modules_to_save`."""
    return {
        name: SavedModule(module)
        for name, module in module_paths(unwrapped(model))
        if isinstance(module._modules.get("parked"), InactiveAdapters) and not isinstance(module, Adapter)
    }


def unsharded_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """`require_layers`, or ValueError if FSDP2 has sharded one."""
    layers = require_layers(model)
    for name, layer in layers.items():
        if layer.sharded:
            raise ValueError(
                f"{name} is sharded by FSDP2: call save_adapter() and load the adapter into an unsharded model"
            )
    return layers


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel's or torch.compile's wrapper: an adapter names its layers."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def replace_modules(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Puts new modules in the place of others, under every path that these are registered under."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]


def check_not_ddp(model: nn.Module) -> None:
    """Raises ValueError for a model that DDP has looked over already: it would not see new parameters."""
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "`model` is wrapped in DistributedDataParallel: inject, load or switch adapters first, then wrap it"
        )
