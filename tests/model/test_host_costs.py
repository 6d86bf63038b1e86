"""What a step costs the host, counted and not timed: Python calls and dispatched operations a layer."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Encoder, adapt, small_layers, step_of, train_randomly
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ssvd_kernels as sk
from ssvd_kernels.ops import dispatch

LAYERS, D, K = 64, 64, 24
X = torch.randn(1, D)


class Operations(TorchDispatchMode):
    """Counts what is dispatched and is not a view."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))


def stack(mode: str = "auto", ranks: Callable[[int], int] = lambda i: K, **options: Any) -> nn.Sequential:
    """Layers of 64 x 64 by way of `inject`, `ranks(i)` the rank of the i-th."""
    model = small_layers(LAYERS, D)
    sk.inject(model, sk.SSVDConfig(rank=K, **options), progress=False)
    for i, layer in enumerate(model):
        if ranks(i) != K:
            model[i] = layer = sk.SSVDLinear.from_linear(layer.original(), sk.SSVDConfig(rank=ranks(i)))
        layer.mode = mode
    return train_randomly(model)


def calls(run: Callable[[], object]) -> float:
    """Python calls a layer, of built-in functions, too, once everything is decided."""
    run()
    run()
    profile = cProfile.Profile()
    profile.runcall(run)
    return pstats.Stats(profile).total_calls / LAYERS


def operations(run: Callable[[], object]) -> float:
    run()
    with Operations() as seen:
        run()
    return seen.count / LAYERS


@pytest.mark.parametrize(("mode", "ops"), [("composed", 8), ("factored", 10)])
def test_training(mode, ops):
    step = step_of(stack(mode), X)
    assert calls(step) <= 55
    assert operations(step) <= ops


def test_training_with_a_rank_for_every_layer():
    step = step_of(stack("factored", lambda i: 8 + (37 * i) % 24), X)
    assert calls(step) <= 60
    assert operations(step) <= 14


@pytest.mark.parametrize(("side", "limit", "ops"), [("input", 64, 10), ("output", 66, 13), ("both", 104, 23)])
def test_training_in_the_activation_form(side, limit, ops):
    step = step_of(stack(form="activation", side=side), X)
    assert calls(step) <= limit
    assert operations(step) <= ops


@pytest.mark.parametrize(("form", "limit"), [("weight", 85), ("activation", 87)])
def test_training_under_autocast(form, limit):
    step = step_of(stack(form=form), X)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            step()

    assert calls(run) <= limit


@pytest.mark.parametrize(("form", "limit"), [("weight", 12), ("activation", 64)])
def test_evaluating_and_merged(form, limit):
    model = stack(form=form).eval()
    run = torch.no_grad()(lambda: model(X))
    assert calls(run) <= limit
    sk.merge(model)
    assert calls(run) <= 10


@pytest.mark.parametrize(("form", "limit"), [("weight", 70), ("activation", 77)])
def test_training_through_peft(form, limit):
    pytest.importorskip("peft")
    from peft import get_peft_model

    from ssvd_kernels.integrations.peft import SSVDPeftConfig

    model = get_peft_model(small_layers(LAYERS, D), SSVDPeftConfig(rank=K, form=form, target_modules=r"\d+"))
    assert calls(step_of(model, X)) <= limit


@pytest.mark.parametrize(("reentrant", "computed"), [(None, 1), (False, 1), (True, 1 + LAYERS)])
def test_cayley_transforms_of_a_step(monkeypatch, reentrant, computed):
    """One batch a step; a reentrant checkpoint, whose recomputation has a graph of its own, adds one a layer."""
    checkpointing = None if reentrant is None else {"use_reentrant": reentrant}
    model = adapt(Encoder(checkpointing, lambda: nn.Linear(D, D), LAYERS), rank=K)
    transform, made = dispatch.cayley_delta, []
    monkeypatch.setattr(dispatch, "cayley_delta", lambda theta, k: made.append(len(theta)) or transform(theta, k))
    model(X.clone().requires_grad_()).sum().backward()
    assert len(made) == computed and made[0] == LAYERS
