"""For tests of errors: a small model of mixed modules, and the check that a refused call changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import models
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

inject = partial(models.inject, rank=3)


class Net(nn.Module):
    """Two linear layers, one of them tied to an embedding, a convolution, and a linear-like module of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 1)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.down.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def parts(model: nn.Module) -> tuple:
    """Of what a model is made, but for the values."""
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(m.__dict__)) for m in model.modules()]
    parameters = [(name, id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    return modules, hooks, parameters, [name for name, _ in model.named_buffers()]


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """The block raises `error` with a message that fits, and `model` is as before in every respect."""

    def values() -> dict[str, Tensor]:
        entries = model.state_dict().items()
        plain = {name: t.dequantize() if is_traceable_wrapper_subclass(t) else t for name, t in entries}
        return {name: t if t.is_meta else t.nan_to_num(9e9) for name, t in plain.items()}

    old, before = values(), parts(model)
    with pytest.raises(error, match=match):
        yield
    now = values()
    assert parts(model) == before and list(now) == list(old)
    for name, value in old.items():
        assert value.is_meta or torch.equal(now[name], value), name
