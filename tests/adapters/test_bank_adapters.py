"""Adapters of an AdapterBank: how they train, come and go, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from banks import NAMES, X, adapted, alone, base_net, files_of, filled, mixed, resident
from bounds import assert_within
from cases import relative_error
from models import references
from roundtrip import Net
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis import factorize

# -- training many at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_gradients_equal_those_of_separate_runs(form, tmp_path):
    net = adapted(base_net(), form=form)
    bank = filled(net, files_of(net, tmp_path))
    trained = ["a", "new", "b"]
    parameters, names = bank.trainable(trained), ["b", "a", "new", "a"]
    assert len(parameters) == 3 * 2 * len(sk.ssvd_layers(net))
    with bank.rows(names):
        loss = net(X).square().sum()
    found = torch.autograd.grad(loss, parameters)
    sk.add_adapter(net, "new")
    for number, name in enumerate(trained):
        own = X[[row for row, each in enumerate(names) if each == name]]
        sk.set_adapter(net, name)

        def gradients(net: nn.Module, own: Tensor = own) -> list[Tensor]:
            leaves = [p for n, p in net.named_parameters() if p.requires_grad and n.split(".")[-1] in TRAINED]
            return list(torch.autograd.grad(net(own).square().sum(), leaves))

        plain, exact = references(net.train(), gradients)
        size = len(parameters) // 3
        ours = found[number * size : (number + 1) * size]
        flat = [torch.cat([each.flatten() for each in grads]) for grads in (ours, plain, exact)]
        assert_within(*flat, name)


TRAINED = ("theta", "delta_sigma")


def test_one_optimizer_trains_each_on_its_own_rows_and_they_are_saved_apart(net, bank, files, tmp_path):
    parameters = bank.trainable(["a", "new"])
    before = mixed(net, bank, ["b", "b", "b", "b"])
    optimizer = torch.optim.SGD(parameters, 1e-2)
    for _ in range(3):
        with bank.rows(["a", "new", "b", None]):
            net(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(mixed(net, bank, 4 * ["b"]), before)
    found = mixed(net, bank, ["a", "new", None, "a"])
    other = copy.deepcopy(net)
    for row, name in enumerate(["a", "new"]):
        bank.save(name, tmp_path / f"{name}.saved")
        sk.load_adapter(other, tmp_path / f"{name}.saved")
        assert relative_error(found[row], other(X).detach()[row].double()) <= 2e-6
    assert relative_error(found[1], found[0].double()) > 1e-3
    with pytest.raises(ValueError, match="`name` must be an adapter that trains in the bank, got 'b'"):
        bank.save("b", tmp_path / "b")


def test_one_block_over_many_steps(net, bank):
    """What is evaluated between steps is what the optimizer has made."""
    optimizer = torch.optim.SGD(bank.trainable(["new"]), 1.0)
    with bank.rows(4 * ["new"]):
        for _ in range(2):
            with torch.no_grad():
                before = net(X)
            loss = net(X).square().mean()
            assert torch.allclose(before.square().mean(), loss, rtol=1e-6)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_training_a_part_of_the_model_is_refused(net, bank):
    bank.trainable(["a"])
    with bank.rows(4 * ["a"]), pytest.raises(RuntimeError, match="not in those of a part of it"):
        net.first(X)


# -- what is in the bank ----------------------------------------------------------------------------------------------


def test_adapters_by_name(net, bank):
    assert bank.names() == NAMES and len(bank) == 3 and "a" in bank and "d" not in bank
    bank.remove("b")
    assert bank.names() == ["a", "c"]
    bank.add("b")  # the model's own
    assert relative_error(mixed(net, bank, 4 * ["b"]), net(X).detach().double()) <= 2e-6
    values = {name: dict(layer.adapter("c")) for name, layer in sk.ssvd_layers(net).items()}
    bank.add("again", values)
    assert torch.equal(mixed(net, bank, 4 * ["again"]), mixed(net, bank, 4 * ["c"]))


def test_values_from_elsewhere_come_to_the_layers_device(net, files):
    """A file is read on the CPU; the "meta" device refuses, as a GPU does, to compute with tensors that are there."""
    bank = sk.AdapterBank(net.to("meta"))
    bank.add("a", files["a"])
    assert "a" in bank


def test_adding_factorises_nothing(net, files, monkeypatch):
    def forbidden(*arguments: object) -> None:
        raise AssertionError("factorised")

    monkeypatch.setattr(factorize, "factorize", forbidden)
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    assert len(filled(net, files)) == 3


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_strength(net, files, tmp_path, strength):
    bank = sk.AdapterBank(net)
    bank.add("given", files["a"], strength=strength)
    sk.set_adapter(net, "a")
    sk.set_strength(net, strength)
    sk.save_adapter(net, tmp_path / "scaled")
    bank.add("of_file", tmp_path / "scaled")
    bank.add("own")
    bank.add("of_memory", {name: layer.adapter() for name, layer in sk.ssvd_layers(net).items()}, strength=strength)
    expected = net(X).detach()
    for name in ("given", "of_file", "own", "of_memory"):
        assert relative_error(mixed(net, bank, 4 * [name]), expected.double()) <= 2e-6


def test_the_least_recently_used_leave_and_come_back(net, files):
    other = copy.deepcopy(net)
    ample = filled(other, files)
    expected = {name: mixed(other, ample, 4 * [name]) for name in NAMES}
    bank = filled(net, files, memory=2 * ample.bytes_per_adapter + 1)
    assert len(bank) == 3 and resident(bank) == ["b", "c"]
    for name in ["a", "c", "b", "a", "a", "c"]:
        assert torch.equal(mixed(net, bank, 4 * [name]), expected[name])
        assert name in resident(bank) and len(resident(bank)) == 2
    with bank.rows(["a", "c", "a", "c"]), pytest.raises(ValueError, match="`memory` holds 2 adapters, all of which"):
        bank.add("d", files["b"])
    with pytest.raises(ValueError, match="`memory` holds 2 adapters"), bank.rows(["a", "b", "c", None]):
        pass
    assert torch.equal(mixed(net, bank, 4 * ["b"]), expected["b"])  # nobody is in use after a refusal


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_wrong_names_and_rows(net, bank):
    def names(*each: str | None) -> object:
        return bank.rows(list(each))

    for given, match in [
        (["a", "d"], "`name` must be one of a, b, c, got 'd'"),
        ([], "`names` must be a list with a name or None for each row"),
        ("a", "`names` must be a list"),
    ]:
        with pytest.raises(ValueError, match=match), bank.rows(given):
            pass
    with names("a", "b", "c"), pytest.raises(ValueError, match=r"first must get the 3 rows that were named"):
        net(X)
    with names("a", "b"):
        with pytest.raises(ValueError, match="must not be nested"), names("a"):
            pass
        with pytest.raises(ValueError, match="`name` must not be in use, got 'a'"):
            bank.remove("a")
        with pytest.raises(ValueError, match="`names` must not be in use, got 'a'"):
            bank.trainable(["a"])
    bank.remove("a")


@pytest.mark.parametrize("name", ["", "../a", "a b", None, 3])
def test_no_name(bank, name):
    with pytest.raises(ValueError, match="`name` must consist of letters"):
        bank.add(name)


def test_taken_name(bank, files):
    with pytest.raises(ValueError, match="`name` must not be taken, got 'a'"):
        bank.add("a", files["b"])


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"rank": 4}, "'k': 4"),
        ({"side": "output"}, "'side': 'output'"),
        ({"rotation": "linear"}, "'rotation': 'linear'"),
        ({}, "another base model"),
    ],
)
def test_adapters_of_other_models(net, bank, tmp_path, other, match):
    torch.manual_seed(0 if other else 1)
    sk.save_adapter(adapted(Net(24, 32, 20), **other), tmp_path / "other")
    with pytest.raises(sk.AdapterError, match=match):
        bank.add("other", tmp_path / "other")
    assert bank.names() == NAMES


def test_values_that_do_not_fit(net, bank):
    values = {name: dict(layer.adapter()) for name, layer in sk.ssvd_layers(net).items()}
    values["first"] |= {"theta": values["first"]["theta"][1:]}
    with pytest.raises(ValueError, match=r"`source` must have finite first\.theta of shape \(10,\), got shape \(9,\)"):
        bank.add("short", values)


def test_rows_that_leave_the_batch_early_are_refused(net, bank):
    with torch.no_grad(), bank.rows(["a", "b"]):
        net(X)
        with pytest.raises(ValueError, match="must not drop rows"):
            net(X[:2])


class Wrong(nn.Module):
    """Layers whose input's first dimension is not the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "time first":
            return self.first(x.transpose(0, 1)).transpose(0, 1)
        return self.first(x) + self.last(torch.ones(1, x.shape[1], 24))  # positions


