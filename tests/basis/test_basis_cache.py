"""The cache of factorisations: used for the very same weight and rank only, and never in the way."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from roundtrip import Net, assert_equal_state, assert_same_outputs, factorised, train_randomly
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.basis import cache
from ssvd_kernels.basis.cache import load, store
from ssvd_kernels.basis.factorize import Factorization, factorize

CONFIG = sk.SSVDConfig(rank=4)


def _net() -> Net:
    torch.manual_seed(3)
    return Net(8, 12, 10)


def _inject(folder: Path | None, net: nn.Module | None = None) -> nn.Module:
    net = net if net is not None else _net()
    sk.inject(net, CONFIG, progress=False, cache_dir=folder)
    return net


@pytest.fixture
def counted() -> Iterator[list[str]]:
    """Names of the weights that were factorised rather than found."""
    with factorised() as names:
        yield names


def test_second_time_nothing_is_factorised_and_every_bit_is_the_same(tmp_path, counted):
    first = _inject(tmp_path / "made" / "here")
    assert len(counted) == 3
    second = _inject(tmp_path / "made" / "here")
    assert len(counted) == 3
    assert_equal_state(second, first.state_dict())
    for a, b in zip(sk.ssvd_layers(first).values(), sk.ssvd_layers(second).values(), strict=True):
        assert a.basis[:2] == b.basis[:2] and torch.equal(a.basis.sketch, b.basis.sketch)
    for net in (first, second):
        train_randomly(net)
    assert_same_outputs(first, second)


def test_load_adapter_uses_it_too(tmp_path, counted):
    net = _inject(tmp_path)
    train_randomly(net)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    fresh = _net()
    sk.load_adapter(fresh, tmp_path / "a.safetensors", progress=False, cache_dir=tmp_path)
    assert len(counted) == 3
    assert_same_outputs(fresh, net)


@pytest.mark.parametrize("value", [None, "", "folder"])
def test_environment_names_the_folder_or_nothing_is_written(tmp_path, monkeypatch, counted, value):
    monkeypatch.delenv("SSVD_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    if value is not None:
        monkeypatch.setenv("SSVD_CACHE", value and str(tmp_path / value))
    for _ in range(2):
        _inject(None)
    assert len(counted) == (3 if value else 6) and bool(list(tmp_path.iterdir())) == bool(value)
    _inject(tmp_path / "another")
    assert len(list((tmp_path / "another").iterdir())) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_same_weight_rank_and_version_are_found(tmp_path, monkeypatch, dtype):
    """In float64, too, where the fingerprint, that of a float32 copy, does not see the last bits."""
    weight = torch.randn(9, 7, dtype=dtype)
    store(tmp_path, weight, factorize(weight, 3))
    assert isinstance(load(tmp_path, weight, 3), Factorization)
    changed = weight.clone()
    changed[0, 0] += torch.finfo(dtype).eps * changed[0, 0]
    assert not torch.equal(changed, weight)
    for other in (changed, weight.mT.contiguous(), weight.view(7, 9), -weight):
        assert load(tmp_path, other, 3) is None
    assert load(tmp_path, weight, 2) is None
    double = load(tmp_path, weight.double(), 3)
    assert double is None or double.U.dtype == torch.float64
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert load(tmp_path, weight, 3) is None


def test_weights_of_equal_values_share_an_entry(tmp_path):
    weight = torch.randn(9, 7).bfloat16()
    store(tmp_path, weight, factorize(weight, 3))
    found = load(tmp_path, weight.float(), 3)
    assert found is not None and torch.equal(found.U, factorize(weight.float(), 3).U)


DAMAGES = {  # name -> (an entry's bytes, another entry's) to what is found in their place
    "truncated": lambda content, other: content[:-8],
    "empty": lambda content, other: b"",
    "one bit": lambda content, other: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "other metadata": lambda content, other: safetensors.torch.save(safetensors.torch.load(content), OTHER),
    "no metadata": lambda content, other: safetensors.torch.save(safetensors.torch.load(content)),
    "another entry": lambda content, other: other,
}
OTHER = {"ssvd_kernels": "[1]"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_named_and_replaced(tmp_path, caplog, counted, damage):
    expected = _inject(tmp_path).state_dict()
    path, other, _ = sorted(tmp_path.iterdir())
    path.write_bytes(DAMAGES[damage](path.read_bytes(), other.read_bytes()))
    assert_equal_state(_inject(tmp_path), expected)
    assert len(counted) == 4 and path.name in caplog.text and "damaged" in caplog.text
    _inject(tmp_path)
    assert len(counted) == 4


def test_where_nothing_can_be_written_the_model_is_injected_all_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "write_atomically", Mock(side_effect=OSError(28, "No space left on device")))
    net = _inject(tmp_path)
    assert len(sk.ssvd_layers(net)) == 3 and "No space left on device" in caplog.text
    _inject(tmp_path)


def test_entry_that_is_a_folder(tmp_path, caplog):
    _inject(tmp_path)
    path = next(tmp_path.iterdir())
    path.unlink()
    path.mkdir()
    assert len(sk.ssvd_layers(_inject(tmp_path))) == 3
    assert "damaged" in caplog.text and "could not cache" in caplog.text


def test_cache_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    net = _net()
    with pytest.raises(NotADirectoryError, match=r"`cache_dir` must be a folder, .*got the file "):
        _inject(tmp_path / "file", net)
    assert not sk.ssvd_layers(net)


RACE = """
import pathlib, sys, torch
from ssvd_kernels.basis.cache import load, store
from ssvd_kernels.basis.factorize import factorize
folder, weight, hits = pathlib.Path(sys.argv[1]), torch.randn(48, 32, generator=torch.Generator().manual_seed(0)), 0
expected = factorize(weight, 8)
for _ in range(150):
    if (found := load(folder, weight, 8)) is not None:
        hits += 1
        assert torch.equal(found.U, expected.U) and torch.equal(found.V, expected.V)
    store(folder, weight, expected)
print(hits)
"""


@pytest.mark.slow
def test_processes_that_write_and_read_one_entry_at_once(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        assert int(out) >= 149 and "damaged" not in err
    assert len(list(tmp_path.iterdir())) == 1  # and no temporary file is left


def test_progress_bar_counts_work_and_knows_the_cached(tmp_path, capsys):
    sk.inject(_net(), CONFIG, cache_dir=tmp_path)
    shown = capsys.readouterr().err
    assert re.search(r"100%.*3 of 3 layers", shown)
    next(tmp_path.iterdir()).unlink()
    sk.inject(_net(), CONFIG, cache_dir=tmp_path)
    assert re.search(r"100%.*1 of 1 layers", capsys.readouterr().err)
    sk.inject(_net(), CONFIG, cache_dir=tmp_path)  # all of it cached
    sk.inject(_net(), CONFIG, progress=False)
    assert capsys.readouterr().err == ""
