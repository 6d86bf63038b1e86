"""The speaker embedding, its loss, the voices and a whole run: a tiny encoder, tones as speakers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from asr_tiny import pitch, rows_of, tone, write_ct2_folder, write_wav
from bounds import assert_within, unit_roundoff
from torch import nn

import ssvd_kernels as sk
from experiments.asr.audio import RATE
from experiments.speaker import run as runner
from experiments.speaker import train as training
from experiments.speaker import voices
from experiments.speaker.model import HEAD_LR, METHODS, TARGETS, AAMSoftmax, Method, SpeakerEncoder, statistics
from experiments.speaker.plan import HELD_OUT, UNSEEN, VALIDATION
from experiments.speaker.train import SPEEDS, Recipe, at_speed, draw

RESULTS = Path(__file__).parents[2] / "experiments/speaker/results"


# -- the model ---------------------------------------------------------------------------------------------------------


def test_statistics_leave_padding_out():
    hidden = torch.randn(2, 7, 32)
    found = statistics(hidden, torch.tensor([7, 4]))
    for row, frames in enumerate((7, 4)):
        assert_within(found[row], *(of_plain_torch(hidden[row, :frames].to(dtype)) for dtype in DTYPES))
    hidden[1, 4:] = 1e6
    assert torch.equal(statistics(hidden, torch.tensor([7, 4])), found)


DTYPES = (torch.float32, torch.float64)


def of_plain_torch(hidden: torch.Tensor) -> torch.Tensor:
    """Mean and deviation of hidden (..., T, d), with the 1e-6 that keeps a deviation's gradient finite."""
    return torch.cat([hidden.mean(-2), (hidden.var(-2, unbiased=False) + 1e-6).sqrt()], dim=-1)


def test_layers_are_weighted_and_statistics_standardised():
    hidden = [torch.randn(9, 6, 4) for _ in range(3)]
    frames = torch.full((9,), 6)
    layers = {True: SimpleNamespace(hidden_states=hidden)}
    model = SpeakerEncoder(lambda features, output_hidden_states: layers[output_hidden_states], 3, 4)
    means = [of_plain_torch(sum(h.to(dtype) for h in hidden) / 3) for dtype in DTYPES]
    assert_within(model.pooled(hidden[0], frames).detach(), *means)
    with torch.no_grad():
        model.layer_weights.copy_(torch.tensor([-100.0, 100.0, -100.0]))
    model.calibrate(model.pooled(hidden[0], frames).detach())
    pooled = model.pooled(hidden[0], frames)
    # the means, at most 2 in size, are rounded before they are taken off and divided by a deviation of at least 0.1
    assert pooled.mean(0).abs().max() <= 2 / 0.1 * 2 * unit_roundoff(torch.float32)
    torch.testing.assert_close(pooled.std(0), torch.ones(8), atol=2e-2, rtol=0)  # deviations get 1e-3 added
    assert torch.equal(model(hidden[0], frames), pooled)  # training starts from the statistics


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_loss_is_the_formula(margin):
    loss_of = AAMSoftmax(torch.randn(4, 7, dtype=torch.float64), margin, 30.0)
    embeddings, labels = torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    cosine = F.normalize(embeddings) @ F.normalize(loss_of.weight).T
    angles = cosine.acos() + margin * F.one_hot(labels, 4)
    # in float64, by way of an arc cosine: torch's 1e-7 is far above its error and far below any other formula's
    torch.testing.assert_close(loss_of(embeddings, labels), F.cross_entropy(30 * angles.cos(), labels))


def test_loss_falls_on_as_the_own_angle_shrinks():
    loss_of, losses = AAMSoftmax(torch.eye(2, 7)), []
    for angle in torch.linspace(torch.pi, 0, 30):  # through the place where angle + margin passes pi
        embedding = torch.zeros(1, 7)
        embedding[0, 0], embedding[0, 2] = angle.cos(), angle.sin()
        embedding.requires_grad_()
        loss = loss_of(embedding, torch.tensor([0]))
        loss.backward()
        assert torch.isfinite(embedding.grad).all()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 100


