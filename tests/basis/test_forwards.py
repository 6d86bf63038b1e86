"""Which subclasses of nn.Linear are adapted: those that compute what it does, or cast W and b to x's dtype besides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from ssvd_kernels.basis.forwards import casts
from ssvd_kernels.basis.linears import is_linear


class Casting(nn.Linear):
    """Written as such layers are; with names of its own, which change nothing."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.layer_index = 3

    def forward(self, inputs: Tensor) -> Tensor:
        bias = self.bias.to(inputs.dtype) if self.bias is not None else None
        return F.linear(inputs, self.weight.type(inputs.dtype), bias)


class Renamed(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)


class Impostor(nn.Linear):
    """Calls `compute(self, x)`."""

    compute = None
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return type(self).compute(self, x)


def without_autocast(self, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return self.linear(x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return -dy


Impostor.linear = nn.Linear.forward
IMPOSTORS = {
    "activation": lambda self, x: self.linear(x).relu(),
    "clamp": lambda self, x: self.linear(x).clamp(-500, 500),
    "residual": lambda self, x: F.linear(x, self.weight, self.bias) + F.linear(x, 1e-6 * self.weight),
    "equalised": lambda self, x: F.linear(x, self.weight * self.in_features**-0.5, self.bias),
    "noise": lambda self, x: F.linear(x, self.weight + 1e-3 * torch.randn_like(self.weight), self.bias),
    "dropout": lambda self, x: self.linear(F.dropout(x, 0.1, self.training)),
    "always in float32": lambda self, x: F.linear(x.float(), self.weight, self.bias),
    "and back": lambda self, x: F.linear(x.float(), self.weight, self.bias).to(x.dtype),
    "in the weight's dtype": lambda self, x: F.linear(x.to(self.weight.dtype), self.weight, self.bias),
    "rounded": lambda self, x: F.linear(x, self.weight.bfloat16().to(x.dtype), self.bias.to(x.dtype)),
    "without autocast": without_autocast,
    "without bias": lambda self, x: F.linear(x, self.weight),
    "detached": lambda self, x: self.linear(x.detach()),
    "reversed gradient": lambda self, x: Reversed.apply(self.linear(x)),
    "scaled by the instance": lambda self, x: self.linear(x) * self.scale,
    "tuple": lambda self, x: (self.linear(x), None),
}


def impostor(name: str) -> nn.Linear:
    return type(name, (Impostor,), {"compute": IMPOSTORS[name]})(8, 8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Renamed, Casting])
def test_the_same_function_is_adapted(kind, bias):
    for dtype in (torch.float32, torch.bfloat16):
        linear = kind(6, 4, bias, dtype=dtype)
        state = torch.random.get_rng_state()
        assert is_linear(linear) and casts(linear) == (kind is Casting)
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", IMPOSTORS)
def test_another_function_is_not(name):
    linear = impostor(name)
    linear.scale = 2.0
    assert not is_linear(linear)


def test_a_forward_with_values_of_its_own_is_not():
    """Not even where they change nothing yet, as a low-rank update that starts at zero."""
    update = impostor("scaled by the instance")
    update.down = nn.Parameter(torch.zeros(8, 8))
    off, noise = type("Off", (Impostor,), {"compute": lambda self, x: self.linear(x) * self.gain})(8, 8), Casting(8, 8)
    off.gain = 1.0
    noise.register_buffer("noise", torch.zeros(8))
    assert not any(map(is_linear, (update, off, noise)))
    assert is_linear(impostor("scaled by the instance"))


def test_parametrised_weights_are_not():
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm):
        assert not is_linear(wrap(Casting(8, 8)))
