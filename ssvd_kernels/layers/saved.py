"""Modules that train whole beside the adapted layers (`modules_to_save`). Every adapter has its own tensors for them.

Those in use are where the model has them; those of other adapters and of the base model are parked in their module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inactive import BASE, InactiveAdapter, own_tensors, park


class SavedModule:
    """A view of a module that trains whole: the name of the adapter in use, or BASE, and what the others hold."""

    def __init__(self, module: nn.Module) -> None:
        parked: Any = module._modules["parked"]
        self.module, self.in_use = module, parked.in_use
        self.others: dict[str, InactiveAdapter] = dict(parked)

    @staticmethod
    def train_whole(module: nn.Module) -> None:
        """Parks what the frozen `module` itself holds as the base model's, and puts a copy that trains in its place."""
        tensors = own_tensors(module)
        park(module, "default", {BASE: InactiveAdapter(tensors)})
        _put(module, _copies(tensors))

    def adapter(self, name: str) -> dict[str, Tensor]:
        """Key -> Parameter or buffer of an adapter, or of BASE."""
        return own_tensors(self.module if name == self.in_use else self.others[name])

    def strength_of(self, name: str) -> float:
        """These tensors count once, whatever the adapter's strength."""
        return 1.0

    def use(self, name: str) -> None:
        """Puts the tensors of an adapter, or of BASE, in their place."""
        if name != self.in_use:
            entering = self.others.pop(name)
            self.others[self.in_use] = InactiveAdapter(own_tensors(self.module))
            _put(self.module, entering.released())
            self.in_use = name
            park(self.module, name, self.others)

    @torch.no_grad()
    def add(self, name: str, values: Mapping[str, Tensor]) -> None:
        """A new adapter: `values`, or else the base model's."""
        new = _copies(self.adapter(BASE))
        for key, value in values.items():
            new[key].copy_(value)
        self.others[name] = InactiveAdapter(new)
        park(self.module, self.in_use, self.others)

    def delete(self, name: str) -> None:
        """Deletes an adapter that is not in use."""
        del self.others[name]
        park(self.module, self.in_use, self.others)

    def end(self) -> None:
        """Makes the module an ordinary one that holds what is in use, frozen."""
        del self.module._modules["parked"]
        self.module.requires_grad_(False)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that train, and buffers."""
    copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    return {key: nn.Parameter(copy) if isinstance(tensors[key], nn.Parameter) else copy for key, copy in copies.items()}


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        setattr(module, key, tensor)  # as others do: a recurrent layer keeps a list of its Parameters
