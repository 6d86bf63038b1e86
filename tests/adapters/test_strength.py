"""The strength of an adapter: exact at 0 and 1, between them the formula, wherever an adapter goes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from refusals import refused
from several import train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.adapters.file_format import read_adapter
from ssvd_kernels.layers.base import own_layers

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
METHODS = {
    "cayley, input": sk.SSVDConfig(rank=5),
    "cayley, both": sk.SSVDConfig(rank=5, side="both", rank_out=3),
    "linear, output": sk.SSVDConfig(rank=5, rotation="linear", side="output"),
    "free, smaller": sk.SSVDConfig(rank=5, rotation="free", side="smaller"),
    "SVFT": sk.SSVDConfig(ratio=1.0, rotation="banded", band=2),
    "SpectralFT": sk.SpectralFTConfig(top=6, rank=2),
}
methods = pytest.mark.parametrize("method", METHODS)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 15), nn.Tanh(), nn.Linear(15, 12))


def adapted(method: str = "cayley, input") -> nn.Module:
    net = base()
    sk.inject(net, METHODS[method])
    train_randomly(net)
    return net


def outputs(net: nn.Module) -> list[Tensor]:
    """In training, in eval and of the layers one by one, which make cores of their own."""
    found = [net.train()(X).detach()]
    with torch.no_grad():
        found += [net.eval()(X), net(X), net[2](torch.tanh(net[0](X)))]
    return found


def assert_same(net: nn.Module, other: nn.Module) -> None:
    assert all(map(torch.equal, outputs(net), outputs(other)))


@methods
def test_exact_at_0_and_1_and_the_formula_between(method):
    net = adapted(method)
    before, W = outputs(net), [net[i].base_weight.double() for i in (0, 2)]
    whole = [net[i].weight.detach().double() - w for i, w in zip((0, 2), W)]
    sk.set_strength(net, 0)
    assert all(torch.equal(y, base()(X)) for y in outputs(net))
    sk.set_strength(net, 1)
    assert all(map(torch.equal, outputs(net), before))
    sk.set_strength(net, 0.5)
    if method == "SpectralFT":
        for i, w, update in zip((0, 2), W, whole):
            assert relative_error(net[i].weight.detach().double() - w, update / 2) < 1e-5
    else:
        half = adapted(method)
        with torch.no_grad():
            for layer in own_layers(half).values():
                for parameter in layer.adapter().values():
                    parameter.mul_(0.5)
        assert_same(net, half)
    assert all(not torch.equal(y, z) for y, z in zip(outputs(net), before))


def test_the_rotation_stays_orthogonal_and_the_gradients_are_those_of_the_scaled_parameters():
    net, half = adapted(), adapted()
    sk.set_strength(net, 0.5)
    with torch.no_grad():
        for layer in own_layers(half).values():
            for parameter in layer.adapter().values():
                parameter.mul_(0.5)
    for model in (net, half):
        model.train()(X).square().sum().backward()
    for layer, other in zip(own_layers(net).values(), own_layers(half).values()):
        for key, parameter in layer.adapter().items():
            assert relative_error(parameter.grad, 0.5 * other.adapter()[key].grad) < 1e-6
        G = layer.core().double() - torch.diag(0.5 * layer.delta_sigma.double())
        G = G / (layer.sigma + 0.5 * layer.delta_sigma).double().unsqueeze(1) + torch.eye(layer.k)
        assert (G.mT @ G - torch.eye(layer.k)).abs().max() < 1e-6


def saved_and_loaded(net: nn.Module, tmp_path) -> nn.Module:
    sk.save_adapter(net, tmp_path / "a.safetensors")
    other = base()
    sk.load_adapter(other, tmp_path / "a.safetensors")
    return other


def loaded_into_an_adapted_model(net: nn.Module, tmp_path) -> nn.Module:
    sk.save_adapter(net, tmp_path / "a.safetensors")
    other = adapted()
    other(X)  # made its batches
    sk.load_adapter(other, tmp_path / "a.safetensors")
    return other


def added_and_set(net: nn.Module, tmp_path) -> nn.Module:
    sk.save_adapter(net, tmp_path / "a.safetensors")
    other = adapted()
    sk.add_adapter(other, "b", tmp_path / "a.safetensors")
    sk.set_adapter(other, "b")
    return other


def switched_away_and_back(net: nn.Module, tmp_path) -> nn.Module:
    sk.add_adapter(net, "b")
    sk.set_adapter(net, "b")
    assert all(torch.equal(y, base()(X)) for y in outputs(net))
    sk.set_adapter(net, "default")
    return net


def pickled(net: nn.Module, tmp_path) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def averaged(net: nn.Module, tmp_path) -> nn.Module:
    sk.average_adapters(net, {"default": 2}, into="mean")
    sk.set_adapter(net, "mean")
    assert net[0].strength == 1
    return net


def merged_and_unmerged(net: nn.Module, tmp_path) -> nn.Module:
    sk.merge(net)
    sk.unmerge(net)
    return net


@pytest.mark.parametrize("lora", [True, False], ids=["to_lora", "unloaded"])
@methods
def test_what_merging_and_export_write(method, lora, tmp_path):
    net = adapted(method)
    sk.set_strength(net, 0.5)
    expected = outputs(net)[0]
    if lora:
        peft = pytest.importorskip("peft")
        sk.to_lora(net, tmp_path / "lora")
        found = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")(X)
    else:
        sk.merge(net, unload=True)
        found = net(X)
    assert relative_error(found.detach(), expected) < 1e-5


@pytest.mark.parametrize(
    "way",
    [
        saved_and_loaded,
        loaded_into_an_adapted_model,
        added_and_set,
        switched_away_and_back,
        copy.deepcopy,
        pickled,
        averaged,
        merged_and_unmerged,
    ],
)
def test_it_goes_where_the_adapter_goes(way: Callable, tmp_path):
    net = adapted()
    sk.set_strength(net, 0.25)
    expected = outputs(net)
    found = way(net) if way is copy.deepcopy else way(net, tmp_path)
    assert all(map(torch.equal, outputs(found), expected))


def test_adapters_of_other_strengths_are_switched_between_forwards():
    """The model makes its cores in batches, which must follow."""
    net = adapted()
    sk.add_adapter(net, "b")
    sk.set_adapter(net, "b")
    train_randomly(net)
    at_one = outputs(net)
    sk.set_strength(net, 0.5)
    at_half = outputs(net)
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, outputs(net), at_one))
    sk.set_adapter(net, "b")
    assert all(map(torch.equal, outputs(net), at_half)) and not torch.equal(at_half[0], at_one[0])


def test_of_an_adapter_that_is_not_in_use(tmp_path):
    net = adapted()
    before = outputs(net)
    sk.add_adapter(net, "b")
    sk.set_strength(net, 0.5, "b")
    assert all(map(torch.equal, outputs(net), before))
    sk.save_adapter(net, tmp_path / "b.safetensors", adapter="b")
    assert read_adapter(tmp_path / "b.safetensors").strength == 0.5
    sk.set_adapter(net, "b")
    assert {layer.strength for layer in own_layers(net).values()} == {0.5}


@pytest.mark.parametrize("strength", [-0.1, 1.51, math.nan, math.inf, True, "1", None])
def test_other_strengths_are_refused(strength, tmp_path):
    net = adapted()
    with refused(net, ValueError, r"`strength` must be a number between 0 and 1\.5, got"):
        sk.set_strength(net, strength)


def test_unknown_adapters_and_merged_models_are_refused():
    net = adapted()
    with refused(net, ValueError, r"`adapter` must be one of 'default', got 'c'"):
        sk.set_strength(net, 0.5, "c")
    sk.merge(net)
    with refused(net, ValueError, "is merged: unmerge it"):
        sk.set_strength(net, 0.5)
