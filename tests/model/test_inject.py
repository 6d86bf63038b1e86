"""inject, merge, unmerge, remove, copies and base checkpoints: what comes back is what went in."""

from __future__ import annotations

import copy
import pickle

import pytest
import roundtrip
import torch
from hypothesis import given, settings
from refusals import parts
from roundtrip import Net, assert_computes, assert_equal_state, assert_same_outputs, example, outputs, train_randomly
from several import injected
from torch import nn

import ssvd_kernels as sk


@roundtrip.PROPERTY
@given(roundtrip.cases())
def test_remove_gives_back_the_very_modules_weights_and_flags(case):
    net = roundtrip.base_net(case)
    before, state, expected = parts(net), copy.deepcopy(net.state_dict()), net(example(net)).detach()
    report = sk.inject(net, case.config, progress=False)
    assert report.modules == ["first", "block.inner", "last.1"] == list(sk.adapted_layers(net))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    named = {"theta", "theta_out", "delta_sigma", "A_out", "B_out", "A_in", "B_in"}
    assert {name.rpartition(".")[2] for name in trained} <= named
    assert report.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert torch.equal(net(example(net)).detach(), expected)  # bit-identical before training
    train_randomly(net, case.seed)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(example(net)).square().sum().backward()
    optimizer.step()
    sk.merge(net)
    sk.remove(net)
    assert parts(net) == before
    assert_equal_state(net, state)
    assert torch.equal(net(example(net)).detach(), expected)


@settings(roundtrip.PROPERTY, max_examples=10)
@given(roundtrip.cases())
def test_merged_equals_unmerged_and_unmerge_is_exact(case):
    net = roundtrip.injected(case)
    state, (trained, inferred) = copy.deepcopy(net.state_dict()), outputs(net)
    sk.merge(net)
    assert all(layer.merged for layer in sk.adapted_layers(net).values())
    assert_equal_state(net, state)  # a merged model's state dict still holds the base weights
    with torch.no_grad():
        merged = net(example(net))
    assert_computes([trained, inferred, merged], net)
    sk.merge(net)
    with torch.no_grad():
        assert torch.equal(net(example(net)), merged)
    sk.unmerge(net)
    assert_equal_state(net, state)
    assert all(map(torch.equal, outputs(net), (trained, inferred)))


@roundtrip.PROPERTY
@given(roundtrip.cases())
def test_merge_with_unload_leaves_plain_layers_that_hold_the_effective_weight(case):
    net = roundtrip.injected(case)
    weights = {name: layer.weight.detach().clone() for name, layer in sk.adapted_layers(net).items()}
    sk.merge(net)
    with torch.no_grad():
        merged = net.eval()(example(net))
    base_weights = {name: layer.base_weight for name, layer in sk.adapted_layers(net).items()}
    untouched = {name: weight.clone() for name, weight in base_weights.items()}
    sk.merge(net, unload=True)
    assert not sk.adapted_layers(net)
    assert [type(net.get_submodule(name)) for name in weights] == [nn.Linear] * 3
    assert list(net.state_dict()) == list(Net(*case.dims).state_dict())
    with torch.no_grad():
        assert torch.equal(net(example(net)), merged)
    for name, weight in weights.items():
        assert torch.equal(net.get_submodule(name).weight, weight)
        assert torch.equal(base_weights[name], untouched[name])  # shared, perhaps, with another copy of the model
    assert net.first.weight.requires_grad and not net.block["inner"].weight.requires_grad


def _pickled(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("state", ["fresh", "after training forward", "after cached eval", "merged"])
@pytest.mark.parametrize("side", ["input", "both"])
def test_copies_are_equal_and_independent(duplicate, state, side):
    base = Net(12, 16, 9)
    net = injected(base, side=side)
    x = example(net)
    if state == "after training forward":
        net.train()(x).sum().backward()
        net.zero_grad()
    elif state == "after cached eval":
        with torch.no_grad():
            net.eval()(x)
    elif state == "merged":
        sk.merge(net.eval())
    with torch.no_grad():
        expected = net(x)
        twin = duplicate(net)
        assert torch.equal(twin(x), expected)
        if state == "merged":
            sk.unmerge(twin)
    ours = {p.data_ptr() for p in net.parameters() if p.numel()}
    assert not ours & {p.data_ptr() for p in twin.parameters() if p.numel()}
    twin.train()(x).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    train_randomly(twin, 5)
    with torch.no_grad():
        assert not torch.equal(twin.eval()(x), expected) and torch.equal(net(x), expected)
        sk.remove(twin)
        assert torch.equal(net(x), expected)
    assert_equal_state(twin, base.state_dict())


def test_base_checkpoints_load_both_ways():
    base = Net(12, 16, 9)
    net = injected(base)
    expected = outputs(net)
    result = net.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    names = {"theta", "delta_sigma", "U", "sigma", "V"}
    assert {key.rpartition(".")[2] for key in result.missing_keys} == names
    assert all(torch.equal(a, b) for a, b in zip(outputs(net), expected, strict=True))
    plain = Net(12, 16, 9)
    assert not plain.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert_same_outputs(plain, base)
