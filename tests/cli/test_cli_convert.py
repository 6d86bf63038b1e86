"""`python -m ssvd_kernels convert`: ESPnet's checkpoints there and back, and mistakes."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from test_cli import call

espnet = pytest.importorskip("espnet_checkpoints")


@pytest.fixture(params=["linear", "cayley"])
def files(tmp_path, request):
    """(folder with model.pth and base.pth, the rotation map)."""
    state, base, _ = espnet.checkpoint(request.param)
    torch.save(state, tmp_path / "model.pth")
    torch.save(base, tmp_path / "base.pth")
    return tmp_path, request.param


def test_there_and_back(capsys, files):
    folder, rotation_map = files
    arguments = ["from-espnet", folder / "model.pth", folder / "a.safetensors", "--rotation-map", rotation_map]
    status, out, _ = call(capsys, "convert", *arguments, "--base", folder / "base.pth")
    assert status == 0 and f"3 layers, k = 5 to 16, rotation_map {rotation_map}" in out
    assert out.splitlines()[-1] == f"wrote {folder / 'a.safetensors'}"
    state, base, adapted = espnet.checkpoint(rotation_map)
    for options in ([], ["--unmerged"]):
        name = f"back{len(options)}.pth"
        arguments = ["to-espnet", folder / "a.safetensors", folder / "base.pth", folder / name, *options]
        assert call(capsys, "convert", *arguments)[0] == 0
        found = torch.load(folder / name)
        for layer, both in adapted.items():
            weight, K_vec = found[f"{layer}.weight"], found[f"{layer}.K_vec"]
            if options:
                assert torch.equal(weight, base[f"{layer}.weight"])
            else:
                assert_within(weight, *both)
            assert torch.equal(K_vec, state[f"{layer}.K_vec"])


def test_the_base_weights_can_be_written(capsys, files):
    folder, rotation_map = files
    arguments = ["from-espnet", folder / "model.pth", folder / "a.safetensors", "--rotation-map", rotation_map]
    status, out, _ = call(capsys, "convert", *arguments, "--base-out", folder / "rebuilt.pth")
    assert status == 0 and f"wrote {folder / 'a.safetensors'} and {folder / 'rebuilt.pth'}" in out
    found, base, state = (torch.load(folder / name) for name in ("rebuilt.pth", "base.pth", "model.pth"))
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        layer, _, key = name.rpartition(".")
        if key == "weight" and f"{layer}.u" in state:
            own = {part: state[f"{layer}.{part}"] for part in ("u", "s_pre", "v", "weight")}
            assert_within(found[name], espnet.rebuilt(own), tensor, name)
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["from-espnet", "nowhere.pth", "a.safetensors"], 2, "`checkpoint` must be an existing file, got "),
        (["from-espnet", "base.pth", "a.safetensors"], 1, "must contain layers of ESPnet's SSVD adapter"),
        (["from-espnet", "model.pth", "base.pth"], 2, "base.pth already exists"),
        (["from-espnet", "model.pth", "no/a.safetensors"], 2, "`path` must be in an existing folder, got "),
        (["to-espnet", "nowhere", "base.pth", "out.pth"], 2, "`path` must be an existing adapter file, got "),
        (["to-espnet", "model.pth", "base.pth", "out.pth"], 1, "is damaged or not a safetensors file"),
        (["to-espnet", "model.pth"], 2, "the following arguments are required"),
        ([], 2, "the following arguments are required: DIRECTION"),
    ],
)
def test_mistakes(capsys, files, monkeypatch, arguments, status, message):
    folder, rotation_map = files
    monkeypatch.chdir(folder)
    options = ["--rotation-map", rotation_map] if arguments[:1] == ["from-espnet"] else []
    before = sorted(folder.rglob("*"))
    found, out, err = call(capsys, "convert", *arguments, *options)
    assert (found, out) == (status, "") and message in err.splitlines()[-1]
    assert sorted(folder.rglob("*")) == before


def test_the_wrong_map_is_refused(capsys, files):
    folder, rotation_map = files
    wrong = {"linear": "cayley", "cayley": "linear"}[rotation_map]
    arguments = ["from-espnet", folder / "model.pth", folder / "a.safetensors", "--rotation-map", wrong]
    status, _, err = call(capsys, "convert", *arguments)
    assert status == 1 and f"'{rotation_map}'" in err.splitlines()[-1]
    assert not (folder / "a.safetensors").exists()
