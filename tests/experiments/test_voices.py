"""The example that trains many adapters at once: on a tiny model, and which real speech it takes."""

from __future__ import annotations

import itertools
import re
from unittest.mock import Mock

import pytest
import torch
from asr_tiny import real_data, tone, write_wav

import ssvd_kernels as sk
from examples import voices
from experiments.asr import fetch
from experiments.asr.recognizer import load_recognizer
from experiments.asr.speech import Clip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def main(ct2_folder, tmp_path, monkeypatch):
    """The example with the tiny model, on tones, for given factors."""
    clips = [
        Clip(str(i), f"tone number {i}", write_wav(tmp_path / f"{i}.wav", tone(150 + 20 * i, 0.8))) for i in range(16)
    ]
    monkeypatch.setattr(voices, "ensure", Mock())
    monkeypatch.setattr(voices, "english_prompts", lambda data: clips)
    monkeypatch.setattr(voices, "load_recognizer", lambda _, *where: load_recognizer(str(ct2_folder.path), *where))

    def run(out, *factors):
        monkeypatch.setattr(voices, "FACTORS", factors)
        monkeypatch.setattr(voices, "NAMES", [f"x{100 * factor:.0f}" for factor in factors])
        assert voices.main(["--smoke", "--data", str(tmp_path), "--out", str(out)]) == 0

    return run


def thetas(recognizer, out) -> dict[str, torch.Tensor]:
    """Of each file, loaded on the base model."""
    found = {}
    for file in sorted(out.glob("*/*.safetensors")):
        sk.load_adapter(recognizer.model, file)
        found[file.stem] = torch.cat([layer.theta.detach() for layer in sk.ssvd_layers(recognizer.model).values()])
    return found


def test_each_voice_trains_an_adapter_of_its_own(main, ct2_folder, tmp_path, monkeypatch):
    main(tmp_path / "out", 0.7, 1.4, 1.6)
    recognizer = load_recognizer(str(ct2_folder.path), tmp_path, torch.device("cpu"))
    found = thetas(recognizer, tmp_path / "out")
    assert list(found) == ["x140", "x160", "x70"]
    assert all((a - b).norm() > 0.1 * a.norm() for a, b in itertools.permutations(found.values(), 2))
    main(tmp_path / "other", 0.7, 1.4, 1.9)
    other = thetas(recognizer, tmp_path / "other")
    for name in ("x70", "x140"):  # the third voice is another one, which is nothing to them
        torch.testing.assert_close(other[name], found[name], atol=1e-6, rtol=0)
    text = (tmp_path / "out/table.md").read_text()
    assert len(re.findall(r"\| voice x [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", text)) == 3
    assert (tmp_path / "out/voices.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(voices, "cross_entropy", Mock(side_effect=AssertionError("it trains again")))
    monkeypatch.setattr(voices.Recognizer, "transcribe", Mock(side_effect=AssertionError("it measures again")))
    main(tmp_path / "out", 0.7, 1.4, 1.6)
    assert (tmp_path / "out/table.md").read_text() == text


def test_the_tables_means(monkeypatch):
    monkeypatch.setattr(voices, "FACTORS", (0.7, 1.4, 1.6))
    rates = [[1.0, 20.0, 30.0], [40.0, 5.0, 60.0], [70.0, 80.0, 9.0], [50.0, 51.0, 52.0]]
    lines = voices.table(rates).splitlines()
    assert lines[2:5] == [
        "| voice x 0.7 | 50.0 | 1.0 | 55.0 |",
        "| voice x 1.4 | 51.0 | 5.0 | 50.0 |",
        "| voice x 1.6 | 52.0 | 9.0 | 45.0 |",
    ]
    assert lines[5] == "| mean | 51.0 | 5.0 | 50.0 |"


@pytest.mark.data
def test_every_step_has_a_clip_of_each_voice_and_no_text_that_is_measured():
    trained, held_out = voices.gather(real_data(fetch.MODEL, fetch.ASTERISK), 2, 1)
    assert [clip.voice for clip in trained.clips] == 2 * list(voices.FACTORS)
    assert {clip.text for clip in trained.clips}.isdisjoint(held_out.texts)
    assert [clip.voice for clip in held_out.clips] == list(voices.FACTORS)
