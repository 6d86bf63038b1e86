"""Several named adapters on one injected model: switched, disabled, averaged, deleted, saved and loaded."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import relative_error
from models import Stack, counted, gradients
from refusals import refused
from roundtrip import ROTATIONS, SIDES, Net, assert_equal_state, assert_same_outputs, example, outputs, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels import model as model_module
from ssvd_kernels.factorize import Factorization, factorize, sketch

pytestmark = pytest.mark.usefixtures("one_thread")


def injected(base: nn.Module, **options) -> nn.Module:
    net = copy.deepcopy(base)
    sk.inject(net, sk.SSVDConfig(**{"rank": 5, **options}), progress=False)
    train_randomly(net)
    return net


def with_adapters(base: nn.Module, *names: str, **options) -> nn.Module:
    """An injected model with "default", in use, and the named adapters, all of them trained otherwise."""
    net = injected(base, **options)
    for seed, name in enumerate(names, start=7):
        sk.add_adapter(net, name)
        sk.set_adapter(net, name)
        train_randomly(net, seed)
    sk.set_adapter(net, "default")
    return net


def values(net: nn.Module, name: str) -> list[Tensor]:
    return [p.detach().clone() for layer in sk.ssvd_layers(net).values() for p in layer.adapter(name).values()]


def loss_gradients(net: nn.Module) -> dict[str, Tensor]:
    net.train()(example(net)).square().mean().backward()
    return gradients(net)


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
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            (net.train()(x) - x.flip(-1)).square().mean().backward()
            optimizer.step()

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
    assert all(layer._cache and layer._workspace._kept for layer in layers)
    change(net)
    assert not any(layer._cache or layer._workspace._kept for layer in layers)


def test_merging_takes_the_adapter_in_use(base):
    net = with_adapters(base, "b")
    sk.set_adapter(net, "b")
    expected = outputs(net)[1]
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
    sk.merge(net, unload=True)
    assert relative_error(net(example(net)).detach(), expected) <= 1e-6
    assert not any("parked" in name for name in net.state_dict())


def test_remove_gives_the_base_model_back(base):
    net = with_adapters(base, "b")
    sk.set_adapter(net, "b")
    sk.remove(net)
    assert_equal_state(net, base.state_dict())
    assert_same_outputs(net, base)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "parameters", 3, None])
def test_names_that_no_adapter_can_have(base, name):
    net = injected(base)
    with refused(net, ValueError, rf"name={name!r}: allowed are letters"):
        sk.add_adapter(net, name)


def test_names_that_are_taken_unknown_or_in_use(base):
    net = with_adapters(base, "b")
    for name in ("default", "b"):
        with refused(net, ValueError, rf"name={name!r} is taken.*'b', 'default'"):
            sk.add_adapter(net, name)
    for call in (sk.set_adapter, sk.delete_adapter):
        with refused(net, ValueError, r"adapter='c': allowed are 'default', 'b'"):
            call(net, "c")
    with refused(net, ValueError, r"name='default' is the adapter in use"):
        sk.delete_adapter(net, "default")
    for call in (sk.adapter_names, lambda model: sk.add_adapter(model, "c"), lambda model: sk.set_adapter(model, "b")):
        with refused(base, ValueError, "has no SSVD layer"):
            call(base)


def test_layers_with_different_adapters_are_named(base):
    net = injected(base)
    sk.add_adapter(net.block, "b")
    with pytest.raises(ValueError, match=r"first has the adapters \['default'\].*block\.inner \['default', 'b'\]"):
        sk.adapter_names(net)
    with refused(net, ValueError, r"adapter='b': allowed are 'default'"):
        sk.set_adapter(net, "b")


def test_adapters_cannot_change_where_the_parameters_are_not_the_layers_own(base):
    net = with_adapters(base, "b")

    def forward(*_) -> None:
        sk.set_adapter(net, "b")

    net.last.register_forward_pre_hook(forward)
    with pytest.raises(ValueError, match=r"first\.theta is a Tensor: allowed is a Parameter, not sharded"):
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


def test_disabling_ends_with_its_block_and_is_not_copied(base):
    net = injected(base)
    expected = outputs(net)
    with pytest.raises(KeyError), sk.disable_adapter(net):
        raise KeyError
    assert all(map(torch.equal, outputs(net), expected))
    with sk.disable_adapter(net):
        twin = copy.deepcopy(net)
        with pytest.raises(ValueError, match=r"first while its adapter is disabled"):
            sk.merge(net)
        with pytest.raises(ValueError, match=r"first while its adapter is disabled"):
            sk.merge(net, unload=True)
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
        expected = (a.double() + 2 * b.double() + c.double()) / 4
        assert relative_error(mean, expected) <= 3e-7
    for name in ("default", "b"):
        assert all(map(torch.equal, values(net, name), found[name]))
    sk.set_adapter(net, "c")
    for layer in sk.ssvd_layers(net).values():
        for key, k in (("theta", layer.k_in), ("theta_out", layer.k_out)):
            if key in layer.adapter():
                G = sk.cayley(layer.adapter()[key].detach().double(), k)
                assert (G.T @ G - torch.eye(k)).abs().max() < 1e-14


@pytest.mark.parametrize("weights", [{}, {"b": 0}, {"b": -1.0, "default": 2}, {"b": float("nan")}])
def test_average_refuses_weights_that_are_none(base, weights):
    net = with_adapters(base, "b")
    with refused(net, ValueError, r"weights=.*allowed are names with numbers >= 0"):
        sk.average_adapters(net, weights, into="mean")
    with refused(net, ValueError, r"adapter='c': allowed are 'default', 'b'"):
        sk.average_adapters(net, {"b": 1, "c": 1}, into="mean")


# -- files -------------------------------------------------------------------------------------------------------------


def _flipped(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    found = factorize(weight, k, name)
    signs = torch.where(torch.arange(k) % 3 == 0, -1.0, 1.0).to(found.U.dtype)
    U, V = found.U * signs, found.V * signs
    return found._replace(U=U, V=V, sketch=sketch(U, V))


def test_any_adapter_is_saved_as_if_it_were_in_use(base, tmp_path):
    net = with_adapters(base, "b")
    sk.save_adapter(net, tmp_path / "parked", adapter="b")
    sk.save_adapter(net, tmp_path / "default", adapter="default")
    sk.save_adapter(net, tmp_path / "in use")
    assert (tmp_path / "default").read_bytes() == (tmp_path / "in use").read_bytes()
    sk.set_adapter(net, "b")
    sk.save_adapter(net, tmp_path / "b")
    assert (tmp_path / "parked").read_bytes() == (tmp_path / "b").read_bytes()
    with refused(net, ValueError, r"adapter='c': allowed are 'b', 'default'"):
        sk.save_adapter(net, tmp_path / "c", adapter="c")
    assert not (tmp_path / "c").exists()
    fresh = copy.deepcopy(base)
    sk.load_adapter(fresh, tmp_path / "parked", progress=False)
    assert_same_outputs(fresh, net)


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("by", ["add", "load"])
def test_file_that_means_other_signs_leaves_the_other_adapters_alone(
    base, tmp_path, monkeypatch, by, side, rotation, save_bases
):
    options = {"side": side, "rotation": rotation, **({"rank_out": 3} if side == "both" else {})}
    net = with_adapters(base, "b", **options)
    before, present = outputs(net), values(net, "default")
    monkeypatch.setattr(model_module, "factorize", _flipped)
    other = injected(base, **options)
    train_randomly(other, 31)
    sk.save_adapter(other, tmp_path / "a", save_bases=save_bases)
    flips = [(a.V * b.V).sum(0) for a, b in zip(sk.ssvd_layers(net).values(), sk.ssvd_layers(other).values())]
    assert all(bool((products < 0).any()) for products in flips)
    if by == "add":
        sk.add_adapter(net, "c", tmp_path / "a")
        sk.set_adapter(net, "c")
    else:
        sk.set_adapter(net, "b")
        sk.load_adapter(net, tmp_path / "a")
    for ours, theirs in zip(outputs(net), outputs(other), strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    sk.save_adapter(net, tmp_path / "again")  # in the signs of this model
    fresh = copy.deepcopy(base)
    sk.load_adapter(fresh, tmp_path / "again", progress=False)
    assert relative_error(outputs(fresh)[0], outputs(other)[0]) <= 1e-6
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, values(net, "default"), present)) and all(map(torch.equal, outputs(net), before))


def _files(base: nn.Module, other: nn.Module, path) -> dict[str, str]:
    """File -> what its refusal says."""
    sk.save_adapter(injected(base, rank=4), path / "rank")
    sk.save_adapter(injected(base, side="output"), path / "side")
    sk.save_adapter(injected(base, rotation="linear"), path / "rotation")
    sk.save_adapter(injected(base, targets=["first"]), path / "layers")
    sk.save_adapter(injected(other), path / "base")
    (path / "damaged").write_bytes((path / "rank").read_bytes()[:200])
    return {
        "rank": r"'k': 4.*but the model has.*'k': 5",
        "side": r"'side': 'output'.*but the model has.*'side': 'input'",
        "rotation": r"'rotation': 'linear'.*but the model has.*'rotation': 'cayley'",
        "layers": r"adapts 1 layers and the model has 3.*differ",
        "base": r"trained on another base model: the weight of first differs",
        "damaged": r"is damaged",
    }


@pytest.mark.parametrize("call", [sk.load_adapter, lambda net, path: sk.add_adapter(net, "c", path)])
def test_file_of_an_adapter_that_does_not_fit(base, tmp_path, call):
    net = with_adapters(base, "b")
    for name, message in _files(base, Net(12, 16, 9), tmp_path).items():
        with refused(net, sk.AdapterError, message):
            call(net, tmp_path / name)
    with refused(net, FileNotFoundError, "no such adapter file"):
        call(net, tmp_path / "none")


def test_file_with_a_basis_of_its_own_is_refused_beside_others(base, tmp_path):
    """With equal singular values the vectors are a matter of choice, and the present ones belong to other adapters."""
    with torch.no_grad():
        nn.init.orthogonal_(base.first.weight)
    net, other = injected(base), injected(base)
    layer = other.first
    turn = torch.linalg.qr(torch.randn(layer.k, layer.k)).Q
    layer.set_basis(layer.U @ turn, layer.sigma, layer.V @ turn)
    sk.save_adapter(other, tmp_path / "a")
    with refused(net, sk.AdapterError, r"singular vectors of first cannot be matched.*share its bases"):
        sk.add_adapter(net, "b", tmp_path / "a")
    sk.load_adapter(net, tmp_path / "a")  # alone, it brings its basis
    assert_same_outputs(net, other)
    sk.add_adapter(net, "b", tmp_path / "a")  # and now it fits
    sk.set_adapter(net, "b")
    assert_same_outputs(net, other)


# -- state dicts, copies, casts ----------------------------------------------------------------------------------------


def test_state_dict_holds_all_adapters(base):
    net = with_adapters(base, "b")
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    fresh = with_adapters(base, "b")
    train_randomly(fresh, 50)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    for name in ("default", "b"):
        for model in (net, fresh):
            sk.set_adapter(model, name)
        assert_same_outputs(fresh, net)


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_of_other_adapters_is_refused(base, strict):
    def states() -> dict[str, nn.Module]:
        in_use = with_adapters(base, "b")
        sk.set_adapter(in_use, "b")
        renamed = with_adapters(base, "b", "c")
        sk.set_adapter(renamed, "c")
        sk.delete_adapter(renamed, "default")  # "b" parked as in `net`, and another one in use
        return {"single": injected(base), "more": with_adapters(base, "b", "c"), "in use": in_use, "renamed": renamed}

    for other in states().values():
        net = with_adapters(base, "b")
        expected = values(net, "default")
        with pytest.raises(RuntimeError, match=r"first has the adapters \['default', 'b'\], the first of them in use"):
            net.load_state_dict(other.state_dict(), strict=strict)
        assert all(map(torch.equal, values(net, "default"), expected))
    with pytest.raises(RuntimeError, match=r"first has the adapters \['default'\].*the adapters \['default', 'b'\]"):
        injected(base).load_state_dict(with_adapters(base, "b").state_dict(), strict=strict)


def test_base_checkpoints_still_load(base):
    net = with_adapters(base, "b")
    expected = outputs(net)
    missing, unexpected = net.load_state_dict(base.state_dict(), strict=False)
    assert missing and not unexpected
    assert all(map(torch.equal, outputs(net), expected))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_adapters_of_their_own(base, clone: Callable[[nn.Module], nn.Module]):
    net = with_adapters(base, "b")
    twin = clone(net)
    assert sk.adapter_names(twin) == sk.adapter_names(net)
    expected = {name: values(net, name) for name in sk.adapter_names(net)}
    for name, theirs in expected.items():
        sk.set_adapter(twin, name)
        assert all(map(torch.equal, values(twin, name), theirs))
        train_randomly(twin, 77)
    for name, theirs in expected.items():
        assert all(map(torch.equal, values(net, name), theirs))


def test_parked_adapters_are_cast_and_moved_with_the_model(base):
    net = with_adapters(base, "b")
    sk.set_adapter(net.double(), "b")
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert all(p.is_meta for p in net.to("meta").parameters())


# -- compile -----------------------------------------------------------------------------------------------------------


def test_compiled_model_switches_without_compiling_again():
    torch._dynamo.reset()
    net = with_adapters(Stack(None), "b", "c")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)

    def check() -> None:
        twin = copy.deepcopy(net)
        for model in (compiled, twin):
            model.train()(x).square().mean().backward()
        ours, expected = gradients(net), gradients(twin)
        for name, grad in expected.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-6)

    check()
    with torch.no_grad(), sk.disable_adapter(net):
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("b", "default", "c"):
            sk.set_adapter(net, name)
            check()
        sk.add_adapter(net, "d")
        sk.set_adapter(net, "d")
        check()
