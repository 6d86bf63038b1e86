"""Several named adapters on one model: in files and state dicts, in copies, and where they do not fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from refusals import refused
from roundtrip import ROTATIONS, SIDES, Net, assert_computes, assert_same_outputs, flipped, loaded, outputs
from several import injected, train_randomly, values, with_adapters
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.basis import batch


@pytest.fixture
def base() -> Net:
    return Net(12, 16, 9)


# -- files -------------------------------------------------------------------------------------------------------------


def test_any_adapter_is_saved_as_if_it_were_in_use(base, tmp_path):
    net = with_adapters(base, "b")
    sk.save_adapter(net, tmp_path / "parked", adapter="b")
    sk.save_adapter(net, tmp_path / "default", adapter="default")
    sk.save_adapter(net, tmp_path / "in use")
    assert (tmp_path / "default").read_bytes() == (tmp_path / "in use").read_bytes()
    sk.set_adapter(net, "b")
    sk.save_adapter(net, tmp_path / "b")
    assert (tmp_path / "parked").read_bytes() == (tmp_path / "b").read_bytes()
    with refused(net, ValueError, r"`adapter` must be one of 'b', 'default', got 'c'"):
        sk.save_adapter(net, tmp_path / "c", adapter="c")
    assert not (tmp_path / "c").exists()
    assert_same_outputs(loaded(base, tmp_path / "parked"), net)


@pytest.mark.parametrize(("by", "save_bases"), [("add", False), ("add", True), ("load", False)])
@pytest.mark.parametrize(("side", "rotation"), list(zip(SIDES, (*ROTATIONS, *ROTATIONS))))
def test_file_that_means_other_signs_leaves_the_other_adapters_alone(
    base, tmp_path, monkeypatch, by, side, rotation, save_bases
):
    options = {"side": side, "rotation": rotation, **({"rank_out": 3} if side == "both" else {})}
    net = with_adapters(base, "b", **options)
    before, present = outputs(net), values(net, "default")
    monkeypatch.setattr(batch, "factorize", flipped)
    other = injected(base, seed=31, **options)
    sk.save_adapter(other, tmp_path / "a", save_bases=save_bases)
    flips = [(a.V * b.V).sum(0) for a, b in zip(sk.ssvd_layers(net).values(), sk.ssvd_layers(other).values())]
    assert all(bool((products < 0).any()) for products in flips)
    if by == "add":
        sk.add_adapter(net, "c", tmp_path / "a")
        sk.set_adapter(net, "c")
    else:
        sk.set_adapter(net, "b")
        sk.load_adapter(net, tmp_path / "a")
    assert_computes(outputs(net), other)
    sk.save_adapter(net, tmp_path / "again")  # in the signs of this model
    assert_computes(outputs(loaded(base, tmp_path / "again")), other)
    sk.set_adapter(net, "default")
    assert all(map(torch.equal, values(net, "default"), present)) and all(map(torch.equal, outputs(net), before))


@pytest.mark.parametrize("call", [sk.load_adapter, lambda net, path: sk.add_adapter(net, "c", path)])
def test_file_of_an_adapter_that_does_not_fit(base, tmp_path, call):
    net, path = with_adapters(base, "b"), tmp_path / "a"
    for other, message in (
        (injected(base, rank=4), r"'k': 4.*but the model has.*'k': 5"),
        (injected(base, side="output"), r"'side': 'output'.*but the model has.*'side': 'input'"),
        (injected(base, rotation="linear"), r"'rotation': 'linear'.*but the model has.*'rotation': 'cayley'"),
        (injected(base, targets=["first"]), r"adapts 1 layers and the model has 3.*differ"),
        (injected(Net(12, 16, 9)), r"trained on another base model: the weight of first differs"),
    ):
        sk.save_adapter(other, path)
        with refused(net, sk.AdapterError, message):
            call(net, path)
    path.write_bytes(path.read_bytes()[:200])
    with refused(net, sk.AdapterError, r"is damaged"):
        call(net, path)
    with refused(net, FileNotFoundError, "`path` must be an existing adapter file, got "):
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


def test_state_dict_holds_all_adapters(base, tmp_path):
    net = with_adapters(base, "b")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    fresh = with_adapters(base, "b")
    train_randomly(fresh, 50)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    for name in ("default", "b"):
        for model in (net, fresh):
            sk.set_adapter(model, name)
        assert_same_outputs(fresh, net)


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_of_other_adapters_is_refused(base, strict):
    in_use = with_adapters(base, "b")
    sk.set_adapter(in_use, "b")
    renamed = with_adapters(base, "b", "c")
    sk.set_adapter(renamed, "c")
    sk.delete_adapter(renamed, "default")  # "b" parked as in `net`, and another one in use
    for other in (injected(base), with_adapters(base, "b", "c"), in_use, renamed):
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
