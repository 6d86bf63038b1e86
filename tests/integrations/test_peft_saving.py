"""PEFT: adapters on disk, and transformers' own methods for adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounds import assert_within
from cases import relative_error
from models import RANK, references, train_randomly
from peft_models import adapted, base_model, config, in_new_process, layers, peft, transformers
from peft_models import run as run_with_gradients
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssvd_kernels import AdapterError


def load_with_peft(base: nn.Module, folder: Path, **options) -> nn.Module:
    return peft.PeftModel.from_pretrained(base, str(folder), **options)


def load_sparingly(base: nn.Module, folder: Path) -> nn.Module:
    return load_with_peft(base, folder, low_cpu_mem_usage=True)


def load_with_transformers(base: nn.Module, folder: Path) -> nn.Module:
    # not base.load_adapter: wav2vec2's own of that name is for its language adapters
    transformers.integrations.PeftAdapterMixin.load_adapter(base, str(folder))
    return base


run = torch.no_grad()(run_with_gradients)
LOADERS = [load_with_peft, load_sparingly, load_with_transformers]


def saved(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(str(folder))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# -- what is saved, and that it comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("whisper", {"ratio": 0.5}),
        ("whisper", {"rank": 1}),
        ("whisper", {"side": "both", "rank_out": 3, "rotation": "linear"}),
        ("whisper", {"rotation": "free"}),
        ("whisper", {"ratio": 1.0, "rotation": "banded", "band": 2}),
        *((name, {}) for name in ("wav2vec2", "hubert", "wavlm", "llama")),
    ],
)
def test_an_adapter_comes_back(tmp_path, name, options, load):
    model = adapted(name, **options)
    loaded = load(base_model(name), saved(tmp_path, model))
    assert torch.equal(run(loaded), run(model))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_file_holds_what_was_trained_and_what_identifies_the_basis(tmp_path):
    tensors = load_file(saved(tmp_path, adapted()) / "adapter_model.safetensors")
    prefix = "base_model.model.model.encoder.layers.0.fc1.ssvd_adapter."
    shapes = {key.removeprefix(prefix): tuple(t.shape) for key, t in tensors.items() if key.startswith(prefix)}
    assert shapes == {"theta": (10,), "delta_sigma": (5,), "_extra_state": (1 + 16 + 6 * RANK,)}
    assert len(tensors) == 32 * 3 and all(".ssvd_adapter." in key for key in tensors)


def test_several_adapters_are_saved_and_loaded_by_name(tmp_path):
    model = adapted()
    model.add_adapter("child", config(rank=3, side="output"))
    model.set_adapter("child")
    train_randomly(model, 2)
    saved(tmp_path, model.eval())
    loaded = load_with_peft(base_model(), tmp_path / "child", adapter_name="other")
    loaded.load_adapter(str(tmp_path), "first")
    for name, theirs in (("child", "other"), ("default", "first")):
        model.set_adapter(name)
        loaded.set_adapter(theirs)
        assert torch.equal(run(loaded), run(model))


def test_loaded_adapter_trains_on(tmp_path):
    saved(tmp_path, adapted())
    model = load_with_peft(base_model(), tmp_path, is_trainable=True)
    run_with_gradients(model).square().mean().backward()
    assert all(layer.ssvd_adapter["default"].theta.grad is not None for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == 32 * 15


def test_half_precision_base_does_not_round_the_adapter(tmp_path):
    model = train_randomly(peft.get_peft_model(base_model().bfloat16(), config())).eval()
    saved(tmp_path, model)
    for load in LOADERS:
        assert torch.equal(run(load(base_model().bfloat16(), tmp_path)), run(model))


def test_modules_to_save(tmp_path):
    base, model = base_model("wav2vec2-ctc"), adapted("wav2vec2-ctc", modules_to_save=["lm_head"])
    assert model.get_nb_trainable_parameters()[0] == 18 * 15 + sum(p.numel() for p in base.lm_head.parameters())
    saved(tmp_path, model)
    for load in LOADERS:
        assert torch.equal(run(load(base_model("wav2vec2-ctc"), tmp_path)), run(model))


def test_copies_and_pickles_compute_the_same(tmp_path):
    model = adapted(side="both")
    expected = run(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(run(other), expected)
        train_randomly(other, 3)
        assert not torch.equal(run(other), expected) and torch.equal(run(model), expected)


# -- another process, another factorisation ----------------------------------------------------------------------------

CHECK = """
import torch
from bounds import assert_within
from peft_models import peft, run, transformers
torch.set_num_threads(2)
Whisper, folder = transformers.WhisperForConditionalGeneration, {folder!r}
expected = torch.load(folder + "/expected.pt")
for load in (
    lambda: peft.PeftModel.from_pretrained(Whisper.from_pretrained(folder + "/base"), folder),
    lambda: peft.AutoPeftModel.from_pretrained(folder),
    lambda: Whisper.from_pretrained(folder),
):
    assert_within(run(load().eval()).detach(), *expected)
