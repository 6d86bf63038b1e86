"""The inactive adapters of a layer (see adapters/switching.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TRAINED = ("theta", "theta_out", "delta_sigma")  # an adapter's Parameters, by their names in an SSVDLinear


class InactiveAdapter(nn.ParameterDict):
    """One adapter's Parameters, frozen for now; `trainable` names those that required a gradient."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(dict(parameters))
        self.trainable = tuple(key for key, parameter in parameters.items() if parameter.requires_grad)
        self.requires_grad_(False)

    def released(self) -> dict[str, nn.Parameter]:
        """The Parameters, requiring gradients as before."""
        return {key: parameter.requires_grad_(key in self.trainable) for key, parameter in self.items()}


class InactiveAdapters(nn.ModuleDict):
    """Name -> InactiveAdapter, sorted by name, so that the order of parameters does not depend on what was used before.

    The layer has the adapter in use under its plain keys, "theta" and so on: the state dict must tell which one it is.
    """

    def __init__(self, in_use: str, adapters: Mapping[str, InactiveAdapter]) -> None:
        super().__init__(dict(sorted(adapters.items())))
        self.in_use = in_use

    def get_extra_state(self) -> Tensor:
        """All names, that of the adapter in use first, as UTF-8 bytes in a tensor, which every format can store."""
        return torch.tensor(list("\n".join([self.in_use, *self]).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: `other_adapters` compares the names before any tensor is loaded."""


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
