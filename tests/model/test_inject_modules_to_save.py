"""Modules that train whole beside the adapted layers: injected, merged, removed and copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from refusals import Net as Tied
from refusals import parts, refused
from torch import nn
from whole import PARTS, SAVED, Net, assert_equal, injected, output, train, values, x

import ssvd_kernels as sk


@pytest.mark.parametrize(
    "config", [sk.SSVDConfig(rank=3, modules_to_save=SAVED), sk.SpectralFTConfig(top=4, rank=2, modules_to_save=SAVED)]
)
def test_modules_train_whole_and_start_as_the_base(config):
    base, net = Net(), Net()
    net.load_state_dict(base.state_dict())
    report = sk.inject(net, config, progress=False)
    assert report.modules == ["up", "down"] == list(sk.adapted_layers(net))  # the head's layers are not adapted
    sizes = {name: sum(p.numel() for p in base.get_submodule(name).parameters()) for name in PARTS}
    assert report.modules_to_save == sizes
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert report.trainable == sum(p.numel() for p in trained.values())
    whole = {name for name, _ in base.named_parameters() if not name.startswith(("up", "down"))}
    assert {name for name in trained if not name.startswith(("up", "down"))} == whole
    rotations = report.trainable - sum(sizes.values())
    assert report.total == sum(p.numel() for p in base.parameters()) + rotations
    assert f"trained whole: 4 modules ({sum(sizes.values()):,} parameters), e.g. norm" in str(report)
    assert not report.left_out
    parked = net.norm.parked["__base__"].named_buffers()  # in one order in every process, for DDP sends buffers by it
    assert [name for name, _ in parked] == [name for name, _ in base.norm.named_buffers()]
    for mode in (True, False):
        assert torch.equal(net.train(mode)(x()), base.train(mode)(x()))
    before = values(net)
    after = values(train(net))
    assert not any(torch.equal(value, before[key]) for key, value in after.items())


def test_they_train_as_in_the_model_itself():
    """With the gradients of a plain model that holds the same weights: a recurrent layer calls its Parameters, too."""
    base = Net()
    net = injected(copy.deepcopy(base))
    for model in (base, net):
        model.train()(x()).square().mean().backward()
    for name in PARTS:
        for (key, ours), (_, theirs) in zip(
            net.get_submodule(name).named_parameters(recurse=False), base.get_submodule(name).named_parameters()
        ):
            if key != "bias" or name != "norm":  # which the base had frozen
                assert torch.equal(ours.grad, theirs.grad), (name, key)


def test_remove_gives_back_the_very_tensors_and_flags():
    net = Net()
    before, state = parts(net), copy.deepcopy(net.state_dict())
    train(injected(net))
    with sk.disable_adapter(net):
        sk.remove(net)
    assert parts(net) == before
    assert_equal(net.state_dict(), state)
    assert net.rnn._flat_weights == list(net.rnn.parameters())
    train(injected(net))
    sk.remove(net)
    assert_equal(net.state_dict(), state)


def test_merging_keeps_what_was_trained():
    net = train(injected(Net()))
    expected, trained = output(net), values(net)
    sk.merge(net)
    merged = output(net)
    sk.unmerge(net)
    assert torch.equal(output(net), expected)
    assert_equal(values(net), trained)
    sk.merge(net, unload=True)
    assert torch.equal(output(net), merged) and list(net.state_dict()) == list(Net().state_dict())
    assert_equal({key: net.state_dict()[key] for key in trained if key in net.state_dict()}, {
        key: value for key, value in trained.items() if key in net.state_dict()
    })  # fmt: skip
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen == ["norm.bias"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_equal_and_independent(duplicate):
    base = Net()
    net = train(injected(copy.deepcopy(base)))
    twin, before = duplicate(net), values(net)
    assert_equal(values(twin), before)
    train(twin)
    assert_equal(values(net), before)
    sk.remove(twin)
    assert_equal(twin.state_dict(), base.state_dict())
    with sk.disable_adapter(net), pytest.raises(RuntimeError, match="copied or saved within disable_adapter"):
        duplicate(net)
    with sk.disable_adapter(net), pytest.raises(RuntimeError, match="copied or saved within disable_adapter"):
        net.state_dict()
    assert_equal(values(net), before)


def integers() -> nn.Module:
    net = Net()
    net.head[0].weight = nn.Parameter(torch.zeros(7, 4, dtype=torch.int8), requires_grad=False)
    return net


@pytest.mark.parametrize(
    ("net", "options", "match"),
    [
        (Net(), {"modules_to_save": ["hea"]}, r"`modules_to_save` contains 'hea', which matches no module of Net"),
        (Net(), {"modules_to_save": ["1"]}, r"`modules_to_save` names 'head\.1', a Tanh without Parameters"),
        (Net(), {"targets": ["up", "0"]}, r"'head\.0' is named in `targets` and in `modules_to_save`"),
        (Tied(), {"modules_to_save": ["head"]}, r"names 'head', whose weight is tied to 'embed\.weight'"),
        (integers(), {}, r"names 'head\.0', whose weight is a Parameter of torch\.int8 and cannot train"),
    ],
)
def test_modules_that_cannot_train_whole_are_refused(net, options, match):
    with refused(net, ValueError, match):
        injected(net, **options)


def test_names_are_a_list():
    for value in ("head", 3, [""]):
        with pytest.raises(TypeError, match="`modules_to_save` must be"):
            sk.SSVDConfig(rank=3, modules_to_save=value)
    config = sk.SSVDConfig(rank=3, modules_to_save=["head"])
    assert sk.SSVDConfig(**config.to_dict()) == config
