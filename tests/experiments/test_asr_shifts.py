"""The experiment's domain shifts: foreign prompts, the split in three, the real speech (marked `data`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from asr_tiny import pitch, real_data, tone, write_wav

from experiments.asr import DemoError, fetch, shifts, speech
from experiments.asr.audio import read_audio
from experiments.asr.prompts import check_utterances, read_foreign_prompts, read_sphinx, write_sonnet
from experiments.asr.speech import words

pytestmark = pytest.mark.usefixtures("one_thread")


def write_prompts(folder: Path, prompts: dict[str, tuple[str, float]], signature: bool = False) -> Path:
    """A prompt package of texts and the seconds that each of them lasts."""
    lines = "".join(f"{key}: {text}\n" for key, (text, _) in prompts.items())
    (folder / "audio").mkdir(parents=True)
    (folder / "prompts.txt").write_text(f"; comment\n{lines}", encoding="utf-8-sig" if signature else "utf-8")
    for key, (_, seconds) in prompts.items():
        (folder / f"audio/{key}.g722").write_bytes(bytes(round(8000 * seconds)))
    return folder


def test_foreign_prompts_are_clear_and_at_a_speakers_pace(tmp_path):
    spoken = {f"k{i}": (f"una persona número {'x' * (i + 1)}", 1.5 + i / 16) for i in range(5)}
    other = {"digit": ("premere 1 per uscire", 1.5), "lost": ("la porta ? aperta", 1.5)}
    other |= {"beep": ("un suono di beep discendente", 0.4), "spelled": ("Radio U S B", 4.0)}
    folder = write_prompts(tmp_path / "it", spoken | other, signature=True)
    assert [(key, text) for key, text, _ in read_foreign_prompts(folder)] == [(k, t) for k, (t, _) in spoken.items()]
    (folder / "audio/k0.g722").unlink()
    assert next(text for _, text, _ in read_foreign_prompts(folder, accents=False)) == "una persona numero xx"


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A data folder with 60 English prompts of 1 to 4 s and the other speakers' sets."""
    prompts = {f"k{i:02}": (f"this is sentence number {i // 2}", 1.0 + i % 4) for i in range(60)}
    write_prompts(tmp_path / fetch.ASTERISK, prompts)
    for name in (f"{fetch.SPHINX}/librivox", f"{fetch.SPHINX}/cards", fetch.SONNET):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "transcription").write_text("<s> some words </s> (a)\n<s> more words </s> (b)\n")
        write_wav(folder / "a.wav", tone(300, 1))
        write_wav(folder / "b.wav", tone(300, 10))
    return tmp_path


def test_a_shift_is_split_in_three_by_text(made_up):
    whole, short = (shifts.load_shift("child", made_up, longest) for longest in (4.0, 3.0))
    sides = [whole.train, whole.validation, whole.test]
    assert sum(map(len, sides)) == 60
    texts = [{words(clip.text) for clip in side} for side in sides]
    assert all(texts) and sum(map(len, texts)) == len(set.union(*texts)) == 30
    assert all(speech.held_out(clip.text) for clip in whole.test)
    assert sum(map(len, [short.train, short.validation, short.test])) == 45
    assert {clip.voice for side in sides for clip in side} == {1.6}
    assert {name: len(clips) for name, clips in whole.source.items() if name != "prompts as recorded"} == {
        "LibriVox reader": 1, "playing cards": 1, "sonnet reader": 1}  # fmt: skip
    recorded = whole.source["prompts as recorded"]
    assert [(c.text, c.path, c.voice) for c in recorded] == [(c.text, c.path, 1.0) for c in whole.test]
    call = shifts.load_shift("telephone", made_up, 4.0)
    assert [c.text for c in call.validation] == [c.text for c in whole.validation]
    assert {(c.voice, c.channel) for c in call.train} == {(1.0, "telephone")}
    assert call.train[0].read().dtype == "float32" and len(list((made_up / shifts.CACHE).iterdir())) == 1


