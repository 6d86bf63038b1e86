"""parameter_groups: which learning rate each Parameter gets, and that optimizers and schedulers keep to it."""

from __future__ import annotations

import math

import pytest
import torch
from models import Stack, inject
from torch import nn
from whole import Net, injected, train

import ssvd_kernels as sk
from ssvd_kernels.model.parameter_groups import EXPONENT


def rates(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    """The rate of each parameter, by name; a parameter in two groups is an error."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[parameter], group["lr"]) for group in groups for parameter in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def scaled(k: int, lr: float = 2e-4, k_ref: int = 153) -> float:
    return lr * (k_ref / k) ** EXPONENT


def test_a_layer_s_rate_goes_by_its_rank():
    model = Stack()
    plan = {name: k for k, name in enumerate(["encoder.blocks.0.0", "encoder.blocks.0.2", "head"], 3)}
    inject(model, targets=list(plan), rank=4)
    for name, k in plan.items():
        layer = model.get_submodule(name)
        layer.k = layer.k_in = k
    groups = sk.parameter_groups(model, 2e-4)
    expected = {f"{name}.{key}": scaled(k) for name, k in plan.items() for key in ("theta", "delta_sigma")}
    assert rates(model, groups) == pytest.approx(expected) and len(groups) == 3
    assert {group["lr"] for group in sk.parameter_groups(model, 1e-3, k_ref=4)} >= {1e-3}


def test_both_sides_go_by_their_own_ranks():
    model = Stack()
    inject(model, targets=["head"], side="both", rank=3, rank_out=6)
    expected = {"head.theta": scaled(3), "head.theta_out": scaled(6), "head.delta_sigma": scaled(6)}
    assert rates(model, sk.parameter_groups(model, 2e-4)) == pytest.approx(expected)


def test_what_else_trains_has_the_rate_itself():
    net = injected(Net())
    found = rates(net, sk.parameter_groups(net, 2e-4))
    assert found.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    layers = {name: lr for name, lr in found.items() if name.startswith(("up.", "down."))}
    assert set(layers.values()) == {scaled(3)} and len(layers) == 4
    assert {lr for name, lr in found.items() if name not in layers} == {2e-4}


def test_rotations_without_a_measured_rule_have_the_rate_itself():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    inject(model, targets=["0"], rotation="banded", rank=5, band=2)
    model[1] = sk.SSVDLinear.from_linear(nn.Linear(8, 8), sk.SSVDConfig(rank=5))
    found = rates(model, sk.parameter_groups(model, 2e-4))
    assert found["0.theta"] == 2e-4 and found["1.theta"] == pytest.approx(scaled(5))


def test_optimizers_and_schedulers_keep_the_ratios():
    net = injected(Net())
    optimizer = torch.optim.AdamW(sk.parameter_groups(net, 2e-4), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(3):
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx(
            [2e-4 / (step + 1), scaled(3) / (step + 1)]
        )
        train(net, range(step, step + 1), optimizer)
        scheduler.step()
    again = torch.optim.AdamW(sk.parameter_groups(net, 2e-4), weight_decay=0.0)
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf, True, "1e-3"])
def test_a_rate_that_is_none_is_refused(lr):
    model = Stack()
    inject(model)
    with pytest.raises(ValueError, match="`lr` must be a number > 0, got"):
        sk.parameter_groups(model, lr)


def test_other_bad_input_is_refused():
    model = Stack()
    with pytest.raises(ValueError, match=r"`model` \(Stack\) has no SSVD rotation that trains"):
        sk.parameter_groups(model, 1e-3)
    inject(model)
    with pytest.raises(ValueError, match="`k_ref` must be an integer >= 1, got 0"):
        sk.parameter_groups(model, 1e-3, k_ref=0)