@pytest.mark.parametrize(("how", "name"), [("time first", "first"), ("positions", "last")])
def test_a_layer_that_sees_no_rows_is_refused_by_name(how, name):
    net = Wrong(how).eval()
    sk.inject(net, sk.SSVDConfig(rank=4), progress=False)
    bank = sk.AdapterBank(net)
    bank.add("a")
    with torch.no_grad():
        with bank.rows(["a", None]), pytest.raises(ValueError, match=f"^{name} must get the 2 rows"):
            net(X)
        with bank.rows(["a", "a"]):  # one adapter for all: whatever the rows are
            assert torch.allclose(net(X), Wrong.forward(net, X))


def test_flattened_rows():
    """(B T, d), as the layers of some models get them."""
    net = adapted(base_net())
    bank = sk.AdapterBank(net)
    for name in NAMES:
        sk.set_adapter(net, name)
        bank.add(name)
    names: list[str | None] = ["b", None, "a", "c"]
    expected = mixed(net, bank, names)
    net.forward = lambda x: Net.forward(net, x.flatten(0, 1)).view_as(x)
    assert relative_error(mixed(net, bank, names), expected.double()) <= 2e-6


def test_time_first_attention_is_refused():
    net = nn.TransformerEncoderLayer(24, 2, 32, batch_first=False)
    sk.inject(net, sk.SSVDConfig(rank=4), progress=False)
    with pytest.raises(ValueError, match="got attention with time first"):
        sk.AdapterBank(net)