"""


@pytest.mark.slow
def test_reload_in_a_new_process_with_more_threads(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = train_randomly(peft.get_peft_model(base, config(side="both"))).eval()
    saved(tmp_path, model)
    torch.save(references(model, run), tmp_path / "expected.pt")
    in_new_process(CHECK.format(folder=str(tmp_path)))


@pytest.mark.parametrize("load", LOADERS)
def test_signs_of_another_factorisation_are_repaired(tmp_path, load):
    model = adapted(side="both", rank_out=3)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    for layer in layers(model).values():
        layer.ssvd_adapter["default"].flip_basis(signs)
    loaded = load(base_model(), saved(tmp_path, model))
    assert torch.equal(run(loaded), run(model))
    assert not torch.equal(run(loaded), run(adapted(side="both", rank_out=3)))
    again = load(base_model(), saved(tmp_path / "again", loaded))
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("load", LOADERS)
def test_factorising_another_way_gives_the_same_model(tmp_path, load, monkeypatch):
    model = adapted()
    saved(tmp_path, model)
    svd = torch.linalg.svd

    def transposed(W: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(-W.mT.contiguous(), full_matrices=full_matrices)
        return -Vh.mT, S, U.mT

    output = references(model, run)
    monkeypatch.setattr(torch.linalg, "svd", transposed)
    assert_within(run(load(base_model(), tmp_path)), *output)


def equal_singular_values(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if name.endswith("fc1"):
            nn.init.orthogonal_(module.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("load", LOADERS)
def test_bases_that_cannot_be_recomputed_are_stored(tmp_path, load, monkeypatch):
    model = train_randomly(peft.get_peft_model(equal_singular_values(base_model()), config())).eval()
    tensors = load_file(saved(tmp_path, model) / "adapter_model.safetensors")
    long = {key for key, t in tensors.items() if t.shape == (1 + 16 + 6 * RANK + (24 + 1 + 16) * RANK,)}
    assert len(long) == 4 and all(".fc1." in key for key in long)
    svd = torch.linalg.svd

    def rotated(W: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(W, full_matrices=full_matrices)
        return (U, S, Vh) if float(S[0] - S[-1]) > 1e-6 else (U.flip(1), S, Vh.flip(0))  # as good a basis, then

    monkeypatch.setattr(torch.linalg, "svd", rotated)
    loaded = load(equal_singular_values(base_model()), tmp_path)
    assert torch.equal(run(loaded), run(model))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
def test_another_base_model_is_refused(tmp_path, load):
    saved(tmp_path, adapted())
    base = base_model()
    with torch.no_grad():
        base.model.decoder.layers[1].fc2.weight[0, 0] += 1e-3
    with pytest.raises(AdapterError, match=r"another base model: the weight of model\.decoder\.layers\.1\.fc2 differs"):
        load(base, tmp_path)
    with pytest.raises(AdapterError, match=r"load the adapter before casting"):
        load(base_model().bfloat16(), tmp_path)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda identity: identity[:-1], r"basis for .* must have rank 5, got shape \(46,\)"),
        (lambda identity: identity + 1, "must have format version 1, got version 2"),
        (lambda it: torch.cat([it[:17], it[17:].flip(0)]), "singular vectors of .* cannot be matched"),
    ],
)
def test_a_damaged_identity_is_refused(tmp_path, change, match, load):
    saved(tmp_path, adapted())
    edit(tmp_path, lambda tensors: tensors.update({k: change(v) for k, v in tensors.items() if "_extra_state" in k}))
    with pytest.raises((AdapterError, RuntimeError), match=match):
        load(base_model(), tmp_path)


def test_an_adapter_without_identity_is_refused(tmp_path):
    saved(tmp_path, adapted())
    edit(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "_extra_state" in key])
    for load in (load_with_peft, load_sparingly):
        with pytest.raises(AdapterError, match=r"does not record the basis of .* it was trained with"):
            load(base_model(), tmp_path)


def test_loading_into_a_merged_adapter_is_refused(tmp_path):
    model = adapted()
    saved(tmp_path, model)
    model.merge_adapter()
    with refused(model, RuntimeError, "is merged: unmerge before loading"):
        model.load_adapter(str(tmp_path), "default")


def test_adapters_through_transformers_alone(tmp_path):
    base, model = base_model(), base_model()
    model.add_adapter(config(), "first")
    assert torch.equal(run(model), run(base))
    train_randomly(model, 1)
    first = run(model.eval())
    model.add_adapter(config(rank=3, side="both", rotation="linear"), "second")
    train_randomly(model, 2)
    second = run(model)
    assert model.active_adapters() == ["second"] and not torch.equal(first, second)
    model.set_adapter("first")
    assert torch.equal(run(model), first)
    model.disable_adapters()
    assert torch.equal(run(model), run(base))
    model.enable_adapters()
    model.set_adapter(["first", "second"])
    both = run(model)
    assert relative_error(both, first) > 1e-3 and relative_error(both, second) > 1e-3
    model.set_adapter("first")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SSVD"
    for load in LOADERS:
        assert torch.equal(run(load(base_model(), tmp_path)), first)
    model.load_adapter(str(tmp_path), adapter_name="third")
    model.delete_adapter(["first", "second"])
    model.set_adapter("third")
    assert torch.equal(run(model), first) and list(model.peft_config) == ["third"]
    model.delete_adapter("third")
    assert torch.equal(run(model), run(base)) and not hasattr(model, "peft_config")
