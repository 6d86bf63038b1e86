"""Manifests: every form that people have, and what is refused, with file and line, before anything is trained."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from asr_tiny import manifest, pitch, tone, write_wav

from experiments.asr import DemoError, manifests, speech

pytestmark = pytest.mark.usefixtures("one_thread")


def test_manifest_is_read_as_it_is(tmp_path):
    write_wav(tmp_path / "a.wav", tone(300, 1))
    line = {"audio": "a.wav", "text": "three short\u2028words"}
    plain, raised = manifests.read_manifest(manifest(tmp_path, line, {**line, "pitch": 1.6}))
    assert (plain.text, plain.voice, plain.path) == (line["text"], 1.0, tmp_path / "a.wav")
    called = speech.Clip("call", line["text"], tmp_path / "a.wav", channel="telephone")
    data = speech.Speech([plain, raised, called], "test")
    assert pitch(data.samples(0)) == pytest.approx(300, abs=2)
    assert pitch(data.samples(1)) == pytest.approx(480, abs=3)
    manifests.write_manifest(tmp_path / "again.jsonl", data.clips)
    again = speech.Speech(manifests.read_manifest(tmp_path / "again.jsonl"), "test")
    assert again.fingerprint == data.fingerprint
    assert not np.array_equal(data.samples(2), data.samples(0))


GOOD = {"audio": "a.wav", "text": "three short words"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("", "m.jsonl:2: the line is empty"),
        ("{'audio': 1}", "m.jsonl:2: not JSON"),
        ('["a.wav", "words"]', "m.jsonl:2: not a JSON object"),
        ({"audio": "a.wav"}, 'm.jsonl:2: no text under the key "text"'),
        ({"audio": "a.wav", "text": " ... "}, "m.jsonl:2: the text ' ... ' contains no words"),
        ({"audio": "b.wav", "text": "words"}, "m.jsonl:2: there is no audio file .*b.wav"),
        ({**GOOD, "pitch": 9}, "m.jsonl:2: `pitch` must be a factor from 0.5 to 2 .*, got 9"),
        ({**GOOD, "channel": "tin"}, "m.jsonl:2: `channel` must be one of '', 'telephone', got 'tin'"),
    ],
)
def test_bad_manifest_lines_are_named(tmp_path, second, message):
    write_wav(tmp_path / "a.wav", tone(300, 1))
    with pytest.raises(DemoError, match=message):
        manifests.read_manifest(manifest(tmp_path, GOOD, second, GOOD))


def test_bad_manifest_audio_is_named_with_its_line(tmp_path):
    write_wav(tmp_path / "a.wav", tone(300, 31))
    (tmp_path / "b.wav").write_text("no sound")
    for name, message in (("a.wav", "m.jsonl:1: .*31.0 s; at most 30 s"), ("b.wav", "m.jsonl:1: .*cannot be decoded")):
        clips = manifests.read_manifest(manifest(tmp_path, {**GOOD, "audio": name}))
        with pytest.raises(DemoError, match=message):
            speech.Speech(clips, "test")


def test_manifest_without_both_sides_is_refused(tmp_path, capsys):
    write_wav(tmp_path / "a.wav", tone(300, 1))
    path = manifest(tmp_path, GOOD)
    with pytest.raises(DemoError, match="give --eval-manifest"):
        manifests.from_manifest(path, None)
    corpus = manifests.from_manifest(path, path)
    assert len(corpus.train) == len(corpus.test) == 1
    assert "1 of the 1 texts" in capsys.readouterr().err
    for content in ("", None):
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(DemoError, match=r"m.jsonl: the manifest (is empty|cannot be read)"):
            manifests.read_manifest(path)


# -- as people have them -----------------------------------------------------------------------------------------------

CAFE = unicodedata.normalize("NFD", "un caf\u00e9")


def folder_of(path: Path, files: dict[str, str]) -> Path:
    """A folder with a.wav, 0.5 s of 300 Hz and 0.5 s of 600 Hz, and text files."""
    path.mkdir()
    write_wav(path / "a.wav", np.concatenate([tone(300, 0.5), tone(600, 0.5)]))
    for name, content in files.items():
        (path / name).write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nemo.json", '{"audio_filepath": "a.wav", "text": "un cafe\u0301", "offset": 0.5, "duration": 0.5}\r\n'),
        ("m.csv", '\ufeffaudio,duration,offset,text,pitch\r\na.wav,0.5,0.5,"un cafe\u0301",\r\n'),
        ("m.tsv", "client\tpath\tsentence\toffset\n7\ta.wav\tun cafe\u0301\t0.5\n"),
        ("metadata.csv", "file_name,transcription,offset\na.wav,un cafe\u0301,0.5\n"),
        ("metadata.jsonl", '{"file_name": "a.wav", "sentence": "un cafe\u0301", "offset": 0.5, "duration": null}\n'),
    ],
)
def test_forms_of_a_manifest(tmp_path, name, content):
    folder = folder_of(tmp_path / "set", {name: content})
    (clip,) = manifests.read_manifest(folder if name.startswith("metadata") else folder / name)
    assert clip.text == unicodedata.normalize("NFC", CAFE) != CAFE
    data = speech.Speech([clip], "test")
    assert data.seconds == [0.5] == [clip.duration()] and pitch(data.samples(0)) == pytest.approx(600, abs=4)
    manifests.write_manifest(tmp_path / "again.jsonl", data.clips)
    assert speech.Speech(manifests.read_manifest(tmp_path / "again.jsonl"), "test").fingerprint == data.fingerprint


def test_quotation_marks_and_commas_in_texts(tmp_path):
    folder = folder_of(tmp_path / "set", {"m.csv": 'audio,text\na.wav,"so, he ""said"" it"\n',
                                          "m.tsv": 'path\tsentence\na.wav\t"Go\na.wav\tthey said\n'})  # fmt: skip
    assert [clip.text for clip in manifests.read_manifest(folder / "m.csv")] == ['so, he "said" it']
    assert [clip.text for clip in manifests.read_manifest(folder / "m.tsv")] == ['"Go', "they said"]


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_kaldi_folder(tmp_path, monkeypatch, segments, relative):
    """Paths in wav.scp are relative to where Kaldi runs, or else to the folder."""
    wav = "set/a.wav" if relative else "a.wav"
    files = {"wav.scp": f"rec {wav}\n", "text": "two last words\none  first words\n", "segments": "one rec 0 0.5\n"
             "two rec 0.5 1.04\n"} if segments else {"wav.scp": f"rec\t{wav}\n", "text": "rec all words\n"}  # fmt: skip
    folder = folder_of(tmp_path / "set", files)
    monkeypatch.chdir(tmp_path)
    data = speech.Speech(manifests.read_manifest(folder), "test")
    assert data.texts == (["first words", "last words"] if segments else ["all words"])
    assert data.seconds == ([0.5, 0.5] if segments else [1.0])
    if segments:
        assert [pitch(data.samples(i)) for i in (0, 1)] == pytest.approx([300, 600], abs=4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("wav.scp", "rec sox a.mp3 -t wav - |\n", r"wav.scp:1: commands are not run; .*got 'sox a.mp3 -t wav - \|'"),
        ("wav.scp", "rec a.wav\nrec a.wav\n", r"wav.scp:2: 'rec' is also in .*wav.scp:1"),
        ("wav.scp", "other a.wav\n", r"segments:1: .*wav.scp has no line for 'rec'"),
        ("wav.scp", "rec none.wav\n", r"segments:1: there is no audio file .*none.wav"),
        ("text", "two words\n", r"segments:1: .*text has no line for 'one'"),
        ("text", "one words\ntwo more\n", r"text:2: the text has no audio"),
        ("text", "one\n", r"segments:1: the text '' contains no words"),
        ("segments", "one rec 0\n", r"segments:1: must be an utterance, its recording, begin and end"),
        ("segments", "one rec 0.5 0.5\n", r"segments:1: `duration` must be seconds above 0"),
        ("segments", "one rec 0.5 1.5\n", r"segments:1: .*a.wav: lasts 1.00 s, so it has no part from 0.5 s to 1.5 s"),
    ],
)
def test_what_is_wrong_in_a_kaldi_folder(tmp_path, name, content, message):
    files = {"wav.scp": "rec a.wav\n", "text": "one words\n", "segments": "one rec 0 0.5\n", name: content}
    folder = folder_of(tmp_path / "set", files)
    with pytest.raises(DemoError, match=message):
        speech.Speech(manifests.read_manifest(folder), "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio;text\na.wav;words\n", r"m.csv:2: no text under the key \"audio\" .*it has \['audio;text'\]"),
        ("audio,text\na.wav,one, two\n", r"m.csv:2: must have as many fields as the first line, \['audio', 'text'\]"),
        ("audio,text\na.wav\n", r"m.csv:2: must have as many fields"),
        ('audio,text\na.wav,"words\n', r"m.csv:2: not CSV"),
        ("audio,text,offset\na.wav,words,-1\n", r"m.csv:2: `offset` must be seconds from 0 on .*got '-1'"),
        ("audio,text,offset\na.wav,words,1.0\n", r"m.csv:2: .*a.wav: lasts 1.00 s, so it has no part from 1 s"),
        ("audio,text,duration\na.wav,words,1.2\n", r"m.csv:2: .*it has no part from 0 s to 1.2 s"),
        ("audio,text,duration\na.wav,words,long\n", r"m.csv:2: `duration` must be seconds above 0 .*got 'long'"),
        ("audio,text\n", r"m.csv: the manifest is empty"),
    ],
)
def test_what_is_wrong_in_a_csv_file(tmp_path, content, message):
    folder = folder_of(tmp_path / "set", {"m.csv": content})
    with pytest.raises(DemoError, match=message):
        speech.Speech(manifests.read_manifest(folder / "m.csv"), "test")
    with pytest.raises(DemoError, match=r"set: a manifest's folder must have a wav.scp, a metadata.csv or a metadata"):
        manifests.read_manifest(folder)


def test_texts_without_words_only_test(tmp_path):
    folder = folder_of(tmp_path / "set", {"m.csv": "audio,text\na.wav,\n", "train.csv": "audio,text\na.wav,one\n"})
    with pytest.raises(DemoError, match=r"m.csv:2: the text '' contains no words"):
        manifests.from_manifest(folder / "m.csv", None)
    assert [clip.text for clip in manifests.from_manifest(folder / "train.csv", folder / "m.csv").test] == [""]


def test_equal_texts_are_on_one_side_however_they_are_written():
    assert speech.words(CAFE) == speech.words(unicodedata.normalize("NFC", CAFE).upper()) == "un caf\u00e9"
    assert speech.words("\u0926\u093f\u0928") != speech.words("\u0926\u093e\u0928")  # Hindi: vowels are marks
    assert speech.words("It's 3_4, a\u00bd!") == "it s 3_4 a\u00bd"


def test_mixed_sample_rates(tmp_path):
    lines = []
    for rate in (8000, 22050, 48000):
        write_wav(tmp_path / f"{rate}.wav", tone(440, 1, rate), rate)
        lines.append({"audio": f"{rate}.wav", "text": "words"})
    data = speech.Speech(manifests.read_manifest(manifest(tmp_path, *lines)), "test")
    assert [pitch(data.samples(i)) for i in range(3)] == pytest.approx([440] * 3, abs=2)
    assert data.seconds == pytest.approx([1.0] * 3, abs=0.01)
