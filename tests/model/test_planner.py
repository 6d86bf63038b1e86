"""The planner: what it chooses against a search by hand, how a plan prints, injects and comes back, and refusals."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from bounds import assert_within
from hypothesis import given, settings
from hypothesis import strategies as st
from models import references, train_randomly
from refusals import Net, refused
from roundtrip import loaded
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.layers.activation import SSVDActivationLinear
from ssvd_kernels.model.budget import inner_outer
from ssvd_kernels.ops.functional import theta_length

SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)


def net(*shapes: tuple[int, int], seed: int = 0) -> nn.Sequential:
    """Linear layers of weights (d_out, d_in), each with a spectrum that falls in a way of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in shapes))
    with torch.no_grad():
        for index, linear in enumerate(model):
            W = torch.randn(linear.weight.shape, generator=generator)
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            linear.weight.copy_(U @ torch.diag(S * 0.8 ** (index * torch.arange(len(S)))) @ Vh)
    return model


def ranks(plan: sk.RankPlan) -> list[int]:
    return [layer.rank for layer in plan.layers]


# -- what is chosen ----------------------------------------------------------------------------------------------------


def check_best(model: nn.Sequential, candidates: list[list[int]], share: float, **options) -> None:
    """The plan has, of these lists of ranks, the one with the most trained numbers that the budget allows."""
    sizes = [min(linear.weight.shape) for linear in model]
    budget = max(2, len(sizes), int(share * sum(n * (n + 1) // 2 for n in sizes)))
    plan = sk.plan(model, budget=budget, progress=False, **options)
    allowed = [ranks for ranks in candidates if sum(k * (k + 1) // 2 for k in ranks) <= budget]
    assert ranks(plan) == max(allowed, key=sum)
    assert plan.largest == (ranks(plan) == sizes) and plan.trainable <= budget


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, share=st.floats(0, 1))
def test_uniform_is_the_largest_ratio_that_keeps_the_budget(shapes, share):
    sizes = [min(shape) for shape in shapes]
    ratios = {Fraction(k, n) for n in sizes for k in range(1, n + 1)}
    candidates = [[max(1, int(n * ratio)) for n in sizes] for ratio in ratios]
    check_best(net(*shapes), [*candidates, [1] * len(shapes)], share)


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, share=st.floats(0, 1), seed=st.integers(0, 99))
def test_spectrum_is_the_largest_share_of_the_energy_that_keeps_the_budget(shapes, share, seed):
    model, held = net(*shapes, seed=seed), []
    for linear in model:
        squares = np.linalg.svd(linear.weight.detach().double().numpy(), compute_uv=False) ** 2
        held.append(np.cumsum(squares) / squares.sum())
    # a hair above each: the sums of two libraries differ by rounding
    candidates = [[int((h[:-1] <= t + 1e-9).sum()) + 1 for h in held] for t in {0.0, *np.concatenate(held)}]
    check_best(model, candidates, share, allocation="spectrum")


def test_spectrum_leaves_less_than_one_step_of_one_layer_unused():
    model = net((16, 24), (24, 16), (16, 16))
    for budget in range(20, 400, 7):
        plan = sk.plan(model, budget=budget, allocation="spectrum", progress=False)
        assert budget - max(ranks(plan)) - 1 < plan.trainable <= budget or plan.largest


def test_spectrum_gives_flat_spectra_more_than_steep_ones_whatever_their_scale():
    model = net((16, 16), (16, 16), (16, 16))
    plan = sk.plan(model, budget=200, allocation="spectrum", progress=False)
    assert sorted(ranks(plan), reverse=True) == ranks(plan) and ranks(plan)[0] > ranks(plan)[2] + 3
    with torch.no_grad():
        model[2].weight.mul_(1000)
    assert ranks(sk.plan(model, budget=200, allocation="spectrum", progress=False)) == ranks(plan)


def test_spectrum_of_zeros_and_of_low_rank():
    model = net((8, 8), (8, 8), (8, 8))
    with torch.no_grad():
        model[1].weight.zero_()
        model[2].weight.copy_(torch.outer(torch.arange(8.0), torch.ones(8)))
    plan = sk.plan(model, budget=40, allocation="spectrum", progress=False)
    assert ranks(plan)[:2] == [8, 1] and plan.trainable <= 40


@pytest.mark.parametrize("rotation", ["cayley", "free"])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.7, 1])
def test_inner_share(share, rotation):
    plan = sk.plan(net((40, 60), (32, 32)), budget=900, method="ssvd-o", inner_share=share, rotation=rotation)
    for layer in plan.layers:
        inner, outer = theta_length(layer.rank, rotation), theta_length(layer.rank_out, rotation)
        step = theta_length(min(layer.rank, layer.rank_out) + 1, rotation) / (inner + outer)
        assert (max if share >= 0.5 else min)(inner, outer) == inner
        assert abs(inner / (inner + outer) - share) < step / 2 or 1 in (layer.rank, layer.rank_out)
    if share in (0, 1):
        assert all({layer.rank, layer.rank_out} > {1} for layer in plan.layers)


def test_inner_outer_is_the_largest_within_its_share():
    for rank in range(1, 30):
        for share in (0.05, 0.3, 0.5, 0.8, 0.97):
            k_in, k_out = inner_outer(rank, share, "cayley")
            small, large = sorted((k_in, k_out))
            allowed = min(share, 1 - share) / max(share, 1 - share) * theta_length(large, "cayley")
            assert large == rank and (small == rank or theta_length(small + 1, "cayley") > allowed)
            assert theta_length(small, "cayley") <= allowed


def test_a_share_is_of_the_models_parameters():
    model = Net()
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = sk.plan(model, budget=0.1)
    assert plan.total == total and plan.budget == int(0.1 * total)
    assert ranks(plan) == ranks(sk.plan(model, budget=plan.budget))
    assert {layer.name for layer in plan.layers} == {"up", "down"}  # not the head, tied to the embedding


def test_uniform_plans_of_a_model_without_weights():
    with torch.device("meta"):
        empty = Net()
    assert sk.plan(empty, budget=20) == sk.plan(Net(), budget=20)
    with refused(empty, ValueError, r"up\.weight.*meta"):
        sk.plan(empty, budget=20, allocation="spectrum", progress=False)


# -- what a plan is good for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ssvd", "ssvd-o"])
def test_form(method):
    model = net((16, 24), (24, 16))
    plan = sk.plan(model, budget=100, method=method, form="activation")
    assert ", form=activation; " in str(plan)
    sk.inject(model, plan, progress=False)
    assert {type(layer) for layer in sk.ssvd_layers(model).values()} == {SSVDActivationLinear}


def test_printed():
    assert str(sk.plan(net((16, 24), (24, 16), (16, 24)), budget=100)) == (
        "ssvd, side=input, rotation=cayley; uniform: k = 43.8 % of min(d_out, d_in)\n"
        "  layers  weight  k  parameters each  parameters\n"
        "       2   16x24  7               28          56  0, ...\n"
        "       1   24x16  7               28          28  1\n"
        "3 layers, 84 trainable parameters: 6.95 % of the model's 1,208 parameters, 16 (16.00 %) under the budget of "
        "100"
    )
    lines = str(sk.plan(net((16, 24)), budget=0.999, method="ssvd-o", inner_share=0.8)).splitlines()
    assert lines[0] == "ssvd-o, inner_share=0.8, rotation=cayley; uniform: k = 100.0 % of min(d_out, d_in)"
    assert lines[2].split()[2] == "16+8"
    assert lines[-1].endswith("no budget gives ssvd-o, inner_share=0.8, rotation=cayley higher ranks here")
    spectrum = str(sk.plan(net((16, 24), (24, 16)), budget=100, allocation="spectrum", progress=False)).splitlines()
    assert "spectrum: the top k hold more than " in spectrum[0] and spectrum[0].endswith(" % of ||W||^2")
    assert "; uniform: band = 1\n" in str(sk.plan(net((9, 9)), budget=30, method="svft"))


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
@pytest.mark.parametrize(("method", "options"), [("ssvd", {"side": "smaller"}), ("ssvd-o", {"inner_share": 0.7})])
def test_adapter_of_a_plan_comes_back(tmp_path, method, options, allocation):
    base, x = net((16, 24), (24, 16), (16, 24), (16, 16)), torch.randn(5, 24)
    plan = sk.plan(base, budget=300, method=method, allocation=allocation, progress=False, **options)
    model = copy.deepcopy(base)
    report = sk.inject(model, plan, progress=False)
    assert torch.equal(model(x), base(x))
    for name, layer in sk.ssvd_layers(model).items():
        (planned,) = (entry for entry in plan.layers if entry.name == name)
        assert (layer.k_in, layer.k_out) == (planned.rank, planned.rank_out)
        assert layer.side == ("both" if method == "ssvd-o" else "input" if planned.shape != (16, 24) else "output")
    assert report.trainable == plan.trainable and (allocation == "uniform" or len(set(ranks(plan))) > 1)
    train_randomly(model)
    sk.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(loaded(base, tmp_path / "a.safetensors")(x), model(x)) and not torch.equal(model(x), base(x))


@pytest.mark.parametrize("share", [0, 1])
def test_a_side_without_its_share_does_not_turn(share):
    """Rank 1 of the side without a share has no theta: SSVD-O is then SSVD of one side."""
    base = net((9, 6), (6, 9))
    plan = sk.plan(base, budget=20, method="ssvd-o", inner_share=share)
    models = [copy.deepcopy(base), copy.deepcopy(base)]
    sk.inject(models[0], plan, progress=False)
    side = "input" if share else "output"
    sk.inject(models[1], sk.SSVDConfig(rank=max(plan.layers[0][2:4]), side=side), progress=False)
    x = torch.randn(32, 6)
    for model in models:
        with torch.no_grad():
            for layer in sk.ssvd_layers(model).values():
                theta = layer.theta_out if layer.side == "both" and not share else layer.theta
                theta.copy_(torch.linspace(-0.3, 0.4, theta.numel()))
                layer.delta_sigma.copy_(torch.linspace(0.1, 0.3, layer.k))
    plain, exact = references(models[1], lambda network: network(x).detach())
    for model in models:
        assert_within(model(x).detach(), plain, exact)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"budget": "many"}, TypeError, r"`budget` must be an integer > 1, or a share.*got 'many'"),
        ({"budget": True}, TypeError, r"`budget` must be an integer > 1.*got True"),
        *(({"budget": value}, ValueError, rf"`budget` must be an integer > 1, or a share of the model's.*got {value}")
          for value in (0, 1, -5, 0.0, 1.0, 20.0, -0.5, float("nan"), float("inf"))),
        ({"budget": 1e-6}, ValueError, r"`budget` must be at least 2 .*method='ssvd' and these 2 layers, got 1e-06,"),
        ({"budget": 11, "method": "svft"}, ValueError, r"`budget` must be at least 12 .*got 11"),
        ({"method": "adalora"}, ValueError, r"`method` must be one of 'ssvd', 'ssvd-o'.*got 'adalora'"),
        ({"allocation": "best"}, ValueError, r"`allocation` must be one of 'uniform', 'spectrum', got 'best'"),
        ({"allocation": "spectrum", "method": "lora"}, ValueError, r"'spectrum' requires method='ssvd' or 'ssvd-o'"),
        ({"side": "both"}, ValueError, r"`side` must be one of 'input', 'output', 'smaller', got 'both'"),
        ({"rotation": "banded"}, ValueError, r"`rotation` must be one of 'cayley', 'linear', 'free', got 'banded'"),
        ({"method": "lora", "side": "input"}, TypeError, r"no option `side` \(options: none\), got 'input'"),
        ({"method": "ssvd", "inner_share": 0.5}, TypeError, r"no option `inner_share` \(.* form\), got 0\.5"),
        *(({"method": "ssvd-o", "inner_share": value}, ValueError, r"`inner_share` must be a number in \[0, 1\], got ")
          for value in (-0.1, 1.1, True, "half", float("nan"))),
        *(({"method": "spectralft", "top": value}, ValueError, rf"`top` must be an integer >= 1, got {value}")
          for value in (0, 2.0, True)),
        ({"targets": ["nonsense"]}, ValueError, r"`targets` contains 'nonsense'"),
        ({"targets": []}, ValueError, r"`targets` must not be empty"),
        ({"targets": ["head"]}, ValueError, r"'head'.*tied"),
    ],
    ids=str,
)  # fmt: skip
def test_plan_refuses(options, error, match):
    model = Net()
    with refused(model, error, match):
        sk.plan(model, **{"budget": 20, "progress": False, **options})


def test_plan_refuses_an_adapted_model():
    model = Net()
    sk.inject(model, sk.SSVDConfig(rank=2, targets=["up"]), progress=False)
    with refused(model, ValueError, r"model has 1 SSVD layers already, e\.g\. 'up': remove\(\) them first"):
        sk.plan(model, budget=20)


def test_a_plan_is_refused_for_another_model():
    plan, lora = sk.plan(Net(), budget=20), sk.plan(Net(), budget=40, method="lora")
    wider, more = Net(), Net()
    wider.up = nn.Linear(6, 10)
    more.last = nn.Linear(3, 3)
    for model, name in ((wider, "up"), (more, "last")):
        for use in (lambda model: sk.inject(model, plan, progress=False), lora.peft_config):
            with refused(model, ValueError, rf"plan has 2 layers, .*Net; they differ, e\.g\. in '{name}'"):
                use(model)


def test_a_plan_of_our_own_methods_has_no_peft_config():
    with pytest.raises(ValueError, match=r"method='ssvd' has no PEFT configuration: use inject\(model, plan\)"):
        sk.plan(Net(), budget=20).peft_config(Net())
