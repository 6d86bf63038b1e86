"""The activation form of SSVD: the same W' as the weight form's, computed from one basis and without W'."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bounds import DRAWS
from cases import relative_error
from gain import GAIN, output_gain, train
from models import (
    gradients,
    inject,
    train_randomly,
)
from plain import effective
from refusals import Net, refused
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.layers.activation import SSVDActivationLinear

F64 = torch.float64
SIDES, ROTATIONS = ["input", "output", "smaller", "both"], ["cayley", "linear", "free", "banded"]
WAYS = [(side, rotation) for side, rotation in product(SIDES, ROTATIONS) if rotation != "banded" or side == "input"]
SHAPE = 14, 18


def options(side: str = "input", rotation: str = "cayley", **more) -> dict:
    own = {"rank": 6, "side": side, "rotation": rotation, **({"rank_out": 4} if side == "both" else {})}
    return {**own, **({"band": 2} if rotation == "banded" else {}), **more}


def both_forms(linear: nn.Linear, **more) -> tuple[sk.SSVDLinear, SSVDActivationLinear]:
    """`linear` in the weight form and in the activation form, trained alike."""
    config = options(**more)
    config.pop("form", None)
    weight, own = (
        sk.SSVDLinear.from_linear(copy.deepcopy(linear), sk.SSVDConfig(**config, form=form))
        for form in ("weight", "activation")
    )
    train_randomly(weight)
    for name, parameter in own.adapter().items():
        parameter.data.copy_(weight.adapter()[name].data)
    assert isinstance(own, SSVDActivationLinear)
    return weight, own


# -- the weight form's W' ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "rotation"), WAYS)
def test_it_is_the_weight_form(side, rotation):
    weight, own = both_forms(nn.Linear(*SHAPE, dtype=F64), side=side, rotation=rotation)
    x = torch.randn(3, 5, SHAPE[0], dtype=F64)

    def passes(layer: nn.Module) -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sin().sum().backward()
        return {"y": y.detach(), "dx": leaf.grad, **gradients(layer)}

    expected, found = passes(weight), passes(own)
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-13, name
    for name in ("U", "V", "weight"):
        assert relative_error(getattr(own, name).detach(), getattr(weight, name).detach()) <= 1e-13
    assert relative_error(own.core().detach(), weight.core().detach()) <= 1e-13
    with torch.no_grad():
        assert relative_error(own.eval()(x), expected["y"]) <= 1e-13


@pytest.mark.parametrize(("side", "rotation"), WAYS)
def test_gradcheck(side, rotation):
    layer = both_forms(
        nn.Linear(5, 6, dtype=F64), **options(side, rotation, rank=3, **({"rank_out": 2} if side == "both" else {}))
    )[1]
    trained = list(layer.adapter().values())
    x = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *trained])


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_of_two_bases_it_keeps_those_of_the_sides_that_change(side):
    layer = both_forms(nn.Linear(*SHAPE), side=side)[1]
    kept = {"input": {"Vh"}, "output": {"Uh"}, "both": {"Uh", "Vh"}}[side]
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"weight", "bias", "sigma"} | kept
    shapes = {"Vh": (6, SHAPE[0]), "Uh": (6, SHAPE[1])}
    assert all(layer.get_parameter(name).shape == shapes[name] for name in kept)
    with torch.no_grad():
        layer.eval()(torch.randn(2, SHAPE[0]))
    assert layer.weight.shape == layer.base_weight.shape and layer.cache.made.composed is None  # no second weight
    assert len(layer.cache.made.factors.tensors) == 1  # the core


@pytest.mark.parametrize(
    ("given", "base", "expected"),
    [
        ("auto", torch.float64, torch.float64),
        ("auto", torch.float32, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float16", torch.bfloat16, torch.float16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_the_dtype_of_the_basis(given, base, expected):
    linear = nn.Linear(*SHAPE, dtype=base)
    config = sk.SSVDConfig(rank=6, form="activation", basis_dtype=given)
    layer = sk.SSVDLinear.from_linear(linear, config)
    wide = torch.promote_types(base, torch.float32)
    assert layer.get_parameter("Vh").dtype == expected
    assert {layer.theta.dtype, layer.delta_sigma.dtype, layer.sigma.dtype, layer.U.dtype, layer.V.dtype} == {wide}
    assert layer(torch.randn(2, SHAPE[0], dtype=base)).dtype == base


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_before_training_the_output_is_the_base_layers(side, dtype, autocast):
    linear = nn.Linear(*SHAPE, dtype=dtype)
    layer, base = (
        sk.SSVDLinear.from_linear(copy.deepcopy(linear), sk.SSVDConfig(**options(side, form="activation"))),
        linear,
    )
    x = torch.randn(40, SHAPE[0], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer.training in (True, False):
            with torch.set_grad_enabled(layer.training):
                assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("side", ["input", "output"])
def test_float32_is_as_exact_as_the_weight_form(side):
    errors = []
    for _ in range(DRAWS):
        layers = both_forms(nn.Linear(96, 80), side=side, rank=32)
        for layer in layers:
            layer.mode = "factored"
        x = torch.randn(64, 96)
        W, bias = effective(layers[0].base_weight, layers[0])[1], layers[0].bias.detach()
        exact = F.linear(x.double(), W, bias.double())
        errors.append([relative_error(layer(x).detach(), exact) for layer in layers])
    weight, own = (max(each) for each in zip(*errors))
    assert own <= 1e-6 and own <= 1.2 * weight


D, K = 64, 26


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32], ids=["bf16", "float32 autocast"])
def test_a_bf16_update_arrives_at_the_output(kappa, side, base):
    torch.manual_seed(5)
    linear = nn.Linear(D, D)
    linear.weight.data = (torch.randn(D, D) / D**0.5).bfloat16().float()
    layer = sk.SSVDLinear.from_linear(linear.to(base), sk.SSVDConfig(rank=K, side=side, form="activation"))
    train(layer, kappa)
    U, V, core = (factor.detach().double() for factor in layer.update_factors())

    def run(call, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
            return call(x.to(base))

    found = output_gain(partial(run, layer), partial(run, linear), U @ core @ V.mT, kappa)
    assert abs(found - 1) <= GAIN


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_singular_values_that_are_too_small_to_divide_by():
    net = Net()
    U, S, Vh = torch.linalg.svd(net.down.weight.detach(), full_matrices=False)
    S[2] = 1e-5 * S[0]
    S[3:] = 0
    net.down.weight.data = U * S @ Vh
    match = r"down: .*sigma_k / sigma_1 must be at least 0\.0001.*got 1\.0e-05 at k = 3: use a smaller rank, or form="
    with refused(net, ValueError, match):
        inject(net, rank=3, form="activation")
    with pytest.raises(ValueError, match=r"must be at least 0\.001 for a basis in torch\.bfloat16, got 5\.0e-04"):
        S[2] = 5e-4 * S[0]
        net.down.weight.data = U * S @ Vh
        sk.SSVDLinear.from_linear(net.down, sk.SSVDConfig(rank=3, form="activation", basis_dtype="bfloat16"))


def test_a_basis_of_another_shape_and_a_mode_that_it_lacks():
    layer = both_forms(nn.Linear(*SHAPE))[1]
    with pytest.raises(ValueError, match=r"`U` must have the layer's own shape \(18, 6\)"):
        layer.set_basis(torch.zeros(3, 6), layer.sigma, layer.V)
    layer.mode = "composed"
    with pytest.raises(ValueError, match=r"`mode` must be 'auto' or 'factored' for form='activation', got 'composed'"):
        layer(torch.zeros(2, SHAPE[0]))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"form": "input"}, r"`form` must be one of 'weight', 'activation', 'auto', got 'input'"),
        ({"basis_dtype": torch.bfloat16}, r"`basis_dtype` must be one of 'auto', 'float32', .* got torch\.bfloat16"),
        ({"form": "weight", "basis_dtype": "bfloat16"}, r"`basis_dtype` must be left at 'auto' for form='weight'"),
    ],
)
def test_configurations_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        sk.SSVDConfig(rank=2, **given)
