"""Strengths of an adapter measured on speech: what is chosen, what is written, resuming, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from asr_tiny import manifest, tone, write_wav

import ssvd_kernels as sk
from experiments.asr import strength
from experiments.asr.recognizer import Recognizer, Score, load_recognizer
from experiments.asr.strength import Point

pytestmark = pytest.mark.usefixtures("one_thread")


def score(errors: int) -> Score:
    return Score([(errors, 100, 2 * errors, 500)])


POINTS = [
    Point(0.0, score(30), score(4)),
    Point(0.5, score(5), score(10)),
    Point(1.0, score(5), score(28)),
    Point(1.25, score(9), score(40)),
]


def test_which_strengths_are_named():
    assert strength.best(POINTS).strength == 0.5  # the smaller one of two that are equal
    assert [strength.keeping(POINTS, wer) for wer in (0.3, 0.09, 0.03)] == [POINTS[1], POINTS[0], None]
    text = strength.table(POINTS, 0.09)
    assert "| 0.5 | 5.0 | 10.0 |" in text and "Best on the target: strength 0.5." in text
    assert "with a source WER of at most 9 %: strength 0." in text
    assert "no strength" in strength.table(POINTS, 0.03)
    alone = [point._replace(source=None) for point in POINTS]
    assert "source" not in strength.table(alone, None)


def test_what_is_written(tmp_path):
    for points in (POINTS, [point._replace(source=None) for point in POINTS]):
        assert strength.write(points, None, tmp_path) == (tmp_path / "strength.md").read_text()
        kept = json.loads((tmp_path / "strength.json").read_text())
        assert [row["strength"] for row in kept] == [0.0, 0.5, 1.0, 1.25] and kept[1]["target"]["wer"] == 0.05
        assert (tmp_path / "strength.png").read_bytes().startswith(b"\x89PNG")


def tones(folder: Path) -> Path:
    folder.mkdir()
    files = [write_wav(folder / f"{i}.wav", tone(150 + 90 * i, 1.2)) for i in range(3)]
    return manifest(folder, *({"audio": file.name, "text": f"tone number {file.stem}"} for file in files))


@pytest.fixture
def command(ct2_folder, tmp_path) -> list[str]:
    recognizer = load_recognizer(str(ct2_folder.path), ct2_folder.path, torch.device("cpu"))
    sk.inject(recognizer.model, sk.SSVDConfig(rank=4), progress=False)
    for layer in sk.ssvd_layers(recognizer.model).values():
        layer.theta.data.normal_()
    sk.save_adapter(recognizer.model, tmp_path / "a.safetensors")
    target, source = (tones(tmp_path / name) for name in ("target", "source"))
    options = ["--strengths", "0", "1", "--window", "2", "--out", str(tmp_path / "run")]
    arguments = [
        str(ct2_folder.path),
        str(tmp_path / "a.safetensors"),
        "--target",
        str(target),
        "--source",
        str(source),
    ]
    return [*arguments, *options]


def test_a_run_that_goes_on_where_it_was(command, tmp_path, monkeypatch, capsys):
    transcribe, calls = Recognizer.transcribe, []

    def stopping(self, speech, desc, batch=16):
        calls.append((desc, next(layer.strength for layer in sk.ssvd_layers(self.model).values())))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transcribe(self, speech, desc, batch)

    monkeypatch.setattr(Recognizer, "transcribe", stopping)
    assert strength.main(command) == 130
    assert strength.main([*command, "--keep", "100"]) == 0
    assert calls == [("target at 0", 0), ("source at 0", 0), ("target at 1", 1), ("target at 1", 1), ("source at 1", 1)]
    out = capsys.readouterr().out
    assert "Best on the target: strength" in out and str(tmp_path / "run" / "strength.png") in out
    rows = json.loads((tmp_path / "run/strength.json").read_text())
    base = load_recognizer(command[0], Path(command[0]), torch.device("cpu"))
    assert rows[0]["target"]["words"] > 0 and base.fingerprint in (tmp_path / "run/settings.json").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, folder: [*c, "--strengths", "2"], "`strength` must be a number between 0 and 1.5, got 2.0"),
        (lambda c, folder: [*c, "--target", str(folder / "none")], "the manifest cannot be read"),
        (lambda c, folder: [c[0], str(folder / "none"), *c[2:]], "`path` must be an existing adapter file"),
        (lambda c, folder: [c[0], __file__, *c[2:]], "damaged or not a safetensors file"),
    ],
)
def test_bad_input(command, change, message, tmp_path, capsys):
    assert strength.main(change(command, tmp_path)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("side", ["--target", "--source"])
def test_an_empty_manifest(command, side, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert strength.main([*command, side, str(tmp_path / "empty.jsonl")]) == 2
    assert "the manifest is empty" in capsys.readouterr().err


def test_keep_needs_a_source(command):
    with pytest.raises(SystemExit):
        strength.parse([*command[:4], "--keep", "5"])
