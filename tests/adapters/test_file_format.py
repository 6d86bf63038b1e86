"""Adapters that do not fit, or are damaged or altered: an error that names the file, and the model is as before."""

from __future__ import annotations

import copy
import json
from functools import partial
from math import cos, sin
from pathlib import Path

import pytest
import torch
from models import adapt
from refusals import Net, inject, refused
from roundtrip import turned
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis import batch
from ssvd_kernels.basis.factorize import Factorization, factorize
from ssvd_kernels.utils import safetensors_io


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def adapter(net, tmp_path) -> tuple[Net, Path]:
    """(base model, adapter that was trained on it)"""
    base, path = copy.deepcopy(net), tmp_path / "a.safetensors"
    sk.save_adapter(adapt(net, rank=3), path)
    return base, path


def bases(base: Net) -> list[Net]:
    """The base model, and one that is injected and trained otherwise."""
    return [base, adapt(copy.deepcopy(base), seed=5, rank=3)]


def rewrite(path: Path, change, digest: bool = True) -> None:
    """Changes tensors and header of an adapter; with a right digest, so that only the changed thing can be refused."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        metadata = file.metadata()
    header = json.loads(metadata["ssvd_kernels"])
    stored = header.pop("digest")
    change(header, tensors)
    header["digest"] = safetensors_io.digest(header, tensors) if digest else stored
    save_file(tensors, path, metadata={**metadata, "ssvd_kernels": json.dumps(header)})


def test_save_refuses_what_cannot_be_saved(net, tmp_path):
    inject(net)
    with refused(net, FileNotFoundError, r"`path` must be in an existing folder, got .*nowhere"):
        sk.save_adapter(net, tmp_path / "nowhere" / "a.safetensors")
    path = tmp_path / "a.safetensors"
    sk.save_adapter(net, path)
    before = path.read_bytes()
    with torch.no_grad():
        net.up.theta[1] = float("nan")
    with refused(net, ValueError, r"up\.theta.*NaN or infinity.*nothing was saved"):
        sk.save_adapter(net, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_missing_adapter_file(adapter):
    for model in bases(adapter[0]):
        for path in (adapter[1].with_name("none.safetensors"), adapter[1].parent):
            with refused(model, FileNotFoundError, f"`path` must be an existing adapter file, got .*{path.name}"):
                sk.load_adapter(model, path)


# -- another model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_bases", [False, True])
@pytest.mark.parametrize("kind", ["other weights", "slightly other weights", "other shape", "other names"])
def test_adapter_for_another_base_model(net, adapter, kind, save_bases):
    base, path = adapter
    sk.save_adapter(net, path, save_bases=save_bases)
    match = r"a\.safetensors.*another base model"
    if kind == "other weights":
        base = Net()
    elif kind == "slightly other weights":  # such as the same model after a little more training
        with torch.no_grad():
            base.down.weight.mul_(1 + 0.003 * torch.randn(6, 9))
    elif kind == "other shape":
        base.down = nn.Linear(9, 8)
        match = r"a\.safetensors.*down.*\[6, 9\].*\[8, 9\]"
    else:
        base.below = base._modules.pop("down")
        match = r"a\.safetensors.*('down'.*Net.*another base model|differ.*'(down|below)')"
    for model in bases(base):
        with refused(model, sk.AdapterError, match):
            sk.load_adapter(model, path, progress=False)


OTHERWISE = r"a\.safetensors.*(down|up)"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda base: setattr(base, "down", nn.Conv1d(9, 6, 3)),
            r"`down` must be a convolution of kernel size 1.*\(3,\)",
        ),
        (lambda base: base.to(torch.bfloat16), r"another base model.*up.*save_bases=True"),  # the remedy
        (lambda base: sk.merge(adapt(base, rank=3)), r"merged.*unmerge"),
        (lambda base: adapt(base, rank=3).bfloat16(), r"theta is torch\.float32.*torch\.bfloat16.*lose precision"),
        (partial(inject, rank=2), OTHERWISE),
        (partial(inject, rotation="linear"), OTHERWISE),
        (partial(inject, side="output"), OTHERWISE),
        (partial(inject, side="both"), OTHERWISE),
        (partial(inject, targets=["up"]), OTHERWISE),
    ],
    ids=["another module", "rounded", "merged", "cast", "rank", "rotation", "output side", "both sides", "targets"],
)
def test_adapter_for_a_model_of_another_kind(adapter, change, match):
    base, path = adapter
    change(base)
    with refused(base, sk.AdapterError, match):
        sk.load_adapter(base, path, progress=False)


def test_adapter_of_a_wider_dtype(net, adapter):
    base, path = adapter
    sk.save_adapter(net.double(), path, save_bases=True)
    for model in bases(base):
        with refused(model, sk.AdapterError, r"theta is torch\.float64.*torch\.float32.*lose precision"):
            sk.load_adapter(model, path, progress=False)


@pytest.mark.parametrize("angle", [1e-3, 1e-1, 1.5])
def test_adapter_whose_basis_cannot_be_matched(adapter, monkeypatch, angle):
    """Two neighbouring pairs mixed by 1e-3, as a float32 factorisation would, already changes the update."""

    def mixed(weight: Tensor, k: int, name: str = "weight") -> Factorization:
        turn = torch.eye(k)
        turn[:2, :2] = torch.tensor([[cos(angle), -sin(angle)], [sin(angle), cos(angle)]])
        return turned(factorize(weight, k, name), turn)

    monkeypatch.setattr(batch, "factorize", mixed)
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, r"singular vectors of up cannot be matched.*save_bases=True"):
            sk.load_adapter(model, adapter[1], progress=False)


# -- another file ------------------------------------------------------------------------------------------------------


def test_truncated_adapter(adapter):
    base, path = adapter
    whole = path.read_bytes()
    models = bases(base)
    for size in [*range(0, 64, 7), *range(64, len(whole), 211), len(whole) - 1]:
        path.write_bytes(whole[:size])
        for model in models:
            with refused(model, sk.AdapterError, r"a\.safetensors.*damaged"):
                sk.load_adapter(model, path, progress=False)


def test_tampered_adapter(adapter):
    """No single changed byte is taken for the adapter that was saved."""
    base, path = adapter
    whole = path.read_bytes()
    model = bases(base)[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sk.load_adapter(model, path)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    refusals = 0
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x04]) + whole[position + 1 :])
        try:
            sk.load_adapter(model, path, progress=False)
        except sk.AdapterError as error:
            assert "a.safetensors" in str(error)
            refusals += 1
            expected = before
        else:
            expected = saved
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()), position
        model.load_state_dict(before)
    assert refusals > len(whole) // 3 * 0.95


CHANGED = "changed or damaged"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda h, t: t["up.theta"].mul_(1.5), CHANGED),
        (lambda h, t: t["up.sketch"].neg_(), CHANGED),
        (lambda h, t: h["layers"]["up"].update(rotation="linear"), CHANGED),
        (lambda h, t: t.pop("up.theta"), r"up\.theta must have shape \(3,\), got no such tensor"),
        (lambda h, t: t.update({"up.theta": torch.zeros(4)}), r"up\.theta must have shape \(3,\), got \(4,\)"),
        (lambda h, t: t.update({"up.theta": torch.arange(3)}), r"up\.theta must have a floating.*got torch\.int64"),
        (lambda h, t: t["down.delta_sigma"].fill_(float("nan")), r"down\.delta_sigma.*NaN or infinity"),
        (lambda h, t: t["down.sketch"].fill_(float("inf")), r"down\.sketch.*NaN or infinity"),
        (lambda h, t: t.update({"up.other": t["up.theta"].clone()}), r"'up\.other'.*none of its layers"),
        (lambda h, t: h.update(version=0), "must have format version 1 or 2, got version 0"),
        (lambda h, t: h.update(version=3), "must have format version 1 or 2, got version 3: a newer ssvd_kernels"),
        (lambda h, t: h.update(version="1"), "must have format version 1 or 2, got version '1'"),
        (lambda h, t: h.update(version=None), "must have format version 1 or 2, got version None"),
        (lambda h, t: h.update(b=0.5, a=1), "header has entries that this version .* does not know: a, b"),
        (lambda h, t: h.update(strength=2), r"`strength` must be a number between 0 and 1\.5, got 2"),
        (lambda h, t: h["layers"]["up"].update(form=1), "description of up has entries that .* does not know: form"),
        (lambda h, t: h["layers"]["up"].update(rotation="expm"), "rotation='expm'"),
        (lambda h, t: h["layers"]["up"].update(side="left"), "side='left'"),
        (lambda h, t: h["layers"]["up"].pop("shape"), "shape"),
        (lambda h, t: h["layers"].update(up=3), "up"),
        (lambda h, t: h.update(layers=[]), r"`layers` must be a mapping, got \[\]"),
        (lambda h, t: h["layers"]["up"].update(k="3"), "up|k="),
    ],
    ids=range(22),
)
def test_altered_adapter(adapter, change, match):
    """With a right digest, as another program may write it: an AdapterError, too, and no traceback from within."""
    rewrite(adapter[1], change, digest=match != CHANGED)
    for model in bases(adapter[0]):
        with refused(model, sk.AdapterError, rf"a\.safetensors.*({match})"):
            sk.load_adapter(model, adapter[1], progress=False)


def test_file_that_is_no_adapter(adapter):
    base, path = adapter
    save_file({"up.theta": torch.zeros(3)}, path)
    with refused(base, sk.AdapterError, r"a\.safetensors is not an adapter of ssvd_kernels"):
        sk.load_adapter(base, path)
    path.write_text("weights")
    with refused(base, sk.AdapterError, r"a\.safetensors is damaged or not a safetensors file"):
        sk.load_adapter(base, path)