def test_the_demos_sides_are_of_different_texts_in_every_set(made_up):
    corpus = speech.built_in(made_up)
    shift = shifts.load_shift("child", made_up, 9.5)
    assert [c.name for c in corpus.validation] == [c.name for c in shift.validation]
    sides = (corpus.train, [*corpus.validation, *corpus.source_validation], corpus.test)
    texts = [{words(clip.text) for clip in side} for side in sides]
    assert all(texts) and sum(map(len, texts)) == len(set.union(*texts)) == 30
    assert not texts[1] & {words(clip.text) for clip in corpus.source["prompts as recorded"]}
    assert [(c.name, 1.6 * c.voice) for c in corpus.source_validation] == [(c.name, c.voice) for c in corpus.validation]


def test_texts_of_an_evaluation_manifest_are_no_validation():
    clips = [speech.Clip(str(i), f"this is sentence number {i}", Path(str(i))) for i in range(100)]
    train, validation = speech.split_validation(clips, [])
    assert len(train) + len(validation) == 100 and 8 < len(validation) < 25
    test = [speech.Clip("own", validation[0].text.upper(), Path("own"))]
    more, less = speech.split_validation(clips, test)
    assert less == validation[1:] and validation[0] in more


def test_bad_shifts_are_named(made_up):
    with pytest.raises(DemoError, match=r"`shift` must be one of child, .*, italian or a manifest, .*got 'dutch'"):
        shifts.load_shift("dutch", made_up, 4.0)
    with pytest.raises(DemoError, match=r"`shift` must be one of .*got 'dutch'"):
        shifts.parts_of("dutch")
    with pytest.raises(DemoError, match=r"shift child: no train clip lasts at most longest = 0\.5 s"):
        shifts.load_shift("child", made_up, 0.5)


def test_parts_are_parts():
    known = {part.folder for part in fetch.PARTS}
    needed = {name: set(shifts.parts_of(name)) for name in shifts.SHIFTS}
    assert all(parts < known for parts in needed.values())
    assert [len(needed[name]) for name in ("child", "telephone", "french", "spanish", "italian")] == [3, 3, 4, 4, 4]


def test_a_sonnet_is_cut_into_its_lines(tmp_path):
    pieces = np.concatenate([tone(hertz, 1) for hertz in (200, 300, 400)])
    write_wav(tmp_path / "tone.wav", pieces).rename(tmp_path / "audio.mp3")  # the format is told by the contents
    parts = [{"id": f"f{i}", "begin": f"{i}.0", "end": f"{i + 1}.0", "lines": [f"line {i},", "on"]} for i in range(3)]
    (tmp_path / "sonnet.json").write_text(json.dumps({"fragments": parts}))
    out = tmp_path / "out"
    out.mkdir()
    write_sonnet(tmp_path, out)
    found = read_sphinx(out)
    assert [(key, text) for key, text, _ in found] == [("f1", "line 1, on"), ("f2", "line 2, on")]
    assert [pitch(read_audio(path)) for _, _, path in found] == pytest.approx([300, 400], abs=1)
    with pytest.raises(DemoError, match="out has 2 transcripts"):
        check_utterances(out)


@pytest.mark.data
@pytest.mark.parametrize("name", shifts.SHIFTS)
def test_real_shift(name, monkeypatch):
    data = real_data(*shifts.parts_of(name))
    monkeypatch.setattr(speech, "read_audio", None)  # headers tell the durations: no recording is decoded
    shift = shifts.load_shift(name, data, 9.5)
    sides = [shift.train, shift.validation, shift.test]
    texts = [{words(clip.text) for clip in side} for side in sides]
    assert sum(map(len, texts)) == len(set.union(*texts))
    assert [len(side) >= least for side, least in zip(sides, (90, 15, 45), strict=True)] == [True] * 3
    assert shift.language == {"french": "fr", "spanish": "es", "italian": "it"}.get(name, "en")
    letters = set("".join(clip.text for side in sides for clip in side))
    assert bool(letters & set("éèàùò")) == (shift.language in ("fr", "it"))
    assert shift.language == "en" or not any(letter.isdigit() for letter in letters)
