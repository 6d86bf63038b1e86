"""export_merged: what transformers and CTranslate2 make of the folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bounds import assert_within
from models import adapt, inject, references
from refusals import Net, refused
from safetensors import safe_open

import ssvd_kernels as sk

transformers = pytest.importorskip("transformers")
import speech_models  # noqa: E402


def adapted(name: str = "whisper", **options):
    return speech_models.adapted(name, **options).eval()


def reloaded(model, folder, **options):
    """The model as transformers loads it, with nothing missing, left over or of another shape."""
    fresh, found = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    assert not any(isinstance(module, sk.SSVDLinear) for module in fresh.modules())
    return fresh.eval()


@pytest.mark.parametrize("name", sorted(speech_models.MODELS))
def test_reloads_strictly_with_the_merged_outputs(tmp_path, name):
    model = adapted(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sk.export_merged(model, tmp_path / "merged")
    assert [(k, torch.equal(v, state[k])) for k, v in model.state_dict().items()] == [(k, True) for k in state]
    with torch.no_grad():
        plain, exact = references(model, speech_models.run)
        assert_within(speech_models.run(model), plain, exact, "unmerged")
        sk.merge(model)
        fresh = reloaded(model, tmp_path / "merged")
        for layer_name, layer in sk.ssvd_layers(model).items():
            assert torch.equal(fresh.get_submodule(layer_name).weight, layer.weight)
        assert_within(speech_models.run(model), plain, exact, "merged")
        assert_within(speech_models.run(fresh), plain, exact, "reloaded")


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    model = adapted()
    sk.export_merged(model, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert "model.decoder.embed_tokens.weight" in keys and "proj_out.weight" not in keys
    assert not {key for key in keys if key.endswith(("theta", "delta_sigma", ".U", ".V", "sigma"))}
    fresh = reloaded(model, tmp_path / "merged")
    assert fresh.proj_out.weight.data_ptr() == fresh.model.decoder.embed_tokens.weight.data_ptr()


def assert_holds(model, folder, expected) -> None:
    fresh = reloaded(model, folder)
    assert all(torch.equal(fresh.get_submodule(name).weight, weight) for name, weight in expected.items())


def test_a_merged_model_gives_the_same_folder_and_stays_merged(tmp_path):
    model = adapted()
    sk.export_merged(model, tmp_path / "a")
    sk.merge(model)
    sk.export_merged(model, tmp_path / "b")
    assert all(layer.merged for layer in sk.ssvd_layers(model).values())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bfloat16_stays_bfloat16_and_warns_of_lost_updates(tmp_path, caplog):
    model = speech_models.whisper().bfloat16().eval()
    inject(model, targets="whisper")
    for layer in sk.ssvd_layers(model).values():
        layer.theta.data.fill_(1e-4)
    sk.export_merged(model, tmp_path / "merged")
    assert "of the update" in caplog.text
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    weights = {name: layer.compose() for name, layer in sk.ssvd_layers(model).items()}
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert_holds(model, tmp_path / "merged", weights)


def test_a_merged_model_is_written_as_it_was_merged(tmp_path):
    model = adapt(speech_models.whisper().bfloat16().eval(), targets="whisper")
    sk.merge(model, rounding="stochastic")
    layers = sk.ssvd_layers(model)
    assert not all(torch.equal(layer.weight, layer.compose()) for layer in layers.values())
    sk.export_merged(model, tmp_path / "merged")
    assert_holds(model, tmp_path / "merged", {name: layer.weight for name, layer in layers.items()})


def test_several_adapters(tmp_path):
    model = adapted()
    expected = {name: layer.weight for name, layer in sk.ssvd_layers(model).items()}
    sk.add_adapter(model, "b")
    sk.export_merged(model, tmp_path / "a")
    assert_holds(model, tmp_path / "a", expected)
    with sk.disable_adapter(model), refused(model, ValueError, "adapter is disabled"):
        sk.export_merged(model, tmp_path / "b")


def test_companions_of_the_base_folder_come_along(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.json", "merges.txt", "model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin"):  # fmt: skip
        (base / name).write_text("of the base")
    (base / "folder.json").mkdir()
    sk.export_merged(adapted(), tmp_path / "merged", files_from=base)
    found = {path.name: path.read_bytes() == b"of the base" for path in (tmp_path / "merged").iterdir()}
    assert found == {"config.json": False, "generation_config.json": False, "model.safetensors": False,
                     "tokenizer.json": True, "merges.txt": True}  # fmt: skip


def test_refusals_leave_nothing(tmp_path):
    model = adapted()
    with refused(model, FileNotFoundError, "`files_from` must be an existing folder, got "):
        sk.export_merged(model, tmp_path / "merged", files_from=tmp_path / "nowhere")
    with torch.no_grad():
        next(iter(sk.ssvd_layers(model).values())).theta[0] = float("inf")
    with refused(model, ValueError, "NaN or infinity"):
        sk.export_merged(model, tmp_path / "merged")
    plain, other = speech_models.whisper(), Net()
    with refused(plain, ValueError, "has no SSVD layer"):
        sk.export_merged(plain, tmp_path / "merged")
    inject(other, rank=3)
    with refused(other, TypeError, r"`model` must be a transformers model .*got Net"):
        sk.export_merged(other, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    (tmp_path / "merged").write_text("a file")
    with refused(model, FileExistsError, r"`folder` must be new or empty, got .*which already exists"):
        sk.export_merged(adapted(), tmp_path / "merged")


def test_ctranslate2_converts_the_folder(tmp_path):
    """The real converter, on a tiny model: its encoder as CTranslate2 computes it."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    asr_tiny = pytest.importorskip("asr_tiny")
    tokenizer = asr_tiny.tiny_tokenizer()
    model = adapt(asr_tiny.tiny_model(tokenizer), targets="whisper")
    sk.export_merged(model, tmp_path / "merged")
    asr_tiny.fast_tokenizer(tokenizer).save_pretrained(tmp_path / "merged")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "merged")).convert(str(tmp_path / "ct2"))
    converted = ctranslate2.models.Whisper(str(tmp_path / "ct2"), device="cpu")
    mel = torch.randn(2, 8, 200)
    encoded = converted.encode(ctranslate2.StorageView.from_array(mel.numpy()))
    with torch.no_grad():
        plain, exact = references(model, lambda network: network.model.encoder(mel)[0])
    assert_within(torch.from_numpy(np.array(encoded)), plain, exact)