def test_models_that_cannot_have_a_bank(net, bank):
    with pytest.raises(ValueError, match="in another bank"):
        sk.AdapterBank(net)
    with pytest.raises(ValueError, match="no SSVD layer"):
        sk.AdapterBank(base_net())
    copied = copy.deepcopy(net)
    sk.merge(copied)
    with pytest.raises(ValueError, match="merged"):
        sk.AdapterBank(copied)
    spectral = base_net()
    sk.inject(spectral, sk.SpectralFTConfig(top=8, rank=2), progress=False)
    with pytest.raises(ValueError, match="adapted by SpectralFT"):
        sk.AdapterBank(spectral)
    with pytest.raises(ValueError, match="`memory` must hold one adapter"):
        sk.AdapterBank(copy.deepcopy(net), memory=10)


def test_a_copy_of_the_model_has_no_bank(net, bank):
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert all(layer.bank is None for layer in sk.ssvd_layers(copied).values())
    with torch.no_grad(), bank.rows(4 * ["a"]):
        assert torch.equal(copied(X), alone(net, "default", X, lambda net, x: copied(x)))


def test_merged_and_disabled_layers(net, bank):
    sk.merge(net)
    with pytest.raises(ValueError, match="merged or disabled"), bank.rows(["a"]):
        pass
    sk.unmerge(net)
    with sk.disable_adapter(net), pytest.raises(ValueError, match="merged or disabled"), bank.rows(["a"]):
        pass


def test_compiled_models_serve_their_own_adapter_alone(net, bank):
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert relative_error(compiled(X), net(X).double()) <= 2e-6
        with bank.rows(["a", "b"]), pytest.raises(Exception, match="a compiled model cannot have rows"):
            compiled(X)
