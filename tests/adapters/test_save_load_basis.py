"""Adapters, state dicts and resumed training where the base is factorised otherwise than when they were saved."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import relative_error
from roundtrip import ROTATIONS, SIDES, Net, assert_computes, assert_same_outputs, flipped, loaded, outputs, steps
from safetensors import safe_open
from several import injected, train_randomly
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis import batch
from ssvd_kernels.basis.factorize import Factorization, factorize, sketch


def _replaced(weight: Tensor, k: int, name: str, U: Tensor, S: Tensor, V: Tensor) -> Factorization:
    found = factorize(weight, k, name)
    U, S, V = (tensor.to(found.U.dtype).contiguous() for tensor in (U[:, :k], S[:k], V[:, :k]))
    return found._replace(U=U, sigma=S, V=V, sketch=sketch(U, V))


def _transposed(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    V, S, Uh = torch.linalg.svd(weight.detach().double().T.contiguous(), full_matrices=False)
    return _replaced(weight, k, name, Uh.T, S, V)


def _gram(weight: Tensor, k: int, name: str = "weight") -> Factorization:
    W = weight.detach().double()
    values, vectors = torch.linalg.eigh(W.T @ W)
    V, S = vectors.flip(1), values.flip(0).clamp(min=0).sqrt()
    return _replaced(weight, k, name, (W @ V[:, :k]) / S[:k], S, V)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("other", "into"), [(flipped, "injected"), (_transposed, "base"), (_gram, "injected")])
def test_adapter_loads_on_a_base_factorised_otherwise(tmp_path, monkeypatch, other, side, into):
    options = {"rank": None, "ratio": 0.4, "side": side}
    base = Net(96, 160, 72)
    net = injected(base, **options)
    train_randomly(net, scale=0.5)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    monkeypatch.setattr(batch, "factorize", other)
    fresh = injected(base, seed=2, **options)
    pairs = list(zip(sk.ssvd_layers(fresh).values(), sk.ssvd_layers(net).values(), strict=True))
    assert any(((a.V * b.V).sum(0) < 0).any() for a, b in pairs)  # the basis is another one indeed
    if into == "base":
        fresh = copy.deepcopy(base)
    sk.load_adapter(fresh, tmp_path / "a.safetensors", progress=False)
    assert_computes(outputs(fresh), net)
    assert relative_error(outputs(base)[0], outputs(net)[0]) > 0.05  # the update is not too small to notice


AMBIGUOUS = {
    "zero": lambda linear: torch.zeros_like(linear.weight),
    "repeated": lambda linear: nn.init.orthogonal_(torch.empty_like(linear.weight)),
    "rank deficient": lambda linear: torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features),
    "one pair equal": lambda linear: torch.eye(*linear.weight.shape) * torch.tensor([5.0, 4, 4, 3, 2, 1, 0.5, 0.2]),
}


@pytest.mark.parametrize("spectrum", AMBIGUOUS)
@pytest.mark.parametrize("other", [factorize, _transposed])
def test_basis_that_cannot_be_recomputed_is_stored_and_loads(tmp_path, monkeypatch, caplog, spectrum, other):
    base = Net(8, 12, 10)
    with torch.no_grad():
        base.first.weight.copy_(AMBIGUOUS[spectrum](base.first))
    net = injected(base, rank=6)
    with caplog.at_level("INFO", logger="ssvd_kernels"):
        sk.save_adapter(net, tmp_path / "a.safetensors")
    assert "first" in caplog.text
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        stored = {key for key in file.keys() if key.endswith((".U", ".V"))}
    assert stored == {"first.U", "first.V"}  # that layer's, and no other's
    monkeypatch.setattr(batch, "factorize", other)
    for fresh in (copy.deepcopy(base), copy.deepcopy(base), injected(base, seed=2, rank=6)):
        sk.load_adapter(fresh, tmp_path / "a.safetensors", progress=False)
        assert_computes(outputs(fresh), net)
        sk.save_adapter(fresh, tmp_path / "a.safetensors")  # and again from what was loaded


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_carries_its_own_basis(tmp_path, monkeypatch, side):
    base = Net(12, 16, 9)
    net = injected(base, side=side)
    torch.save(net.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(batch, "factorize", flipped)
    fresh = injected(base, seed=2, side=side)
    outputs(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_same_outputs(fresh, net)
    sk.save_adapter(fresh, tmp_path / "a.safetensors")
    assert_same_outputs(loaded(base, tmp_path / "a.safetensors"), net)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("by", ["state dict", "adapter"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_resumed_training_is_bit_equal_to_uninterrupted_training(tmp_path, monkeypatch, by, fused, rotation):
    base = Net(12, 16, 9)

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = injected(base, rotation=rotation)
        trained = [p for p in net.parameters() if p.requires_grad]
        return net, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01, fused=fused)

    net, optimizer = start()
    steps(net, optimizer, range(4))
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    sk.save_adapter(net, tmp_path / "a.safetensors")
    expected = steps(net, optimizer, range(4, 8))
    assert len(set(expected)) == 4

    monkeypatch.setattr(batch, "factorize", flipped)
    resumed, optimizer = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if by == "state dict":
        resumed.load_state_dict(state["model"], strict=True)
    else:
        sk.load_adapter(resumed, tmp_path / "a.safetensors", progress=False)
    optimizer.load_state_dict(state["optimizer"])
    assert steps(resumed, optimizer, range(4, 8)) == expected
    for (name, a), (_, b) in zip(resumed.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(a, b), name
