"""Adapters on disk: what is loaded is what was saved, in a small file that a crash does not damage."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import roundtrip
import torch
from bounds import assert_within
from hypothesis import given
from hypothesis import strategies as st
from models import references
from roundtrip import ROTATIONS, Net, assert_computes, assert_same_outputs, loaded, outputs, train_randomly
from several import injected
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.utils import safetensors_io


@roundtrip.PROPERTY
@given(roundtrip.cases(), st.booleans())
def test_saved_adapter_loads_into_a_fresh_base_bit_for_bit(case, save_bases):
    base = roundtrip.base_net(case)
    net = roundtrip.injected(case, base)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        sk.save_adapter(net, path, save_bases=save_bases)
        fresh, present = copy.deepcopy(base), copy.deepcopy(base)
        assert sk.load_adapter(fresh, path, progress=False) == list(sk.adapted_layers(net))
        assert_same_outputs(fresh, net)
        assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in net.parameters()]
        sk.inject(present, case.config, progress=False)
        train_randomly(present, 99)
        outputs(present)  # whatever was cached must go
        sk.load_adapter(present, path, progress=False)
        assert_same_outputs(present, net)
        sk.save_adapter(present, path)
        third = loaded(base, path)
        assert_same_outputs(third, net)
        sk.remove(third)
        roundtrip.assert_equal_state(third, base.state_dict())


def test_adapter_loads_with_another_thread_count(tmp_path):
    base, before = Net(256, 320, 200), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        net = injected(base, rank=None, ratio=0.4)
        train_randomly(net, scale=0.5)
        sk.save_adapter(net, tmp_path / "a.safetensors")
        torch.set_num_threads(1)
        sk.load_adapter(base, tmp_path / "a.safetensors", progress=False)
    finally:
        torch.set_num_threads(before)
    for found in (net, base):
        assert_computes(outputs(found), net)


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("into", ["base", "injected"])
def test_loaded_model_does_not_depend_on_the_file_any_more(tmp_path, save_bases, into):
    """The file may be memory-mapped while it is read; a parameter that stays mapped changes, or crashes, with it."""
    base, path = Net(24, 40, 32), tmp_path / "a.safetensors"
    net = injected(base, rank=10)
    sk.save_adapter(net, path, save_bases=save_bases)
    fresh = injected(base, seed=2, rank=10) if into == "injected" else base
    sk.load_adapter(fresh, path, progress=False)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_outputs(fresh, net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_with_its_bases_loads_on_a_rounded_base(tmp_path, dtype):
    base, path = Net(24, 40, 32), tmp_path / "a.safetensors"
    net = injected(base, rank=10)
    sk.save_adapter(net, path, save_bases=True)
    rounded = loaded(copy.deepcopy(base).to(dtype), path)
    for name, layer in sk.adapted_layers(rounded).items():
        assert torch.equal(layer.core(), sk.adapted_layers(net)[name].core())
        assert layer.base_weight.dtype == dtype
    (plain, _), (_, exact) = (references(model, lambda network: outputs(network)[0]) for model in (rounded, net))
    assert_within(outputs(rounded)[0], plain, exact)
    sk.save_adapter(net, path)
    with pytest.raises(sk.AdapterError, match="save_bases=True"):
        loaded(copy.deepcopy(base).to(dtype), path)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("side", ["input", "both"])
@pytest.mark.parametrize("k", [153, 128, 127, 64, 16, 1])
def test_adapter_file_size(tmp_path, k, side, rotation):
    net: nn.Module = nn.ModuleDict({name: nn.Linear(k + 5, k + 40) for name in ("q_proj", "k_proj", "out_proj")})
    for part in ("encoder_attn", "10", "layers", "decoder", "model"):  # names as long as a real model's
        net = nn.ModuleDict({part: net})
    report = sk.inject(net, sk.SSVDConfig(rank=k, side=side, rotation=rotation), progress=False)
    train_randomly(net)
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path)
    trained, size = 4 * report.trainable, path.stat().st_size
    assert trained < size <= (1.3 * trained if k >= 128 else trained + 4096 * len(report.modules))


def test_equal_adapters_are_equal_files(tmp_path):
    files = set()
    for index in range(8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7))
        sk.save_adapter(injected(model, rank=3), tmp_path / f"{index}.safetensors")
        files.add((tmp_path / f"{index}.safetensors").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["writing", "replacing"])
@pytest.mark.parametrize("existing", [True, False])
def test_crash_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, when, existing):
    net = injected(Net(8, 12, 10), rank=3)
    path = tmp_path / "a.safetensors"
    if existing:
        sk.save_adapter(net, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    train_randomly(net, 2)

    def stopped(tensors, filename, metadata=None):
        if when == "writing":
            Path(filename).write_bytes(b"half of it")
        raise error

    module, name = (safetensors_io, "save_file") if when == "writing" else (safetensors_io.os, "replace")
    monkeypatch.setattr(module, name, stopped)
    with pytest.raises(type(error)):
        sk.save_adapter(net, path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    sk.save_adapter(net, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_compiled_model_saves_and_loads_under_its_own_names(tmp_path):
    """torch.compile's wrapper puts a name before every other; an adapter does not have it."""
    base, path = Net(8, 12, 10), tmp_path / "a.safetensors"
    net = injected(base, rank=3)
    sk.save_adapter(torch.compile(net), path)
    assert sk.load_adapter(torch.compile(base), path, progress=False) == list(sk.adapted_layers(net))
    assert_same_outputs(base, net)


def test_parameters_that_train_beside_the_adapter_are_named(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sk.inject(model, sk.SSVDConfig(rank=4, targets=["0"]), progress=False)
    with caplog.at_level("WARNING", logger="ssvd_kernels"):
        sk.save_adapter(model, tmp_path / "adapter.safetensors")
        assert not caplog.text
        model[1].requires_grad_(True)
        model[0].bias.requires_grad_(True)
        sk.save_adapter(model, tmp_path / "adapter.safetensors")
    assert "3 other parameters train and are not saved with the adapter: 0.bias, 1.weight, 1.bias." in caplog.text
