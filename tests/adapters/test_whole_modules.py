"""Modules that train whole beside the adapted layers: in files, switched, disabled, averaged and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from refusals import refused
from test_file_format import rewrite
from torch import nn
from whole import Net, assert_equal, injected, optimizer, output, train, values, x

import ssvd_kernels as sk


@pytest.fixture
def base() -> Net:
    return Net()


@pytest.fixture
def trained(base, tmp_path):
    """(trained model, its adapter)"""
    net, path = train(injected(copy.deepcopy(base))), tmp_path / "a.safetensors"
    sk.save_adapter(net, path)
    return net, path


# -- files -------------------------------------------------------------------------------------------------------------


def test_they_come_back_on_the_base_and_on_an_injected_model(base, trained):
    net, path = trained
    others = [base, train(injected(copy.deepcopy(base)), range(5, 7))]
    for other in others:
        sk.load_adapter(other, path, progress=False)
        assert_equal(values(other), values(net))
        assert torch.equal(output(other), output(net))
        assert [n for n, p in other.named_parameters() if p.requires_grad] == [
            n for n, p in net.named_parameters() if p.requires_grad
        ]


def test_loaded_into_a_disabled_or_switched_model(base, trained):
    net, path = trained
    other, expected = injected(copy.deepcopy(base)), output(base)
    with sk.disable_adapter(other):
        sk.load_adapter(other, path)
        assert torch.equal(output(other), expected)
    assert torch.equal(output(other), output(net))
    sk.add_adapter(other, "b", path)
    sk.set_adapter(other, "b")
    assert torch.equal(output(other), output(net))


def test_saving_does_not_warn_of_them(base, tmp_path, caplog):
    net = injected(base)
    net.up.bias.requires_grad_(True)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    assert "1 other parameters train and are not saved with the adapter: up.bias." in caplog.text


def test_what_is_not_finite_is_not_saved(base, tmp_path):
    net = injected(base)
    net.norm.running_mean[2] = float("nan")
    with refused(net, ValueError, r"norm\.running_mean contains NaN or infinity: nothing was saved"):
        sk.save_adapter(net, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda net: net.head.__setitem__(2, nn.Linear(7, 6)), r"saved for head\.2 with .*\[5, 7\].*\[6, 7\]"),
        (lambda net: setattr(net, "norm", nn.BatchNorm1d(6, affine=False)), r"a BatchNorm1d without Parameters"),
        (lambda net: net._modules.pop("rnn"), r"has modules_to_save=\['norm', 'rnn'.*, and the model \['norm', 'head"),
        (lambda net: net.head.half(), r"head\.0\.weight is torch\.float32 .*torch\.float16, which would lose precis"),
        (lambda net: injected(net, modules_to_save=[], targets=["up", "down"]), r"and the model \[\]: inject the mod"),
        (lambda net: injected(net, modules_to_save=["head"]), r"and the model \['head\.0', 'head\.2'\]: inject the mo"),
    ],
    ids=["shape", "other keys", "missing", "dtype", "injected without", "injected with fewer"],
)
def test_files_that_do_not_fit_are_refused(base, trained, change, match):
    change(base)
    with refused(base, sk.AdapterError, rf"a\.safetensors.*{match}"):
        sk.load_adapter(base, trained[1], progress=False)
    if sk.adapted_layers(base):
        with refused(base, sk.AdapterError, match):
            sk.add_adapter(base, "b", trained[1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: h.update(modules_to_save=["norm", "rnn"]), r"'head\.0\.bias', which none of its layers has"),
        (
            lambda h, t: h.update(modules_to_save=[*h["modules_to_save"], "up"]),
            r"(was saved for up with {}|modules_to_save=.*'up'\], and)",
        ),
        (lambda h, t: h.update(modules_to_save=3), "damaged header"),
        (lambda h, t: t.pop("rnn.bias_hh_l0"), r"was saved for rnn with"),
    ],
)
def test_altered_files_are_refused(base, trained, change, match):
    rewrite(trained[1], change)
    for net in (base, injected(copy.deepcopy(base))):
        with refused(net, sk.AdapterError, rf"a\.safetensors.*{match}"):
            sk.load_adapter(net, trained[1], progress=False)


# -- several adapters --------------------------------------------------------------------------------------------------


def test_each_adapter_has_its_own(base):
    """One optimizer over both: each comes out as if it were alone, statistics of batches included."""
    net = injected(copy.deepcopy(base))
    sk.add_adapter(net, "b")
    alone, by = {"default": copy.deepcopy(net), "b": copy.deepcopy(net)}, optimizer(net)
    head, order = net.head[0], list(net.state_dict())
    first = [head.weight, head.bias]
    for start in (0, 3):
        for seed, name in enumerate(alone):
            sk.set_adapter(net, name)
            train(net, range(10 * seed + start, 10 * seed + start + 3), by)
    for seed, (name, twin) in enumerate(alone.items()):
        sk.set_adapter(net, name)
        sk.set_adapter(twin, name)
        assert_equal(values(net), values(train(twin, range(10 * seed, 10 * seed + 6))))
    assert sk.adapter_names(net) == ["b", "default"] and not torch.equal(first[0], head.weight)
    assert not any(p.requires_grad for p in first)
    sk.set_adapter(net, "default")
    assert head.weight is first[0] and head.bias is first[1] and all(p.requires_grad for p in first)
    assert list(net.state_dict()) == order
    sk.delete_adapter(net, "b")
    assert not any("parked.b" in key for key in net.state_dict())


def test_disabled_is_the_base_model(base):
    net, expected = train(injected(copy.deepcopy(base))), output(base)
    sk.add_adapter(net, "b")
    found = output(net)
    with sk.disable_adapter(net):
        assert torch.equal(output(net), expected)
        with sk.disable_adapter(net):
            assert torch.equal(output(net), expected)
        assert torch.equal(output(net), expected)
        sk.set_adapter(net, "b")
        assert torch.equal(output(net), expected)
        sk.set_adapter(net, "default")
        assert not any(p.requires_grad for p in net.head.parameters())
    assert torch.equal(output(net), found)
    assert not torch.equal(found, expected)


def test_the_mean_of_two_adapters_has_the_mean_of_their_modules(base):
    net = train(injected(copy.deepcopy(base)))
    sk.add_adapter(net, "b")
    sk.average_adapters(net, {"default": 3, "b": 1}, into="mean")
    trained = values(net)
    sk.set_adapter(net, "mean")
    for key, value in base.state_dict().items():
        if key in trained and value.is_floating_point():
            assert torch.equal(net.state_dict()[key], 0.75 * trained[key] + 0.25 * value), key


def test_a_state_dict_of_two_adapters_comes_back(base):
    net = train(injected(copy.deepcopy(base)))
    sk.add_adapter(net, "b")
    sk.set_adapter(net, "b")
    train(net, range(7, 9))
    twin = injected(base)
    sk.add_adapter(twin, "b")
    with pytest.raises(RuntimeError, match="add and set the same ones before loading"):
        twin.load_state_dict(net.state_dict())
    sk.set_adapter(twin, "b")
    twin.load_state_dict(net.state_dict())
    for name in ("b", "default"):
        for model in (net, twin):
            sk.set_adapter(model, name)
        assert torch.equal(output(twin), output(net))


@pytest.mark.slow
def test_compiled_model_switches_without_compiling_again(base):
    torch._dynamo.reset()
    layers = nn.Sequential(base.up, nn.Tanh(), base.down, base.norm, nn.Linear(6, 5))
    net = injected(layers, targets=["0", "2"], modules_to_save=["3", "4"])
    sk.add_adapter(net, "b")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")

    def check() -> None:
        for mode in (True, False):
            torch.testing.assert_close(compiled.train(mode)(x()), net.train(mode)(x()))

    check()
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("b", "default"):
            sk.set_adapter(net, name)
            check()
