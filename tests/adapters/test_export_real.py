"""Exports of the real Whisper tiny.en on real speech: in plain PEFT, transformers, CTranslate2 and faster-whisper."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from asr_tiny import real_data
from bounds import assert_within
from models import references
from test_export_lora import plain_peft

import ssvd_kernels as sk
from experiments.asr import fetch, speech
from experiments.asr.recognizer import load_recognizer
from experiments.asr.whisper_ct2 import load_whisper_ct2
from ssvd_kernels import __main__

pytestmark = [pytest.mark.data, pytest.mark.slow]

PROMPTS = 4


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory) -> SimpleNamespace:
    """A folder of tiny.en, the model adapted so that it hears otherwise, and what it hears in a few prompts."""
    data = real_data(fetch.MODEL, fetch.ASTERISK, fetch.SPHINX)
    folder = tmp_path_factory.mktemp("tiny.en")
    model, tokenizer, extractor = load_whisper_ct2(data / fetch.MODEL)
    for part in (model, tokenizer, extractor):
        part.save_pretrained(folder / "base")
    sk.inject(model, sk.SSVDConfig(ratio=0.1, targets="whisper"), progress=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in sk.ssvd_layers(model).values():
            layer.theta.copy_(0.015 * torch.randn(layer.theta.shape, generator=generator))
            layer.delta_sigma.copy_(0.03 * layer.sigma * torch.randn(layer.k, generator=generator))
    samples = [clip.read() for clip in speech.source_speech(data)["prompts as recorded"][:PROMPTS]]
    features = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
    heard = transcripts(model, tokenizer, features)
    base = load_recognizer(str(folder / "base"), data, torch.device("cpu"))
    assert heard != transcripts(base.model, tokenizer, features)
    sk.export_merged(model, folder / "merged", files_from=folder / "base")
    given = {"tokenizer": tokenizer, "samples": samples, "features": features}
    return SimpleNamespace(folder=folder, model=model, heard=heard, **given)


@torch.inference_mode()
def transcripts(model, tokenizer, features) -> list[str]:
    ids = model.generate(input_features=features, max_new_tokens=40, num_beams=1, do_sample=False)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def test_plain_peft(tiny_en, tmp_path):
    report = sk.to_lora(tiny_en.model, tmp_path / "lora")
    assert len(report.ranks) == 64 and report.error <= 1e-6  # A and B are rounded to float32
    inputs = {"input_features": tiny_en.features[:1], "decoder_input_ids": torch.tensor([[50257, 50362, 314, 716]])}
    with torch.no_grad():
        plain, exact = references(tiny_en.model, lambda network: network(**inputs)[0])
    assert_within(plain_peft(tiny_en.folder / "base", tmp_path / "lora", inputs, tmp_path), plain, exact)


def test_transformers(tiny_en):
    from transformers import AutoTokenizer, WhisperForConditionalGeneration

    merged = WhisperForConditionalGeneration.from_pretrained(tiny_en.folder / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_en.folder / "merged")
    assert transcripts(merged, tokenizer, tiny_en.features) == tiny_en.heard


@pytest.fixture(scope="module")
def converted(tiny_en) -> Path:
    """By the command line, from the base model's folder and the adapter's file."""
    pytest.importorskip("ctranslate2")
    sk.save_adapter(tiny_en.model, tiny_en.folder / "adapter.safetensors")
    names = [str(tiny_en.folder / name) for name in ("base", "adapter.safetensors", "ct2")]
    assert __main__.main(["merge", *names, "--ctranslate2"]) == 0
    return Path(names[-1])


def test_ctranslate2(tiny_en, converted):
    import ctranslate2

    model = ctranslate2.models.Whisper(str(converted), device="cpu", intra_threads=1)
    prompt = tiny_en.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    features = ctranslate2.StorageView.from_array(tiny_en.features.numpy())
    found = model.generate(features, [prompt] * PROMPTS, beam_size=1, max_length=42)
    texts = [tiny_en.tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True).strip() for result in found]
    assert texts == tiny_en.heard


def test_faster_whisper(tiny_en, converted):
    """Its features are its own (it pads spectrograms, not sound): the adapted model hears the same in them."""
    faster_whisper = pytest.importorskip("faster_whisper")
    model = faster_whisper.WhisperModel(str(converted), device="cpu", cpu_threads=1)
    options = {"beam_size": 1, "temperature": 0.0, "without_timestamps": True, "max_new_tokens": 40}
    for samples in tiny_en.samples:
        features = faster_whisper.audio.pad_or_trim(model.feature_extractor(samples)[..., :-1])
        expected = transcripts(tiny_en.model, tiny_en.tokenizer, torch.from_numpy(features).unsqueeze(0))
        segments, _ = model.transcribe(samples, condition_on_previous_text=False, **options)
        assert ["".join(segment.text for segment in segments).strip()] == expected
