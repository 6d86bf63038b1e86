"""save_pretrained and Trainer on an injected transformers model: the training is not lost, and no file claims more."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import adapt, train_randomly

import ssvd_kernels as sk

transformers = pytest.importorskip("transformers")
import speech_models  # noqa: E402

FILE = "ssvd_adapter.safetensors"


@pytest.fixture
def base():
    return speech_models.MODELS["wav2vec2-ctc"][0]().eval()


@pytest.fixture
def model(base):
    return adapt(copy.deepcopy(base), targets="wav2vec2", modules_to_save=["lm_head"]).eval()


@torch.no_grad()
def assert_comes_back(model, folder) -> None:
    """By what the warning says."""
    fresh = type(model).from_pretrained(folder).eval()
    assert not torch.equal(speech_models.run(fresh), speech_models.run(model.eval()))
    sk.load_adapter(fresh, folder / FILE, progress=False)
    assert torch.equal(speech_models.run(fresh), speech_models.run(model))


def test_the_adapter_lies_beside_the_base(model, tmp_path, caplog):
    model.save_pretrained(tmp_path / "new" / "folder")
    call = f"load_adapter(model, '{tmp_path / 'new' / 'folder' / FILE}')"
    assert "will load the base model alone; then call ssvd_kernels." + call in caplog.text
    assert_comes_back(model, tmp_path / "new" / "folder")
    model.wav2vec2.save_pretrained(tmp_path / "part")
    assert_comes_back(model.wav2vec2, tmp_path / "part")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    model.save_pretrained(tmp_path / "other", False)
    assert not (tmp_path / "other" / FILE).exists()


def test_a_merged_model_is_refused_and_the_remedies_work(model, tmp_path):
    sk.merge(model)
    with pytest.raises(ValueError, match=r"call export_merged\(model, folder\), or merge\(model, unload=True\) first"):
        model.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    sk.export_merged(model, tmp_path / "exported")
    sk.merge(model, unload=True)
    model.save_pretrained(tmp_path / "unloaded")
    for folder in ("exported", "unloaded"):
        assert not (tmp_path / folder / FILE).exists()
        fresh = type(model).from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            assert torch.equal(speech_models.run(fresh), speech_models.run(model))


def test_an_upload_without_the_adapter_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"push_to_hub=True would upload the base model alone: call model\.push_to"):
        model.save_pretrained(tmp_path / "folder", push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_inject_notices_an_adapter_where_the_base_was_loaded_from(model, tmp_path, caplog):
    model.save_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path)
    caplog.clear()
    sk.load_adapter(copy.deepcopy(fresh), tmp_path / FILE, progress=False)
    assert not caplog.text
    sk.inject(fresh, sk.SSVDConfig(rank=3), progress=False)
    assert f"{tmp_path / FILE} is not loaded by inject" in caplog.text


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(tmp_path, duplicate):
    model = speech_models.adapted("whisper")
    twin = duplicate(model)
    train_randomly(twin, 5)
    twin.save_pretrained(tmp_path)
    assert_comes_back(twin, tmp_path)


def test_removing_leaves_the_model_as_it_was(model, tmp_path, caplog):
    sk.remove(model)
    model.save_pretrained(tmp_path)
    assert not caplog.text and not (tmp_path / FILE).exists()
    assert all("save_pretrained" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
def test_trainer_saves_resumes_and_comes_back(base, tmp_path, caplog):
    pytest.importorskip("accelerate")

    def trainer(steps: int):
        model = copy.deepcopy(base)
        sk.inject(model, sk.SSVDConfig(rank=3, targets="wav2vec2", modules_to_save=["lm_head"]), progress=False)
        options = transformers.TrainingArguments(
            tmp_path, max_steps=steps, save_steps=1, learning_rate=0.05, report_to=[], use_cpu=True,
            per_device_train_batch_size=1, disable_tqdm=True, seed=1,
        )  # fmt: skip
        inputs = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
        data = [{"input_values": x, "labels": torch.tensor([3, 4])} for x in inputs]
        return transformers.Trainer(model, options, train_dataset=data)

    whole = trainer(2)
    whole.train()
    assert_comes_back(whole.model, tmp_path / "checkpoint-2")
    whole.save_model(tmp_path / "final")
    assert caplog.text.count("will load the base model alone") == 3
    assert_comes_back(whole.model, tmp_path / "final")
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with torch.no_grad():
        assert torch.equal(speech_models.run(resumed.model.eval()), speech_models.run(whole.model.eval()))
