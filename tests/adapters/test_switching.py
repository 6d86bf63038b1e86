"""Several named adapters on one injected model: switched, disabled, averaged and deleted."""

from __future__ import annotations

import copy

import pytest
import roundtrip
import torch
from bounds import assert_within, unit_roundoff
from cases import relative_error
from models import Stack, assert_all_within, counted, gradients, references, square_gradients
from refusals import refused
from roundtrip import ROTATIONS, SIDES, Net, assert_computes, assert_same_outputs, example, outputs, steps
from several import injected, train_randomly, values, with_adapters
from torch import Tensor, nn

import ssvd_kernels as sk


def loss_gradients(net: nn.Module) -> dict[str, Tensor]:
    return square_gradients(net.train(), example(net))


@pytest.fixture
def base() -> Net:
    return Net(12, 16, 9)


# -- switching ---------------------------------------------------------------------------------------------------------


def test_one_adapter_is_what_it_always_was(base):
    net = injected(base)
    keys = list(net.state_dict())
    assert sk.adapter_names(net) == ["default"]
    sk.add_adapter(net, "b")
    assert len(net.state_dict()) > len(keys)
    sk.delete_adapter(net, "b")
    assert list(net.state_dict()) == keys and not any("parked" in name for name, _ in net.named_modules())


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("side", SIDES)
def test_switching_away_and_back_changes_no_bit(base, side, rotation):
    net = injected(base, side=side, rotation=rotation)
    expected, grads = outputs(net), loss_gradients(net)
    sk.add_adapter(net, "b")
    assert sk.adapter_names(net) == ["default", "b"]
    sk.set_adapter(net, "b")
    assert sk.adapter_names(net) == ["b", "default"]
    assert_same_outputs(net, base)  # a new adapter is zero
    train_randomly(net, 5)
    other = outputs(net)
    assert relative_error(other[0], expected[0]) > 1e-3
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, outputs(net), expected))
    again = loss_gradients(net)
    assert list(again) == list(grads) and all(torch.equal(again[name], grads[name]) for name in grads)
    sk.set_adapter(net, "b")
    assert all(map(torch.equal, outputs(net), other))


def test_switching_moves_parameters_and_their_flags(base):
    net = with_adapters(base, "c", "b")
    layers = list(sk.ssvd_layers(net).values())
    layers[0].delta_sigma.requires_grad_(False)
    first, trained = [layer.theta for layer in layers], {p for p in net.parameters() if p.requires_grad}
    order = list(net.state_dict())
    sk.set_adapter(net, "b")
    assert not any(p.requires_grad for p in trained)
    assert [p.requires_grad for layer in layers for p in layer.adapter().values()] == [True] * 2 * len(layers)
    assert not any(ours is theirs for ours, theirs in zip((layer.theta for layer in layers), first))
    sk.set_adapter(net, "c")
    sk.set_adapter(net, "default")
    assert all(layer.theta is theta for layer, theta in zip(layers, first))
    assert {p for p in net.parameters() if p.requires_grad} == trained
    assert list(net.state_dict()) == order


@pytest.mark.parametrize("fused", [False, True])
def test_one_optimizer_trains_each_adapter_as_if_it_were_alone(base, fused):
    def adamw(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01, fused=fused)

    net = with_adapters(base, "b")
    alone = {name: copy.deepcopy(net) for name in ("default", "b")}
    optimizer = adamw(net)
    for start in (0, 3, 6):
        for name in alone:
            sk.set_adapter(net, name)
            others = values(net, "b" if name == "default" else "default")
            steps(net, optimizer, range(start, start + 3))
            assert all(map(torch.equal, values(net, "b" if name == "default" else "default"), others))
    for name, twin in alone.items():
        before = values(twin, name)
        sk.set_adapter(twin, name)
        steps(twin, adamw(twin), range(9))
        assert not any(map(torch.equal, values(twin, name), before))
        assert all(map(torch.equal, values(twin, name), values(net, name)))


def test_all_layers_share_one_batched_rotation_whatever_is_parked(monkeypatch, base):
    net = with_adapters(base, "b", "c", ratio=0.3, rank=None)
    with counted(monkeypatch) as calls:
        loss_gradients(net)
    single = injected(base, ratio=0.3, rank=None)
    with counted(monkeypatch) as expected:
        loss_gradients(single)
    assert calls == expected and calls["cayley_delta"]


