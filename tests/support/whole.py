"""For tests of modules that train whole beside the adapted layers (`modules_to_save`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssvd_kernels as sk

SAVED = ["norm", "rnn", "head"]
PARTS = ["norm", "rnn", "head.0", "head.2"]


class Net(nn.Module):
    """Two linear layers, batch statistics, a recurrent layer, and a head that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.norm, self.rnn = nn.BatchNorm1d(6), nn.LSTM(6, 4)
        self.head = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5))
        self.norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.norm(self.down(torch.tanh(self.up(x)))))[0])


def x(seed: int = 0) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def output(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(x())


def injected(net: nn.Module, **options) -> nn.Module:
    sk.inject(net, sk.SSVDConfig(**{"rank": 3, "modules_to_save": SAVED, **options}), progress=False)
    return net


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.05)


def train(net: nn.Module, steps: range = range(3), by: torch.optim.Optimizer | None = None) -> nn.Module:
    by = by or optimizer(net)
    for step in steps:
        by.zero_grad()
        net.train()(x(step)).square().mean().backward()
        by.step()
    return net


def values(net: nn.Module) -> dict[str, Tensor]:
    """What the modules hold that train whole, under their plain keys, and what the layers train."""
    state = {key: value.clone() for key, value in net.state_dict().items() if "parked" not in key}
    frozen = tuple(f"{layer}.{key}" for layer in ("up", "down") for key in ("weight", "bias", "U", "sigma", "V"))
    return {key: value for key, value in state.items() if key not in frozen}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
