"""The inactive adapters of a layer, or of a module that trains whole (see adapters/switching.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TRAINED = ("theta", "theta_out", "delta_sigma")  # an adapter's Parameters, by their names in an SSVDLinear
BASE = "__base__"  # no adapter can have this name


class InactiveAdapter(nn.ParameterDict):
    """One adapter's Parameters and buffers, frozen for now; `trainable` names those that required a gradient."""

    def __init__(self, tensors: Mapping[str, Tensor], strength: float = 1.0) -> None:
        super().__init__({key: tensor for key, tensor in tensors.items() if isinstance(tensor, nn.Parameter)})
        for key, tensor in tensors.items():
            if key not in self:
                self.register_buffer(key, tensor)
        self.trainable = tuple(key for key, tensor in tensors.items() if tensor.requires_grad)
        self.strength = strength
        self.requires_grad_(False)

    def released(self) -> dict[str, Any]:
        """The tensors, requiring gradients as before."""
        return {key: tensor.requires_grad_(key in self.trainable) for key, tensor in own_tensors(self).items()}


class InactiveAdapters(nn.ModuleDict):
    """Name -> InactiveAdapter, sorted by name, so that the order of parameters does not depend on what was used before.

    The layer has the adapter in use under its plain keys, "theta" and so on: the state dict must tell which one it is.
    """

    def __init__(self, in_use: str, adapters: Mapping[str, InactiveAdapter]) -> None:
        super().__init__(dict(sorted(adapters.items())))
        self.in_use = in_use

    def __getstate__(self) -> dict[str, Any]:
        if self.in_use == BASE:
            raise RuntimeError("a model with `modules_to_save` cannot be copied or saved within disable_adapter")
        return self.__dict__

    def get_extra_state(self) -> Tensor:
        """All names, that of the adapter in use first, as UTF-8 bytes in a tensor, which every format can store."""
        self.__getstate__()
        return torch.tensor(list("\n".join([self.in_use, *self]).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: `other_adapters` compares the names before any tensor is loaded."""


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Key -> Parameter or persistent buffer that `module` itself holds."""
    buffers = {key: b for key, b in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: tensor for key, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def park(module: nn.Module, in_use: str, adapters: Mapping[str, InactiveAdapter]) -> None:
    """Makes `adapters` the inactive ones of `module`."""
    module._modules.pop("parked", None)
    if adapters:
        module.add_module("parked", InactiveAdapters(in_use, adapters).train(module.training))


def other_adapters(state_dict: Mapping[str, Any], prefix: str, mine: Sequence[str], first: str) -> str | None:
    """Why a layer with the adapters `mine`, the one in use first, cannot load its part of a state dict; None if it can.

    The key "theta" (`first`, the first of an adapter's Parameters) means the adapter in use, so a layer that uses
    another one would load it into the wrong adapter.
    """
    names = state_dict.get(f"{prefix}parked._extra_state")
    theirs = mine[:1] if names is None else bytes(names.tolist()).decode().split("\n")
    if f"{prefix}{first}" not in state_dict or list(mine) == list(theirs):
        return None
    shown = "a single adapter" if names is None else f"the adapters {theirs}"
    return (
        f"{prefix[:-1]} has the adapters {list(mine)}, the first of them in use, and the state dict {shown}: "
        "add and set the same ones before loading"
    )