def test_kept_weights_follow_the_adapter_in_use(base):
    net = with_adapters(base, "b").eval()
    with torch.no_grad():
        first = net(example(net))
        sk.set_adapter(net, "b")
        second = net(example(net))
        sk.set_adapter(net, "default")
        assert relative_error(second, first) > 1e-3 and torch.equal(net(example(net)), first)
        sk.set_adapter(net, "b")
        sk.average_adapters(net, {"default": 1}, into="b")  # changes the one in use
        assert torch.equal(net(example(net)), first)


@pytest.mark.parametrize(
    "change", [lambda net: sk.set_adapter(net, "b"), lambda net: sk.average_adapters(net, {"b": 1}, into="default")]
)
def test_kept_weights_are_dropped_at_once(base, change):
    """On the GPU nobody compares values, and memory is short."""
    net = with_adapters(base, "b").eval()
    layers = sk.ssvd_layers(net).values()
    with torch.no_grad():
        net(example(net))
    assert all(layer.cache.made.weight is not None for layer in layers)
    change(net)
    assert not any(layer.cache.made for layer in layers)


def test_merging_takes_the_adapter_in_use(base):
    net = with_adapters(base, "b")
    sk.set_adapter(net, "b")
    for change in (
        lambda: sk.set_adapter(net, "default"),
        lambda: sk.add_adapter(net, "c"),
        lambda: sk.delete_adapter(net, "default"),
        lambda: sk.average_adapters(net, {"default": 1}, into="b"),
        lambda: sk.disable_adapter(net).__enter__(),
    ):
        sk.merge(net)
        with refused(net, ValueError, r"first is merged: unmerge"):
            change()
        sk.unmerge(net)
    twin = copy.deepcopy(net)
    sk.merge(net, unload=True)
    assert_computes([net(example(net))], twin)
    assert not any("parked" in name for name in net.state_dict())


def test_remove_gives_the_base_model_back(base):
    net = with_adapters(base, "b")
    sk.set_adapter(net, "b")
    sk.remove(net)
    roundtrip.assert_equal_state(net, base.state_dict())
    assert_same_outputs(net, base)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "parameters", 3, None])
def test_names_that_no_adapter_can_have(base, name):
    net = injected(base)
    with refused(net, ValueError, rf"`name` must consist of letters, .*got {name!r}"):
        sk.add_adapter(net, name)


def test_names_that_are_taken_unknown_or_in_use(base):
    net = with_adapters(base, "b")
    for name in ("default", "b"):
        with refused(net, ValueError, rf"`name` must not be taken, got {name!r}.*'b', 'default'"):
            sk.add_adapter(net, name)
    for call in (sk.set_adapter, sk.delete_adapter):
        with refused(net, ValueError, r"`adapter` must be one of 'default', 'b', got 'c'"):
            call(net, "c")
    with refused(net, ValueError, r"`name` must not be the active adapter, got 'default'"):
        sk.delete_adapter(net, "default")
    for call in (sk.adapter_names, lambda model: sk.add_adapter(model, "c"), lambda model: sk.set_adapter(model, "b")):
        with refused(base, ValueError, "has no SSVD layer"):
            call(base)


def test_layers_with_different_adapters_are_named(base):
    net = injected(base)
    sk.add_adapter(net.block, "b")
    with pytest.raises(ValueError, match=r"got \['default'\] for first and \['default', 'b'\] for block\.inner"):
        sk.adapter_names(net)
    with refused(net, ValueError, r"`adapter` must be one of 'default', got 'b'"):
        sk.set_adapter(net, "b")


def test_adapters_cannot_change_where_the_parameters_are_not_the_layers_own(base):
    net = with_adapters(base, "b")
    net.last.register_forward_pre_hook(lambda *_: sk.set_adapter(net, "b"))
    with pytest.raises(ValueError, match=r"first\.theta must be an unsharded Parameter, got Tensor"):
        torch.func.functional_call(net, {"first.theta": torch.zeros(10)}, (example(net),))
    assert sk.adapter_names(net) == ["default", "b"]


# -- disabling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_the_base_model_bit_for_bit(base, dtype):
    base = base.to(dtype)
    net = with_adapters(base, "b")
    expected = outputs(net)
    for name in ("default", "b"):
        sk.set_adapter(net, name)
        with sk.disable_adapter(net):
            assert_same_outputs(net, base)
            assert torch.equal(net.first.weight, base.first.weight)
            x = example(net).requires_grad_()
            net.train()(x).sum().backward()
            (theirs,) = torch.autograd.grad(base(x).sum(), x)
            assert torch.equal(x.grad, theirs)
            assert all(p.grad is None for p in net.parameters())
            with sk.disable_adapter(net):
                assert_same_outputs(net, base)
            assert_same_outputs(net, base)  # the inner block has left the outer one alone
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, outputs(net), expected))


