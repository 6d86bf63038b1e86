"""Averages of adapters: of rotations, in a model and of files, and exactly of updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import relative_error
from safetensors.torch import load_file
from several import train_randomly
from torch import nn

import ssvd_kernels as sk
from ssvd_kernels.__main__ import main
from ssvd_kernels.adapters.file_format import read_adapter
from ssvd_kernels.layers.base import own_layers

KINDS = {
    "cayley, input": {"rank": 5},
    "cayley, output": {"rank": 5, "side": "output"},
    "cayley, both": {"rank": 5, "side": "both", "rank_out": 3},
    "linear": {"rank": 5, "rotation": "linear"},
    "SVFT": {"ratio": 1.0, "rotation": "banded", "band": 2},
}
WEIGHTS = [3.0, 1.0, 0.5]


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 15), nn.Tanh(), nn.LayerNorm(15), nn.Linear(15, 12))


def adapted(seed: int, **options) -> nn.Module:
    net = base()
    sk.inject(net, sk.SSVDConfig(**options), progress=False)
    torch.manual_seed(seed)
    train_randomly(net, seed)
    return net


def saved(folder: Path, **options) -> tuple[list[Path], list[nn.Module]]:
    """Three adapters, one of which was saved at another strength."""
    nets = [adapted(seed, **options) for seed in (1, 2, 3)]
    sk.set_strength(nets[1], 0.5)
    paths = [folder / f"{i}.safetensors" for i in range(3)]
    for net, path in zip(nets, paths):
        sk.save_adapter(net, path)
    return paths, nets


def in_one_model(paths: list[Path]) -> tuple[nn.Module, dict[str, float]]:
    net = base()
    sk.load_adapter(net, paths[0], progress=False)
    sk.add_adapter(net, "b", paths[1])
    sk.add_adapter(net, "c", paths[2])
    return net, dict(zip(("default", "b", "c"), WEIGHTS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_updates_is_exact(kind, tmp_path):
    paths, nets = saved(tmp_path, **KINDS[kind])
    net, weights = in_one_model(paths)
    sk.average_adapters(net, weights, tmp_path / "mean.safetensors", of="updates")
    mean = base()
    sk.load_adapter(mean, tmp_path / "mean.safetensors", progress=False)
    for name, layer in own_layers(mean).items():
        updates = [own_layers(each)[name].weight.double() - layer.base_weight.double() for each in nets]
        exact = sum(w * update for w, update in zip(WEIGHTS, updates)) / sum(WEIGHTS)
        assert layer.rotation == "free" and relative_error(layer.weight.double() - layer.base_weight, exact) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_files_average_as_their_model_does(kind, tmp_path):
    paths, _ = saved(tmp_path, **KINDS[kind], modules_to_save=["2"])
    net, weights = in_one_model(paths)
    sk.average_adapters(net, weights, into="mean")
    sk.save_adapter(net, tmp_path / "expected.safetensors", adapter="mean")
    arguments = [*map(str, paths), "--out", str(tmp_path / "mean.safetensors"), "--weights", *map(str, WEIGHTS)]
    assert main(["average", *arguments]) == 0
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("mean", "expected"))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert relative_error(tensor, expected[key].double()) < 1e-6 or torch.equal(tensor, expected[key]), key
    assert read_adapter(tmp_path / "mean.safetensors").strength == 1
    sk.load_adapter(base(), tmp_path / "mean.safetensors", progress=False)


def test_files_whose_singular_vectors_have_other_signs(tmp_path):
    net, other = adapted(1, rank=5), adapted(2, rank=5)
    sk.save_adapter(net, tmp_path / "a.safetensors")
    sk.save_adapter(other, tmp_path / "b.safetensors")
    sk.average_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "expected.safetensors")
    for layer in own_layers(other).values():
        signs = torch.ones(layer.k)
        signs[::2] = -1
        layer.flip_basis(signs)
        values = layer.flipped({key: p.detach().clone() for key, p in layer.adapter().items()}, signs)
        for key, parameter in layer.adapter().items():
            parameter.data.copy_(values[key])
    sk.save_adapter(other, tmp_path / "b.safetensors")
    sk.average_files([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "mean.safetensors")
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in ("mean", "expected"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_by_the_command_of_updates(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from speech_models import MODELS

    make = MODELS["whisper"][0]
    model = make()
    model.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        net = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
        sk.inject(net, sk.SSVDConfig(rank=3), progress=False)
        train_randomly(net, seed)
        sk.save_adapter(net, tmp_path / f"{seed}.safetensors")
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    out = tmp_path / "mean.safetensors"
    assert main(["average", *files, "--out", str(out), "--of", "updates", "--base", str(tmp_path / "base")]) == 0
    assert {layer["rotation"] for layer in read_adapter(out).layers.values()} == {"free"}
    assert main(["average", *files, "--out", str(out), "--of", "updates"]) == 2
    assert "--of updates requires --base" in capsys.readouterr().err
    assert main(["average", files[0], "--out", str(out)]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "0 has k=4, but in .*1.safetensors it has 5"),
        ({"rank": 5, "side": "output"}, "0 has side='output', but in .* it has 'input'"),
        ({"rank": 5, "rotation": "linear"}, "0 has rotation='linear', but in .* it has 'cayley'"),
        ({"rank": 5, "targets": ["3"]}, "adapts other layers than .*, e.g. '0'"),
        ({"rank": 5, "modules_to_save": ["2"]}, "has other modules_to_save than"),
    ],
)
def test_other_adapters_are_refused(options, message, tmp_path):
    sk.save_adapter(adapted(1, rank=5), tmp_path / "1.safetensors")
    sk.save_adapter(adapted(2, **options), tmp_path / "2.safetensors")
    with pytest.raises(sk.AdapterError, match=message):
        sk.average_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


def test_another_base_is_refused(tmp_path):
    sk.save_adapter(adapted(1, rank=5), tmp_path / "1.safetensors")
    net = base(7)
    sk.inject(net, sk.SSVDConfig(rank=5), progress=False)
    sk.save_adapter(net, tmp_path / "2.safetensors")
    with pytest.raises(sk.AdapterError, match="0 has fingerprint="):
        sk.average_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "mean.safetensors")


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_bad_weights_are_refused(weights, tmp_path):
    paths, _ = saved(tmp_path, rank=5)
    with pytest.raises(ValueError, match=r"`weights` must be numbers >= 0|`paths` must be two files at least"):
        sk.average_files(paths[:2], tmp_path / "mean.safetensors", weights)


def test_of_is_checked_and_a_shifted_zero_refused(tmp_path):
    net = adapted(1, rank=5)
    with pytest.raises(ValueError, match="`of` must be one of 'rotations', 'updates', got 'means'"):
        sk.average_adapters(net, {"default": 1}, "mean", of="means")
    layer = net[0]
    layer.delta_sigma.data[2] = -layer.sigma[2]
    with pytest.raises(ValueError, match="0 has a singular value that is 0 once shifted"):
        sk.average_adapters(net, {"default": 1}, tmp_path / "mean.safetensors", of="updates")
    assert not (tmp_path / "mean.safetensors").exists()
