"""A model's factorisation shared out over processes: done once, the same bits everywhere, refused in good time."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from roundtrip import Net, factorised
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis.factorize import Factorization, factorize

pytestmark = pytest.mark.xdist_group("processes")


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Net(8, 12, 10), Net(8, 9, 7))


def _inject(model: nn.Module, config: sk.SSVDConfig | None = None, **options) -> nn.Module:
    sk.inject(model, config or sk.SSVDConfig(rank=4), **{"progress": False, **options})
    return model


def _state(model: nn.Module) -> dict:
    layers = sk.ssvd_layers(model)
    return {"state": model.state_dict(), "basis": {name: tuple(layer.basis) for name, layer in layers.items()}}


def _shared(rank: int, share: bool = True, dtype: torch.dtype = torch.float32, folder: str | None = None):
    with factorised() as names:
        model = _inject(_net().to(dtype), share=share, cache_dir=folder)
    return names, _state(model)


def _same_bits(a: dict, b: dict) -> None:
    for name, value in a["state"].items():
        assert torch.equal(value, b["state"][name]), name
    for name, (fingerprint, gap, sketch) in a["basis"].items():
        assert b["basis"][name][:2] == (fingerprint, gap) and torch.equal(b["basis"][name][2], sketch)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_each_layer_is_factorised_on_one_rank_and_all_hold_the_same(group, dtype):
    (first, a), (second, b) = group.run(_shared, True, dtype)
    assert sorted(first + second) == sorted(f"{name}.weight" for name in a["basis"]) and first and second
    _same_bits(a, b)
    _same_bits(a, _state(_inject(_net().to(dtype))))  # and the same as one process finds


def test_opting_out(group):
    (first, a), (second, b) = group.run(_shared, False)
    assert len(first) == len(second) == len(a["basis"]) == 6
    _same_bits(a, b)


def _on_rank_0_alone(rank: int):
    return _shared(rank, False)[0] if rank == 0 else []


@pytest.mark.slow
def test_opting_out_needs_no_other_rank(group):
    first, second = group.run(_on_rank_0_alone)
    assert len(first) == 6 and second == []


def _caught(model: nn.Module, config: sk.SSVDConfig | None = None) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        _inject(model, config)
    except Exception as error:
        assert not sk.ssvd_layers(model) and all(p.requires_grad for p in model[0].first.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def _different(rank: int, how: str) -> str:
    model = _net()
    if how == "weight" and rank == 1:
        with torch.no_grad():
            model[1].block["inner"].weight[0, 0] += 1e-6
    if how == "layers" and rank == 1:
        return _caught(model, sk.SSVDConfig(rank=4, exclude=["first"]))
    if how == "dtype":
        return _caught(model.bfloat16().to(torch.float32 if rank == 0 else torch.bfloat16))
    if how == "rank":
        return _caught(model, sk.SSVDConfig(rank=4 + rank))
    return _caught(model)


@pytest.mark.parametrize(
    ("how", "named"), [("weight", "1.block.inner"), ("layers", "0.first"), ("rank", "0.first"), ("dtype", "0.first")]
)
def test_different_models_are_refused_on_every_rank(group, how, named):
    start = "ValueError: all processes must factorise the same layers and weights, but processes 0 and 1 differ"
    for message in group.run(_different, how):
        assert message.startswith(start) and named in message and "share=False" in message, message


def _fails_on_rank_1(rank: int) -> str:
    def act(weight: Tensor, k: int, name: str) -> Factorization:
        if rank == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return factorize(weight, k, name)

    with factorised(act):
        return _caught(_net())


def test_one_rank_that_fails_does_not_leave_the_other_waiting(group):
    first, second = group.run(_fails_on_rank_1)
    assert first.startswith("RuntimeError: process 1 could not factorise") and "did not converge" in first
    assert second.endswith("LinAlgError: did not converge")


def _progress(rank: int) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        _inject(_net(), progress=True)
    return shown.getvalue()


def test_progress_bar_on_rank_0_only(group):
    first, second = group.run(_progress)
    assert "factorising" in first and "100%" in first and second == ""


def test_ranks_share_a_cache(group, tmp_path):
    (first, a), (second, b) = group.run(_shared, True, torch.float32, str(tmp_path))
    assert len(first + second) == 6
    (none, again), (none_either, _) = group.run(_shared, True, torch.float32, str(tmp_path))
    assert none == none_either == []
    _same_bits(a, b)
    _same_bits(a, again)


def _uneven(rank: int) -> list[int]:
    with factorised() as names:
        _inject(nn.Sequential(nn.Linear(64, 64), *[nn.Linear(8, 8) for _ in range(5)]))
    return names


def test_work_is_balanced_by_cost_not_by_count(group):
    assert sorted(map(len, group.run(_uneven))) == [1, 5]


def _adapter(rank: int, path: str) -> tuple[int, dict]:
    model = _net()
    with factorised() as names:
        sk.load_adapter(model, path, progress=False)
    return len(names), _state(model)


def test_load_adapter_shares_too(group, tmp_path):
    model = _inject(_net())
    sk.save_adapter(model, tmp_path / "a.safetensors")
    (first, a), (second, b) = group.run(_adapter, str(tmp_path / "a.safetensors"))
    assert first and second and first + second == 6
    _same_bits(a, b)
    _same_bits(a, _state(model))