class Attention(nn.Module):
    """Projections of Whisper tiny's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(384, 384) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_one_budget_and_change_nothing_at_first(name):
    if name == "lora":
        pytest.importorskip("peft")
    model, x = Attention(), torch.randn(2, 384)
    before, exact = model(x), copy.deepcopy(model).double()(x.double()).detach()
    METHODS[name].adapt(model)
    assert_within(model(x).detach(), before.detach(), exact)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budget = 0 if name == "head" else 2 * 2 * (384 + 256) * 16  # two layers, SpectralFT's count
    assert abs(trained - budget) <= 0.02 * budget


# -- the speech --------------------------------------------------------------------------------------------------------


def test_speed_moves_pitch_and_length():
    samples = tone(400, 1.0)
    assert at_speed(samples, 1.0) is samples
    fast = at_speed(samples, 1.1)
    assert len(fast) == pytest.approx(len(samples) / 1.1, abs=2) and pitch(fast) == pytest.approx(440, abs=2)


def test_a_step_draws_different_classes_and_always_the_same():
    spoken = [[np.full(3 * RATE, 10 * voice + take, np.float32) for take in range(2)] for voice in range(4)]
    crops, classes = draw(spoken, Recipe(batch=8), 3, seed=1)
    assert len(set(classes)) == 8 and all(0 <= c < 4 * len(SPEEDS) for c in classes)
    assert all(len(crop) == 2 * RATE and crop[0] // 10 == c % 4 for crop, c in zip(crops, classes, strict=True))
    again, same = draw(spoken, Recipe(batch=8), 3, seed=1)
    assert same == classes and all(np.array_equal(a, b) for a, b in zip(crops, again, strict=True))
    assert draw(spoken, Recipe(batch=8), 4, seed=1)[1] != classes
    assert sorted(draw(spoken, Recipe(batch=24), 0, 0)[1]) == sorted([*range(12)] * 2)


def test_the_band_takes_out_what_tells_channels_apart():
    gap = np.zeros(RATE // 2, np.float32)
    sound = np.concatenate([gap, tone(100, 1.0) + 0.3 * tone(1000, 1.0) + tone(5000, 1.0), gap])
    heard = voices.narrow(sound)
    assert len(heard) == pytest.approx(RATE, abs=RATE // 10)  # the silent ends are gone
    assert np.sqrt((heard**2).mean()) == pytest.approx(voices.LOUDNESS, rel=1e-3)
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))) ** 2
    frequency = np.fft.rfftfreq(len(heard), 1 / RATE)
    assert spectrum[abs(frequency - 1000) < 50].sum() > 0.99 * spectrum.sum()
    assert len(voices.narrow(gap)) == 0


def test_short_recordings_are_joined_and_long_ones_cut(tmp_path):
    lengths = (1.0, 1.0, 1.5, 9.0, 1.0)
    files = [write_wav(tmp_path / f"{i}.wav", tone(500, length)) for i, length in enumerate(lengths)]
    seconds = [len(samples) / RATE for samples in voices.utterances(files)]
    assert seconds == [pytest.approx(3.5, abs=0.1), voices.LONGEST]  # what is left over at the end is too short


def test_tags_in_another_alphabet_do_not_stop_reading(tmp_path):
    path = write_wav(tmp_path / "tagged.wav", tone(500, 0.5))
    tag = b"LIST" + (16).to_bytes(4, "little") + b"INFO" + b"IART" + (4).to_bytes(4, "little") + b"\xcc\xe8\xf8\x00"
    data = bytearray(path.read_bytes()) + tag
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    assert len(voices.read_audio(path)) == RATE // 2


def test_every_voice_has_one_role():
    assert len(voices.ROLES) == len(voices.TABLE) == 21
    assert set(voices.ROLES.values()) == {"train", "validation", "test"}
    for package in set(voices.PACKAGES.values()):  # else the list within a package would leave it out
        assert sum(v.package == package and v.role == "test" for v in voices.TABLE) >= 2


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> list[str]:
    """Of a run on nine speakers, each a tone with its octave; the tiny encoder hears 2 s."""
    (tmp_path / "model").mkdir()
    write_ct2_folder(tmp_path / "model")
    for speaker in range(9):
        for take in range(5):
            path = tmp_path / f"speech/s{speaker}/{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            hertz = 300 + 90 * speaker + 4 * take
            write_wav(path, 0.5 * tone(hertz, 2.2) + 0.5 * tone(2 * hertz, 2.2))
    monkeypatch.setattr(training, "HEARD", 2)
    config = sk.SSVDConfig(rank=4, targets=TARGETS)
    ssvd = Method("SSVD, k = 4", lambda encoder: sk.inject(encoder, config, progress=False), 1e-2)
    monkeypatch.setitem(METHODS, "ssvd", ssvd)
    out = str(tmp_path / "out")
    return ["--folder", str(tmp_path / "speech"), "--model", str(tmp_path / "model"), "--out", out, "--batch", "6"]


def test_a_run_trains_reports_and_resumes(arguments, tmp_path, monkeypatch):
    arguments += ["--steps", "3", "--seeds", "2", "--methods", "untrained", "head", "ssvd", "--device", "cpu"]
    assert runner.main(arguments) == 0
    out = tmp_path / "out"
    rows = rows_of(out / "results.csv")
    expected = {("untrained", "0")} | {(name, seed) for name in ("head", "ssvd") for seed in "01"}
    assert {(row["method"], row["seed"]) for row in rows} == expected
    assert {row["list"] for row in rows} == {UNSEEN, HELD_OUT} and len(rows) == 2 * len(expected)
    assert all(0 <= float(row["eer"]) <= 1 and 0 <= float(row["min_dcf_0.01"]) <= 1 for row in rows)
    parameters = {(row["method"], row["adapter_parameters"], row["head_parameters"]) for row in rows}
    head = str(3 + 32 * 32)
    assert parameters == {("untrained", "0", "0"), ("head", "0", head), ("ssvd", str(4 * 10), head)}
    cells = {path.name: json.loads(path.read_text()) for path in (out / "cells").iterdir()}
    assert sorted(len(cell["losses"]) for cell in cells.values()) == [0, 3, 3, 3, 3]
    assert (out / "det.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.md").read_text().count("| SSVD, k = 4 |") == 2
    assert sorted(p.name for p in (out / "trials").iterdir()) == [
        "held-out-utterances.txt", "unseen-speakers.txt", "validation.txt"
    ]  # fmt: skip

    trained = []
    monkeypatch.setattr(runner, "train", lambda *args: trained.append(args[-1]) or training.train(*args))
    lost = next(path for path in (out / "cells").iterdir() if path.name.startswith("ssvd-1"))
    lost.unlink()
    assert runner.main(arguments) == 0
    assert trained == ["ssvd, seed 1, lr 0.01"]  # all else was kept
    assert json.loads(lost.read_text())["scores"] == cells[lost.name]["scores"]


def test_tuning_measures_validation_alone(arguments, tmp_path):
    assert runner.main([*arguments, "--steps", "2", "--tune", "--methods", "untrained", "ssvd"]) == 0
    rows = rows_of(tmp_path / "out/tune.csv")
    assert [(row["method"], float(row["lr"])) for row in rows] == [("ssvd", lr) for lr in runner.RATES]
    for path in (tmp_path / "out/cells").iterdir():
        assert list(json.loads(path.read_text())["scores"]) == [VALIDATION]


def test_the_adapter_and_the_head_alone_learn(arguments):
    args = runner.parse([*arguments, "--device", "cpu"])
    recognizer = runner.load_recognizer(args.model, args.data, torch.device("cpu"))
    encoder = runner.speaker_encoder(recognizer)
    spoken = [[tone(300 + 200 * voice, 2.0)] for voice in range(3)]
    sounds = {f"{i}": takes[0] for i, takes in enumerate(training.at_speeds(spoken))}
    pooled = torch.stack(list(training.embed(recognizer, sounds, encoder.pooled, "test").values()))
    encoder.calibrate(pooled)
    centroids = encoder.standardised(pooled)
    METHODS["ssvd"].adapt(encoder.encoder)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    recipe = Recipe(steps=40, batch=9, head_lr=1e-2)
    losses, seconds = training.train(recognizer, encoder, spoken, centroids, recipe, 1e-2, 0, "test")
    assert len(losses) == len(seconds) == 40 and np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    trainable = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert changed == trainable and any("theta" in name for name in changed)


def test_bad_commands_are_refused(arguments, tmp_path, capsys):
    for extra, message in (
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--lr", "2"], "--lr must be in (0, 1), got 2.0"),
        (["--methods", "magic"], "invalid choice: 'magic'"),
    ):
        with pytest.raises(SystemExit):
            runner.parse([*arguments, *extra])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.parse(["--trials", "t.txt"])
    assert "--trials needs --folder" in capsys.readouterr().err
    assert runner.main([*arguments, "--trials", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: cannot be read as a trial list" in capsys.readouterr().err


# -- what is committed -------------------------------------------------------------------------------------------------


def test_learning_rates_are_those_that_validation_chose():
    rows = rows_of(RESULTS / "tune.csv")
    assert {row["method"] for row in rows} == set(METHODS)
    for name, method in METHODS.items():
        best = min((row for row in rows if row["method"] == name), key=lambda row: float(row["eer"]))
        assert method.lr == float(best["lr"])
    assert METHODS["head"].lr == HEAD_LR
