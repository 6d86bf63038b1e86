"""SSVDAdapter in SpeechBrain's own AdaptedModel and Checkpointer."""

from __future__ import annotations

import copy
import importlib
import sys
import types
from functools import partial

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import references, train_randomly
from roundtrip import flipped, steps, turned
from torch import Tensor, nn

import ssvd_kernels as sk
from ssvd_kernels.basis.factorize import Factorization, factorize
from ssvd_kernels.integrations.speechbrain import SSVDAdapter
from ssvd_kernels.layers import adapter as adapted_module


def _speechbrain(*names: str) -> list[types.ModuleType]:
    """Modules of SpeechBrain, which imports torchaudio to read audio; PyPI has that built for CUDA only."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            importlib.import_module("torchaudio")
        except (ImportError, OSError):
            patch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
        found = [pytest.importorskip(f"speechbrain.{name}") for name in names]
    for name, module in list(sys.modules.items()):  # its lazy modules break whoever walks through sys.modules
        if type(module).__module__ == "speechbrain.utils.importutils":
            del sys.modules[name]
    return found


adapters, checkpoints = _speechbrain("nnet.adapters", "utils.checkpoints")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down, self.head = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.norm(self.up(x)))))


def adapted(base: nn.Module, **options) -> nn.Module:
    kwargs = {"ratio": 0.6, **options}
    return adapters.AdaptedModel(copy.deepcopy(base), SSVDAdapter, target_layers=["up", "down"], adapter_kwargs=kwargs)


@pytest.fixture
def base() -> Net:
    return Net()


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))


def on_x(model: nn.Module) -> Tensor:
    return model(X).detach()


@pytest.mark.parametrize("form", ["auto", "activation"])
@pytest.mark.parametrize("side", ["input", "output", "smaller", "both"])
def test_adapted_model_starts_as_the_base_and_trains(base, side, form):
    model = adapted(base, side=side, form=form)
    assert torch.equal(model(X), base(X))
    layers = sk.ssvd_layers(model)
    assert list(layers) == ["adapted_model.up", "adapted_model.down"]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for layer in layers.values() for p in layer.adapter().values()
    }
    assert sk.check_training(model, model(X).sum()).ok == list(layers)
    assert all(layer.side in (side, "input", "output") and layer.k == 4 for layer in layers.values())


@pytest.mark.parametrize(
    "options", [{"side": "both"}, {"rotation": "banded", "band": 1}, {"side": "both", "form": "activation"}]
)
def test_saver_keeps_little_and_a_model_with_other_signs_loads_it(base, tmp_path, monkeypatch, options):
    model = train_randomly(adapted(base, **options))
    model.saver(tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    trained = {"theta", "delta_sigma", *(["theta_out"] if "side" in options else [])}
    assert {name.rpartition(".")[2] for name in saved} == trained | {"_extra_state"}
    assert sum(p.numel() for p in saved.values()) < 2 * (6 + 6 + 4 + 6 * 4 + 100)
    monkeypatch.setattr(adapted_module, "factorize", flipped)
    fresh = adapted(base, **options)
    pairs = list(zip(sk.ssvd_layers(fresh).values(), sk.ssvd_layers(model).values(), strict=True))
    assert all(bool(((a.V * b.V).sum(0) < 0).any()) for a, b in pairs)
    fresh.loader(tmp_path / "a.pt", end_of_epoch=True)
    plain, exact = references(model, on_x)
    assert_within(on_x(fresh), plain, exact)
    assert relative_error(model(X).detach(), base(X).detach()) > 1e-2
    fresh.saver(tmp_path / "b.pt")  # and again
    again = adapted(base, **options)
    again.parameter_transfer(tmp_path / "b.pt")
    assert_within(on_x(again), plain, exact)


@pytest.mark.parametrize("form", ["weight", "activation"])
def test_checkpointer_resumes_bit_for_bit_on_other_signs(base, tmp_path, monkeypatch, form):
    def start() -> tuple[nn.Module, torch.optim.Optimizer, object]:
        model = adapted(base, form=form)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        recoverables = {"model": model, "optimizer": optimizer}
        return model, optimizer, checkpoints.Checkpointer(tmp_path, recoverables=recoverables)

    model, optimizer, checkpointer = start()
    steps(model, optimizer, range(4), width=8)
    checkpointer.save_checkpoint()
    expected = steps(model, optimizer, range(4, 8), width=8)
    monkeypatch.setattr(adapted_module, "factorize", flipped)
    model, optimizer, checkpointer = start()
    assert checkpointer.recover_if_possible() is not None
    assert steps(model, optimizer, range(4, 8), width=8) == expected


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"down: saved for base weight \w+, k=4.*but the model has base weight"),
        ({"side": "output"}, r"input, cayley.*but the model has.*output, cayley"),
        ({"rotation": "linear"}, r"cayley.*but the model has.*linear"),
        ({"rotation": "banded", "band": 1}, r"cayley.*but the model has.*banded, band=1"),
        ({"ratio": 0.8}, r"k=4.*but the model has.*k=6"),
    ],
    ids=["another base", "another side", "another rotation", "another band", "another rank"],
)
def test_checkpoint_that_does_not_fit_is_refused(base, tmp_path, options, match):
    train_randomly(adapted(base)).saver(tmp_path / "a.pt")
    if not options:
        base.down.weight.data[0, 0] += 1e-3
    model = adapted(base, **options)
    with pytest.raises(RuntimeError, match=match):
        model.loader(tmp_path / "a.pt", end_of_epoch=True)
    for name in ("up", "down") if options else ("down",):
        assert not any(p.any() for p in model.adapted_model.get_submodule(name).adapter().values())


def in_another_basis(weight: Tensor, k: int, name: str = "weight", gap: float = 1e9) -> Factorization:
    """In place of `factorize`, where the smallest gap between singular values is below `gap`."""
    found = factorize(weight, k, name)
    return turned(found, torch.linalg.qr(torch.randn(k, k)).Q) if found.gap < gap else found


def test_checkpoint_without_its_singular_vectors_is_refused(base, tmp_path, monkeypatch):
    train_randomly(adapted(base)).saver(tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if "_extra_state" not in k}, tmp_path / "bare.pt")
    with pytest.raises(RuntimeError, match=r"up: the state dict does not say which singular vectors"):
        adapted(base).loader(tmp_path / "bare.pt", end_of_epoch=True)
    monkeypatch.setattr(adapted_module, "factorize", in_another_basis)
    with pytest.raises(RuntimeError, match=r"up: its singular vectors cannot be matched"):
        adapted(base).loader(tmp_path / "a.pt", end_of_epoch=True)


@pytest.mark.parametrize(("form", "keys"), [("weight", ("U", "sigma", "V")), ("activation", ("sigma", "Vh"))])
def test_basis_that_cannot_be_recomputed_travels_along(base, tmp_path, monkeypatch, form, keys):
    nn.init.orthogonal_(base.up.weight)
    model = train_randomly(adapted(base, form=form))
    model.saver(tmp_path / "a.pt")
    names = torch.load(tmp_path / "a.pt", weights_only=True)
    stored = [name for name in names if name.endswith((".U", ".V", ".sigma", ".Vh"))]
    assert stored == [f"adapted_model.up.{key}" for key in keys]
    assert not any(model.up.get_parameter(key).requires_grad for key in keys)
    with pytest.raises(RuntimeError, match=r"up: its basis is .*, that of another `form`"):
        other = "weight" if form == "activation" else "activation"
        adapted(base, form=other).loader(tmp_path / "a.pt", end_of_epoch=True)
    monkeypatch.setattr(adapted_module, "factorize", partial(in_another_basis, gap=1e-6))
    for _ in range(2):
        fresh = adapted(base, form=form)
        fresh.loader(tmp_path / "a.pt", end_of_epoch=True)
        assert torch.equal(fresh(X), model(X))
        fresh.saver(tmp_path / "a.pt")  # and again


def test_pretrained_weights_after_insertion_are_refused_and_before_it_are_welcome(base):
    state = {f"adapted_model.{name}": value for name, value in base.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"up\.weight differs from the base weight"):
        adapted(Net()).load_state_dict(state, strict=False)
    kwargs = {"adapter_kwargs": {"rank": 3}, "manual_adapter_insertion": True}
    model = adapters.AdaptedModel(Net(), SSVDAdapter, target_layers=["up", "down"], **kwargs)
    model.load_state_dict(state, strict=True)
    model.insert_adapters()
    assert torch.equal(model(X), base(X))


def test_whole_state_dicts_our_own_files_and_merging(base, tmp_path):
    model = train_randomly(adapted(base))
    fresh = adapted(base)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(X), model(X))
    sk.save_adapter(model, tmp_path / "a.safetensors")
    loaded = adapted(base)
    sk.load_adapter(loaded, tmp_path / "a.safetensors")
    assert torch.equal(loaded(X), model(X))
    with pytest.raises(RuntimeError, match="up is merged: unmerge before loading"):
        sk.merge(fresh)
        fresh.load_state_dict(model.state_dict())
    sk.merge(model, unload=True)
    assert type(model.adapted_model.up) is nn.Linear
    assert_within(on_x(model), *references(loaded, on_x))


def test_convolutions_and_the_other_form(base, tmp_path):
    """Conv1d of SpeechBrain, whose inner one is adapted; a checkpoint serves both forms."""
    cnn = _speechbrain("nnet.CNN")[0]
    plain = nn.Sequential(cnn.Conv1d(12, 1, in_channels=8), cnn.Conv1d(6, 3, in_channels=12))
    x = X.view(2, 8, 8)

    def adapted_convolutions() -> nn.Module:
        return adapters.AdaptedModel(
            copy.deepcopy(plain), SSVDAdapter, target_layers=["0.conv"], adapter_kwargs={"rank": 3}
        )

    model = adapted_convolutions()
    assert torch.equal(model(x), plain(x)) and list(sk.ssvd_layers(model)) == ["adapted_model.0.conv"]
    train_randomly(model).saver(tmp_path / "a.pt")
    for again in (adapted_convolutions(), copy.deepcopy(model)):
        again.loader(tmp_path / "a.pt", end_of_epoch=True)
        assert torch.equal(again(x), model(x))
    with pytest.raises(TypeError, match=r"`linear` is a Conv1d: `form` must be 'activation' or 'auto'"):
        SSVDAdapter(plain[0].conv, rank=3, form="weight")
    with pytest.raises(TypeError, match=r"`linear` must be an nn\.Linear .*got Conv1d"):
        SSVDAdapter(plain[1].conv, rank=3)
    weight = train_randomly(adapted(base))
    weight.saver(tmp_path / "b.pt")
    activation = adapted(base, form="activation")
    activation.loader(tmp_path / "b.pt", end_of_epoch=True)
    assert_within(on_x(activation), *references(weight, on_x))


def test_a_checkpoint_of_one_adapter_is_refused_by_a_model_with_two(base, tmp_path):
    model = adapted(base)
    model.saver(tmp_path / "a.pt")
    sk.add_adapter(model, "b")
    with pytest.raises(RuntimeError, match=r"up has the adapters \['default', 'b'\].*a single adapter"):
        model.loader(tmp_path / "a.pt", end_of_epoch=True)


def test_all_linear_and_the_yaml_files_of_recipes(base):
    hparams = pytest.importorskip("hyperpyyaml").load_hyperpyyaml(
        """
        model: !new:speechbrain.nnet.adapters.AdaptedModel
            model_to_adapt: !new:torch.nn.Sequential
                - !new:torch.nn.Linear [8, 12]
                - !new:torch.nn.Linear [12, 8]
            adapter_class: !name:ssvd_kernels.integrations.speechbrain.SSVDAdapter
            all_linear: True
            adapter_kwargs:
                ratio: 0.4
                rotation: linear
        """
    )
    assert [(layer.k, layer.rotation) for layer in sk.ssvd_layers(hparams["model"]).values()] == [(3, "linear")] * 2
    with pytest.raises(TypeError, match=r"`linear` must be an nn\.Linear .*got LayerNorm"):
        adapters.AdaptedModel(base, SSVDAdapter, target_layers=["norm"], adapter_kwargs={"rank": 2})
    with pytest.raises(ValueError, match="exactly one of `rank` and `ratio`"):
        adapters.AdaptedModel(base, SSVDAdapter, target_layers=["up"])