def test_the_base_is_not_handed_out_for_writing_while_disabled(base):
    net = injected(base)
    with sk.disable_adapter(net), torch.no_grad():
        for layer in sk.ssvd_layers(net).values():
            assert torch.equal(layer.weight, layer.base_weight)
            layer.weight.zero_()
        assert_same_outputs(net, base)


def test_disabling_ends_with_its_block_and_is_not_copied(base):
    net = injected(base)
    expected = outputs(net)
    with pytest.raises(KeyError), sk.disable_adapter(net):
        raise KeyError
    assert all(map(torch.equal, outputs(net), expected))
    with sk.disable_adapter(net):
        twin = copy.deepcopy(net)
        for unload in (False, True):
            with pytest.raises(ValueError, match=r"first while its adapter is disabled"):
                sk.merge(net, unload=unload)
    assert all(map(torch.equal, outputs(net), expected)) and all(map(torch.equal, outputs(twin), expected))


# -- averaging ---------------------------------------------------------------------------------------------------------


def test_average_of_one_adapter_is_that_adapter(base):
    net = with_adapters(base, "b")
    for weight in (1, 0.3):
        sk.average_adapters(net, {"b": weight}, into=f"mean{int(10 * weight)}")
    for name in ("mean10", "mean3"):
        assert all(map(torch.equal, values(net, name), values(net, "b")))
    sk.set_adapter(net, "b")
    expected = outputs(net)
    sk.set_adapter(net, "mean10")
    assert all(map(torch.equal, outputs(net), expected))
    assert all(p.requires_grad for layer in sk.ssvd_layers(net).values() for p in layer.adapter().values())


@pytest.mark.parametrize("side", ["input", "both"])
def test_average_is_the_mean_of_theta_and_stays_orthogonal(base, side):
    net = with_adapters(base, "b", "c", side=side)
    found = {name: values(net, name) for name in ("default", "b", "c")}
    sk.average_adapters(net, {"default": 1, "b": 2, "c": 1}, into="c")
    for mean, a, b, c in zip(values(net, "c"), *found.values(), strict=True):
        exact = (a.double() + 2 * b.double() + c.double()) / 4
        # few numbers: three roundings of the weights, three of the products and two of the sums
        size = (a.norm() + 2 * b.norm() + c.norm()) / 4
        assert (mean - exact).norm() <= 8 * unit_roundoff(torch.float32) * size
    for name in ("default", "b"):
        assert all(map(torch.equal, values(net, name), found[name]))
    sk.set_adapter(net, "c")
    for layer in sk.ssvd_layers(net).values():
        for key, k in (("theta", layer.k_in), ("theta_out", layer.k_out)):
            if key in layer.adapter():
                G = sk.cayley(layer.adapter()[key].detach().double(), k)
                # 45 eps of float64, for a solve and sums of at most 5 products
                assert (G.T @ G - torch.eye(k)).abs().max() < 1e-14


@pytest.mark.parametrize("weights", [{}, {"b": 0}, {"b": -1.0, "default": 2}, {"b": float("nan")}])
def test_average_refuses_weights_that_are_none(base, weights):
    net = with_adapters(base, "b")
    with refused(net, ValueError, r"`weights` must be numbers >= 0, .*got "):
        sk.average_adapters(net, weights, into="mean")
    with refused(net, ValueError, r"`adapter` must be one of 'default', 'b', got 'c'"):
        sk.average_adapters(net, {"b": 1, "c": 1}, into="mean")


@pytest.mark.slow
def test_compiled_model_switches_without_compiling_again():
    torch._dynamo.reset()
    base = Stack()
    net = with_adapters(base, "b", "c")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 8)

    def check() -> None:
        plain, exact = references(net, lambda model: square_gradients(model.train(), x))
        compiled.train()(x).square().mean().backward()
        assert_all_within(gradients(net), plain, exact)
        with torch.no_grad():
            assert_within(compiled.eval()(x), *references(net, lambda model: model.eval()(x)))

    check()
    with torch.no_grad(), sk.disable_adapter(net):
        assert_within(compiled(x), base(x), copy.deepcopy(base).double()(x.double()))
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("b", "default", "c"):
            sk.set_adapter(net, name)
            check()
        sk.add_adapter(net, "d")
        sk.set_adapter(net, "d")
        check()
