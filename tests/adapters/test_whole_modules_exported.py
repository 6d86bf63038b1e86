"""Modules that train whole beside the adapted layers, a new CTC head above all: exported, and on the command line."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from bounds import assert_within
from models import adapt, references
from safetensors.torch import load_file, save_file

import ssvd_kernels as sk
from ssvd_kernels import __main__

transformers = pytest.importorskip("transformers")
import speech_models  # noqa: E402

NAMES = ["lm_head", "encoder.layer_norm", "feed_forward"]  # the last is a module with layers below it


def adapted(base):
    targets = list(speech_models.ATTENTION)
    return adapt(copy.deepcopy(base), targets=targets, modules_to_save=NAMES).eval()


@pytest.fixture
def base():
    return speech_models.MODELS["wav2vec2-ctc"][0]().eval()


@torch.no_grad()
def test_a_plain_folder_has_them(base, tmp_path):
    model = adapted(base)
    sk.export_merged(model, tmp_path / "merged")
    fresh, found = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(fresh.lm_head.weight, base.lm_head.weight)
    assert_within(speech_models.run(fresh.eval()), *references(model, speech_models.run))


@torch.no_grad()
def test_plain_peft_has_them(base, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(base)
    with sk.disable_adapter(model):
        sk.to_lora(model, tmp_path / "lora", progress=False)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert "lm_head" in config["modules_to_save"] and "wav2vec2.encoder.layer_norm" in config["modules_to_save"]
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora").eval()
    assert_within(speech_models.run(loaded), *references(model, speech_models.run))
    head = loaded.base_model.model.lm_head
    assert torch.equal(head.modules_to_save["default"].weight, model.lm_head.weight)


def test_command_line_takes_a_base_that_lacks_the_new_head(base, tmp_path, capsys):
    """And refuses one that lacks anything else."""
    model, adapter, folder = adapted(base), tmp_path / "a.safetensors", tmp_path / "base"
    sk.save_adapter(model, adapter)
    base.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for key in ("lm_head.weight", "lm_head.bias"):
        weights.pop(key)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert __main__.main(["merge", str(folder), str(adapter), str(tmp_path / "merged")]) == 0
    fresh = type(base).from_pretrained(tmp_path / "merged")
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert __main__.main(["inspect", str(adapter), "--base", str(folder)]) == 0
    size = sum(p.numel() for p in base.lm_head.parameters())
    out = capsys.readouterr().out
    assert "format 2" in out and f"lm_head ({size} parameters)" in out
    assert __main__.main(["inspect", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["modules_to_save"]["lm_head"] == size
    weights.pop("wav2vec2.feature_projection.projection.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert __main__.main(["inspect", str(adapter), "--base", str(folder)]) == 1
    assert "has no weights for 1 parameters" in capsys.readouterr().err
