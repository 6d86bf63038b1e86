"""For tests of several named adapters on one model."""

from __future__ import annotations

import copy

from roundtrip import train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk


def injected(base: nn.Module, seed: int = 1, **options) -> nn.Module:
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(**{"rank": 5, **options}), progress=False)
    train_randomly(net, seed)
    return net


def with_adapters(base: nn.Module, *names: str, **options) -> nn.Module:
    """An injected model with "default", in use, and the named adapters, all of them trained otherwise."""
    net = injected(base, **options)
    for seed, name in enumerate(names, start=7):
        sk.add_adapter(net, name)
        sk.set_adapter(net, name)
        train_randomly(net, seed)
    sk.set_adapter(net, "default")
    return net


def values(net: nn.Module, name: str) -> list[Tensor]:
    return [p.detach().clone() for layer in sk.ssvd_layers(net).values() for p in layer.adapter(name).values()]
