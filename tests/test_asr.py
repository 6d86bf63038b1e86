"""The speech experiment: model reader, corpus, audio, scoring, training that resumes. `data` tests use real data."""

# ruff: noqa: E402  (a machine without the extra `demo` skips this file before the imports that need it)
from __future__ import annotations

import json
import os
import signal
import struct
import wave
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for _needed in ("transformers", "av", "jiwer", "matplotlib", "tokenizers"):
    pytest.importorskip(_needed, reason="the speech experiment needs the extra `demo`")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import ssvd_kernels as sk
from bench.asr import DemoError, demo, fetch, report, runfolder, speech, train, transcribe
from bench.asr.audio import RATE, AudioError, raise_voice, read_audio
from bench.asr.prompts import check_prompts, parse_prompts, usable
from bench.asr.recognizer import IGNORED, Recognizer, Score, load_recognizer
from bench.asr.whisper_ct2 import DTYPES, is_ct2_whisper, load_whisper_ct2, read_ct2

SPECIALS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    """The models here are so small that threads only wait for each other; in processes that the tests start, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- a tiny Whisper, written as CTranslate2 writes it ------------------------------------------------------------


def tiny_tokenizer() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def tiny_model(tokenizer: Tokenizer) -> WhisperForConditionalGeneration:
    start, end = (tokenizer.token_to_id(name) for name in ("<|startoftranscript|>", "<|endoftext|>"))
    config = WhisperConfig(vocab_size=tokenizer.get_vocab_size(), num_mel_bins=8, d_model=16, encoder_layers=2,
                           decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24,
                           decoder_ffn_dim=20, max_source_positions=100, max_target_positions=64,
                           decoder_start_token_id=start, bos_token_id=end, eos_token_id=end, pad_token_id=end,
                           suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    torch.manual_seed(1)
    return WhisperForConditionalGeneration(config).eval()


def ct2_variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    config, found = model.config, {}

    def put(target: str, *sources: str) -> None:
        weights = [state[f"model.{s}.weight"] for s in sources]
        biases = [state.get(f"model.{s}.bias", np.zeros(len(w), np.float32)) for s, w in zip(sources, weights)]
        found[f"{target}/weight"], found[f"{target}/bias"] = np.concatenate(weights), np.concatenate(biases)

    def norm(target: str, source: str) -> None:
        found[f"{target}/gamma"], found[f"{target}/beta"] = (state[f"model.{source}.{n}"] for n in ("weight", "bias"))

    for side, layers, heads in (("encoder", config.encoder_layers, 2), ("decoder", config.decoder_layers, 4)):
        found[f"{side}/num_heads"] = np.array(heads, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(layers):
            ours, theirs = f"{side}/layer_{i}", f"{side}.layers.{i}"
            put(f"{ours}/self_attention/linear_0", *(f"{theirs}.self_attn.{n}_proj" for n in "qkv"))
            put(f"{ours}/self_attention/linear_1", f"{theirs}.self_attn.out_proj")
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                put(f"{ours}/attention/linear_0", f"{theirs}.encoder_attn.q_proj")
                put(f"{ours}/attention/linear_1", *(f"{theirs}.encoder_attn.{n}_proj" for n in "kv"))
                put(f"{ours}/attention/linear_2", f"{theirs}.encoder_attn.out_proj")
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
            put(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            put(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
    put("encoder/conv1", "encoder.conv1")
    put("encoder/conv2", "encoder.conv2")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    return found


def write_ct2(path: Path, variables: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {dtype: code for code, dtype in DTYPES.items()}
    out = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        head = struct.pack("<B", array.ndim) + struct.pack(f"<{array.ndim}I", *array.shape)
        out += string(name) + head + struct.pack("<BI", codes[array.dtype], array.nbytes) + array.tobytes()
    out += struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")
    path.write_bytes(out)


@pytest.fixture
def ct2_folder(tmp_path: Path) -> SimpleNamespace:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"lang_ids": [tokenizer.token_to_id("<|en|>")], "suppress_ids": [1], "suppress_ids_begin": [2]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    variables = ct2_variables(model)
    write_ct2(tmp_path / "model.bin", variables)
    return SimpleNamespace(path=tmp_path, model=model, variables=variables)


def logits(model: WhisperForConditionalGeneration) -> torch.Tensor:
    mel = torch.randn(2, 8, 200, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_features=mel, decoder_input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]])).logits


def test_reader_rebuilds_the_model(ct2_folder: SimpleNamespace) -> None:
    assert is_ct2_whisper(ct2_folder.path)
    model, tokenizer, extractor = load_whisper_ct2(ct2_folder.path)
    torch.testing.assert_close(logits(model), logits(ct2_folder.model), rtol=0, atol=0)
    assert tokenizer.decode(tokenizer.encode(" two words", add_special_tokens=False)) == " two words"
    assert extractor.feature_size == 8
    assert model.generation_config.suppress_tokens == [1]
    assert model.config.decoder_attention_heads == 4


def test_reader_widens_half_precision(ct2_folder: SimpleNamespace) -> None:
    rounded = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in ct2_folder.variables.items()}
    write_ct2(ct2_folder.path / "model.bin", rounded)
    model, *_ = load_whisper_ct2(ct2_folder.path)
    expected = ct2_folder.model.half().float()
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=0)


def _wrong(variables: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    if how == "extra":
        return {**variables, "encoder/adapter/weight": np.zeros((2, 2), np.float32)}
    if how == "missing":
        return {n: a for n, a in variables.items() if n != "encoder/conv1/bias"}
    if how == "quantised":
        return {**variables, "encoder/conv1/weight": variables["encoder/conv1/weight"].astype(np.int8)}
    bias = variables["encoder/layer_0/self_attention/linear_0/bias"].copy()
    bias[20] = 1.0  # rows 16 to 31 are the keys'
    return {**variables, "encoder/layer_0/self_attention/linear_0/bias": bias}


@pytest.mark.parametrize(
    ("how", "message"),
    [("extra", "adapter/weight.*no place"), ("missing", "no variable encoder/conv1/bias"), ("quantised", "int8"),
     ("key bias", "key bias")],
)  # fmt: skip
def test_reader_refuses_another_model(ct2_folder: SimpleNamespace, how: str, message: str) -> None:
    write_ct2(ct2_folder.path / "model.bin", _wrong(ct2_folder.variables, how))
    with pytest.raises(DemoError, match=message):
        load_whisper_ct2(ct2_folder.path)


def test_reader_refuses_damaged_files(ct2_folder: SimpleNamespace) -> None:
    path = ct2_folder.path / "model.bin"
    whole = path.read_bytes()
    for cut in (2, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DemoError, match="truncated"):
            read_ct2(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DemoError, match="goes on after its end"):
        read_ct2(path)
    write_ct2(path, ct2_folder.variables, version=5)
    with pytest.raises(DemoError, match=r"format 5; only format 6"):
        read_ct2(path)
    write_ct2(path, ct2_folder.variables, spec="TransformerSpec")
    assert not is_ct2_whisper(ct2_folder.path)
    with pytest.raises(DemoError, match="TransformerSpec"):
        load_whisper_ct2(ct2_folder.path)


# -- audio -----------------------------------------------------------------------------------------------------


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def pitch(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * RATE / len(samples))


def test_child_voice_moves_pitch_and_keeps_duration() -> None:
    for seconds in (0.7, 2.0, 9.5):
        raised = raise_voice(tone(300, seconds), 1.6)
        assert len(raised) == round(seconds * RATE)
        assert pitch(raised) == pytest.approx(480, abs=3)
        assert np.abs(raised).max() == pytest.approx(0.5, abs=0.1)


def test_wav_is_resampled_to_16_khz(tmp_path: Path) -> None:
    samples = read_audio(write_wav(tmp_path / "a.wav", tone(440, 1.5, 8000), 8000))
    assert samples.dtype == np.float32
    assert len(samples) == pytest.approx(1.5 * RATE, abs=32)
    assert pitch(samples) == pytest.approx(440, abs=2)


def test_bad_audio_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"none.wav: there is no such audio file"):
        read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("not audio at all")
    with pytest.raises(AudioError, match=r"text.wav: cannot be decoded"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(AudioError, match=r"empty.wav: .*(0 samples|cannot be decoded)"):
        read_audio(write_wav(tmp_path / "empty.wav", tone(440, 0)))


# -- corpus ----------------------------------------------------------------------------------------------------


def test_prompts_are_parsed_and_chosen() -> None:
    lines = [
        "; comment",
        "",
        "a/b:  Press  1: to go on...",
        "beep: [a simple tone]",
        "hi: Hello there.",
        "key: press the #",
    ]
    text = "".join(f"{line}\n" for line in lines)
    prompts = parse_prompts(text)
    assert prompts["a/b"] == "Press 1: to go on"
    assert [key for key, spoken in prompts.items() if usable(spoken)] == ["a/b"]
    with pytest.raises(DemoError, match="no colon"):
        parse_prompts("key without end\n")


def test_changed_prompt_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"k{i}: these are words {i}\n" for i in range(250)))
    with pytest.raises(DemoError, match="250 of them without sound"):
        check_prompts(tmp_path)


def test_split_is_disjoint_stable_and_by_text() -> None:
    texts = [f"This is sentence number {i}." for i in range(400)]
    again = ["... " + text.upper().replace(".", "!") for text in texts]
    clips = [speech.Clip(f"{i}", text, Path(f"{i}")) for i, text in enumerate(texts + again)]
    training, test = speech.split(clips)
    assert len(training) + len(test) == 800
    assert not {speech.words(c.text) for c in training} & {speech.words(c.text) for c in test}
    assert len(test) == pytest.approx(200, abs=50)
    assert [speech.held_out(text) for text in texts[:8]] == EXPECTED_SIDES  # runs of other days keep the same split


EXPECTED_SIDES = [True, False, False, False, False, True, True, False]


def manifest(folder: Path, *lines: object) -> Path:
    path = folder / "m.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(300, 1))
    line = {"audio": "a.wav", "text": "three short\u2028words"}
    plain, raised = speech.read_manifest(manifest(tmp_path, line, {**line, "pitch": 1.6}))
    assert (plain.text, plain.factor, plain.path) == (line["text"], 1.0, tmp_path / "a.wav")
    data = speech.Speech([plain, raised], "test")
    assert pitch(data.samples(0)) == pytest.approx(300, abs=2)
    assert pitch(data.samples(1)) == pytest.approx(480, abs=3)
    speech.write_manifest(tmp_path / "again.jsonl", data.clips)
    again = speech.Speech(speech.read_manifest(tmp_path / "again.jsonl"), "test")
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("", "m.jsonl:2: the line is empty"),
        ("{'audio': 1}", "m.jsonl:2: not JSON"),
        ('["a.wav", "words"]', 'm.jsonl:2: no text under the key "audio"'),
        ({"audio": "a.wav"}, 'm.jsonl:2: no text under the key "text"'),
        ({"audio": "a.wav", "text": " ... "}, "m.jsonl:2: the text ' ... ' holds no word"),
        ({"audio": "b.wav", "text": "words"}, "m.jsonl:2: there is no audio file .*b.wav"),
        ({"audio": "a.wav", "text": "words", "pitch": 9}, "m.jsonl:2: pitch = 9"),
    ],
)
def test_bad_manifest_lines_are_named(tmp_path: Path, second: object, message: str) -> None:
    write_wav(tmp_path / "a.wav", tone(300, 1))
    good = {"audio": "a.wav", "text": "three short words"}
    with pytest.raises(DemoError, match=message):
        speech.read_manifest(manifest(tmp_path, good, second, good))


def test_bad_manifest_audio_is_named_with_its_line(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", tone(300, 31))
    (tmp_path / "b.wav").write_text("no sound")
    for name, message in (("a.wav", "m.jsonl:1: .*31.0 s; at most 30 s"), ("b.wav", "m.jsonl:1: .*cannot be decoded")):
        clips = speech.read_manifest(manifest(tmp_path, {"audio": name, "text": "three short words"}))
        with pytest.raises(DemoError, match=message):
            speech.Speech(clips, "test")


def test_manifest_without_both_sides_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "a.wav", tone(300, 1))
    path = manifest(tmp_path, {"audio": "a.wav", "text": "three short words"})
    with pytest.raises(DemoError, match="give --eval-manifest"):
        speech.from_manifest(path, None)
    corpus = speech.from_manifest(path, path)
    assert len(corpus.train) == len(corpus.test) == 1
    assert "1 of the 1 texts" in capsys.readouterr().err
    for content in ("", None):
        path.write_text(content) if content is not None else path.unlink()
        with pytest.raises(DemoError, match=r"m.jsonl: the manifest (is empty|cannot be read)"):
            speech.read_manifest(path)


def test_audio_beyond_the_cache_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "CACHE_BYTES", 4 * RATE)
    clips = [speech.Clip(str(i), f"text {i}", write_wav(tmp_path / f"{i}.wav", tone(200 + i, 1))) for i in range(3)]
    data = speech.Speech(clips, "test")
    (tmp_path / "0.wav").unlink()
    assert pitch(data.samples(0)) == pytest.approx(200, abs=1)
    assert pitch(data.samples(2)) == pytest.approx(202, abs=1)
    assert len(speech.Speech(clips[1:], "test", drop_above=0.5)) == 0


# -- obtaining data ----------------------------------------------------------------------------------------------


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


def test_data_are_obtained_once_and_repaired(fake_part: SimpleNamespace) -> None:
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


def test_changed_package_warns_or_fails(fake_part: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_unobtainable_data_stop_with_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get, no dpkg-deb
    with pytest.raises(DemoError) as raised:
        fetch.ensure(tmp_path / "data", (fetch.ASTERISK,))
    text = str(raised.value)
    assert "apt-get is not on this machine" in text
    assert "asterisk-core-sounds-en-g722_1.6.1-1_all.deb" in text and str(tmp_path / "data/downloads") in text
    assert list((tmp_path / "data").iterdir()) == []


# -- recognizer --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(ct2_folder: SimpleNamespace) -> Recognizer:
    return load_recognizer(str(ct2_folder.path), ct2_folder.path, torch.device("cpu"))


def test_word_error_rate_after_the_normaliser(tiny: Recognizer) -> None:
    assert tiny.score(["Mister Smith has two dogs, doesn't he?"], ["Mr. Smith has 2 dogs does not he"]) == Score(
        0, 8, 1
    )
    score = tiny.score(["press one now", "good bye now"], ["press 1 1 now", "good now"])
    assert (score.errors, score.utterances) == (2, 2)
    assert score.wer == pytest.approx(2 / score.words)
    assert tiny.score(["to exit the menu..."], ["to exit the menu\u2026"]) == Score(0, 4, 1)
    with pytest.raises(DemoError, match="no reference text"):
        tiny.score(["..."], ["word"])


def test_labels_count_text_and_end_only(tiny: Recognizer) -> None:
    inputs, labels = tiny.labels(["ab", "a"])
    vocabulary = tiny.tokenizer.get_vocab()
    start, plain, end = (vocabulary[n] for n in ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"))
    space, a, b = (vocabulary[n] for n in ("Ġ", "a", "b"))
    assert inputs.tolist() == [[start, plain, space, a, b], [start, plain, space, a, end]]
    assert labels.tolist() == [[IGNORED, space, a, b, end], [IGNORED, space, a, end, IGNORED]]
    with pytest.raises(DemoError, match="at most 64"):
        tiny.labels(["a" * 80])


def test_window_shortens_and_comes_back(tiny: Recognizer) -> None:
    before = logits(tiny.model)
    tiny.set_window(0.9)
    assert tiny.window == 1
    assert tiny.features([tone(300, 0.5)]).shape == (1, 8, 100)
    tiny.set_window(2)
    assert torch.equal(logits(tiny.model), before)
    with pytest.raises(DemoError, match=r"window = 3 s: more than 0 and at most 2 s"):
        tiny.set_window(3)


def test_unknown_model_and_language_are_refused(ct2_folder: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="neither a folder with a Whisper model"):
        load_recognizer(str(tmp_path / "nothing"), tmp_path, torch.device("cpu"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DemoError, match="of type bert; only whisper"):
        load_recognizer(str(tmp_path / "bert"), tmp_path, torch.device("cpu"))
    model, tokenizer, _ = load_whisper_ct2(ct2_folder.path)
    model.generation_config.is_multilingual = True
    with pytest.raises(DemoError, match=r"language = 'xx': .*no token <\|xx\|>"):
        Recognizer(model, tokenizer, "tiny", torch.device("cpu"), "xx")


def test_hugging_face_folder_loads_the_same(ct2_folder: SimpleNamespace, tiny: Recognizer, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    other = load_recognizer(str(folder), tmp_path, torch.device("cpu"))
    assert other.fingerprint == tiny.fingerprint
    assert other.prefix == tiny.prefix


@pytest.mark.parametrize("multilingual", [False, True])
def test_training_and_transcribing_share_the_prompt(
    multilingual: bool, ct2_folder: SimpleNamespace, clips: speech.Speech, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, _ = load_whisper_ct2(ct2_folder.path)
    ids = tokenizer.get_vocab()
    if multilingual:
        model.generation_config.is_multilingual = True
        model.generation_config.lang_to_id = {"<|en|>": ids["<|en|>"]}
        model.generation_config.task_to_id = {"transcribe": ids["<|transcribe|>"]}
    recognizer = Recognizer(model, tokenizer, "tiny", torch.device("cpu"))
    names = ["<|startoftranscript|>", *(["<|en|>", "<|transcribe|>"] if multilingual else []), "<|notimestamps|>"]
    assert recognizer.prefix == [ids[name] for name in names]
    prompts: list[list[int]] = []
    decoder = type(model.model.decoder).forward

    def watched(self: torch.nn.Module, *args: object, **options: object) -> object:
        prompts.append(options["input_ids"][0].tolist())  # type: ignore[index]
        return decoder(self, *args, **options)

    monkeypatch.setattr(type(model.model.decoder), "forward", watched)
    assert len(recognizer.transcribe(clips, "test", batch=2)) == len(clips)
    assert prompts[0] == recognizer.prefix


# -- training ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> speech.Speech:
    made = [
        speech.Clip(str(i), f"text {i}", write_wav(tmp_path / f"{i}.wav", tone(150 + 90 * i, 1.2))) for i in range(5)
    ]
    return speech.Speech(made, "test")


def test_batches_cover_every_epoch() -> None:
    seen = [i for step in range(6) for i in train.batch_indices(4, 2, step, seed=7)]
    assert [sorted(seen[e : e + 4]) for e in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert len({tuple(seen[e : e + 4]) for e in (0, 4, 8)}) > 1
    assert len(train.batch_indices(3, 8, 0, seed=0)) == 8


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [train.Recipe(steps=100, lr=1.0).lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[99] == pytest.approx(1 / 90) and all(r > 0 for r in rates)
    assert train.Recipe(steps=1, lr=1.0).lr_at(0) == 1.0


def fit(
    folder: Path, ct2: Path, clips: speech.Speech, **changes: object
) -> tuple[train.History, dict[str, torch.Tensor]]:
    recognizer = load_recognizer(str(ct2), ct2, torch.device("cpu"))
    sk.inject(recognizer.model, sk.SSVDConfig(rank=4), progress=False)
    recipe = train.Recipe(steps=6, batch=2, lr=1e-2, checkpoint_every=2)
    run = runfolder.RunFolder(folder, {"recipe": vars(recipe), **changes})
    history = train.train(recognizer, clips, recipe, run)
    return history, {n: p.detach().clone() for n, p in recognizer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", ["signal", "crash"])
def test_resumed_training_equals_uninterrupted(
    how: str, ct2_folder: SimpleNamespace, clips: speech.Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, weights = fit(tmp_path / "whole", ct2_folder.path, clips)
    assert len(whole.losses) == 6 and whole.losses[-1] < whole.losses[0]
    loss, calls = train._loss, []

    def interrupted(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # the step after a checkpoint: a signal saves it, a crash loses it
            if how == "crash":
                raise MemoryError("as if the process had been killed")
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "_loss", interrupted)
    with pytest.raises((train.Interrupted, MemoryError)):
        fit(tmp_path / "parts", ct2_folder.path, clips)
    resumed, again = fit(tmp_path / "parts", ct2_folder.path, clips)
    assert len(calls) == (6 if how == "signal" else 8)
    assert resumed.losses == whole.losses
    assert again.keys() == weights.keys() and all(torch.equal(again[n], weights[n]) for n in weights)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_divergence_is_reported(
    ct2_folder: SimpleNamespace, clips: speech.Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = train._loss
    monkeypatch.setattr(train, "_loss", lambda *args: loss(*args) * float("nan"))
    with pytest.raises(DemoError, match=r"step 1: the loss is nan"):
        fit(tmp_path / "run", ct2_folder.path, clips)


def test_run_folder_refuses_other_settings_and_damage(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DemoError, match="holds no checkpoint"):
        runfolder.RunFolder(folder, {"rank": 4}, resume=True)
    run = runfolder.RunFolder(folder, {"rank": 4})
    run.save_checkpoint({"step": 1})
    assert runfolder.RunFolder(folder, {"rank": 4}, resume=True).load_checkpoint() == {"step": 1}
    with pytest.raises(DemoError, match="rank: 4 there, 8 now"):
        runfolder.RunFolder(folder, {"rank": 8})
    (folder / runfolder.CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(DemoError, match="--fresh starts again"):
        run.load_checkpoint()
    assert runfolder.RunFolder(folder, {"rank": 8}, fresh=True).load_checkpoint() is None


def test_evaluations_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    run, calls = runfolder.RunFolder(tmp_path, {}), []

    def compute() -> list[str]:
        calls.append(1)
        return [f"heard {len(calls)}"]

    assert run.transcripts("before", {"weights": "a"}, compute) == ["heard 1"]
    assert run.transcripts("before", {"weights": "a"}, compute) == ["heard 1"]
    assert run.transcripts("before", {"weights": "b"}, compute) == ["heard 2"]


def test_report_shows_all_numbers_and_failed_checks(tmp_path: Path) -> None:
    rows = [report.Row("target", Score(30, 100, 9), Score(8, 100, 9), Score(8, 100, 9)),
            report.Row("source", Score(1, 20, 3), Score(2, 20, 3))]  # fmt: skip
    facts = {"Trained parameters": "12 of 600", "Time per step": "1 s", "Adapter file": "50 bytes"}
    result = report.Report("title", rows, facts, {"Merged the same": False}, [3.0, 2.0, 1.5], {"total": 600})
    assert not result.passed
    text = report.write(result, tmp_path)
    for shown in ("30.0 %", "8.0 %", "5.0 %", "10.0 %", "12 of 600", "Merged the same: NO"):
        assert shown in text
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["rows"][0]["before"]["wer"] == 0.3 and kept["rows"][1]["merged"] is None
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.md").read_text() == text


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(ct2_folder: SimpleNamespace, tmp_path: Path) -> list[str]:
    """The demo's arguments for the tiny model and a manifest of tones."""
    lines = []
    for i in range(8):
        write_wav(tmp_path / f"{i}.wav", tone(150 + 60 * i, 1.2))
        lines.append({"audio": f"{i}.wav", "text": f"tone number {i}"})
    speech_given = ["--model", str(ct2_folder.path), "--manifest", str(manifest(tmp_path, *lines)), "--no-source"]
    recipe = ["--rank", "4", "--steps", "3", "--batch", "2", "--eval-window", "2", "--device", "cpu"]
    return [*speech_given, *recipe, "--out", str(tmp_path / "run")]


def test_demo_on_a_users_speech(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(command) == 0
    kept = json.loads((tmp_path / "run/report.json").read_text())
    assert kept["checks"] == {name: True for name in kept["checks"]} and len(kept["checks"]) == 2
    assert len(kept["losses"]) == 3
    assert kept["adapter_bytes"] == (tmp_path / "run/adapter.safetensors").stat().st_size
    assert kept["transcripts"]["reloaded"] == kept["transcripts"]["after"]
    assert kept["trainable"] == 22 * 10  # k(k+1)/2 = 10 a layer; two encoder layers of 6, one decoder layer of 10
    assert (tmp_path / "run/report.png").is_file() and "WER merged" in capsys.readouterr().out

    def untouched(*args: object) -> None:
        raise AssertionError("a finished run trains or transcribes again")

    monkeypatch.setattr(train, "_loss", untouched)
    monkeypatch.setattr(Recognizer, "transcribe", untouched)
    monkeypatch.setattr(demo, "transcripts_of_new_process", lambda *args: ["something else"])
    assert demo.main(command) == 1
    assert "Adapter reloaded in a new process transcribes the same: NO" in capsys.readouterr().out


def test_demo_stops_and_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = train._loss

    def interrupted(*args: object) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)  # type: ignore[arg-type]

    assert demo.main([*command, "--resume"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    monkeypatch.setattr(train, "_loss", interrupted)
    assert demo.main(command) == 130
    assert "stopped after step 1 of 3" in capsys.readouterr().err
    monkeypatch.setattr(train, "_loss", loss)
    assert demo.main([*command, "--resume"]) == 0
    assert demo.main([*command, "--steps", "4"]) == 2
    assert "steps: 3 there, 4 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "17"], "rank=17 does not fit"),
        (["--side", "left"], "side='left' is unknown"),
        (["--device", "gpu7"], "--device gpu7: cannot be used here"),
        (["--manifest", "none.jsonl"], "none.jsonl: the manifest cannot be read"),
        (["--window", "0.5"], "shorter than the longest clip"),
        (["--eval-window", "31"], "window = 31.0 s: more than 0 and at most 2 s"),
    ],
)
def test_demo_names_bad_arguments(
    command: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_transcribe_prints_what_it_hears(
    ct2_folder: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = write_wav(tmp_path / "a.wav", tone(300, 1))
    base = ["transcribe", "--model", str(ct2_folder.path), "--window", "2"]
    monkeypatch.setattr("sys.argv", [*base, str(audio)])
    assert transcribe.main() == 0
    assert capsys.readouterr().out.startswith(f"{audio}\t")
    monkeypatch.setattr("sys.argv", [*base, str(audio), "--adapter", str(tmp_path / "none.safetensors")])
    assert transcribe.main() == 2
    assert "none.safetensors" in capsys.readouterr().err


# -- the real thing ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data() -> Path:
    folder = fetch.default_data()
    broken = [f"{name}: {why}" for name in (fetch.MODEL, fetch.ASTERISK, fetch.SPHINX)
              if (why := fetch.damage(folder / name))]  # fmt: skip
    if broken:
        pytest.skip(f"no real data in {folder} ({'; '.join(broken)}); python -m bench.asr.fetch obtains them")
    return folder


@pytest.mark.data
def test_real_corpus(data: Path) -> None:
    corpus = speech.built_in(data)
    assert len(corpus.train) + len(corpus.test) >= 250
    assert not {speech.words(c.text) for c in corpus.train} & {speech.words(c.text) for c in corpus.test}
    assert {name: len(clips) for name, clips in corpus.source.items() if name != "prompts as recorded"} == {
        "LibriVox reader": 5, "playing cards": 5}  # fmt: skip
    assert all(clip.factor == 1.6 for clip in corpus.train + corpus.test)


@pytest.mark.data
def test_real_model_hears_real_speech(data: Path) -> None:
    recognizer = load_recognizer(None, data, torch.device("cpu"))
    assert sum(p.numel() for p in recognizer.model.parameters()) == 37_760_256
    recognizer.set_window(10)
    plain = [c for c in speech.source_speech(data)["prompts as recorded"] if c.name.startswith("agent-")][:2]
    raised = [speech.Clip(c.name, c.text, c.path, 1.6) for c in plain]
    heard = recognizer.transcribe(speech.Speech([*plain, *raised], "test"), "test")
    assert heard[0] == "That agent is already logged on. Please enter your agent number followed by the pound key."
    assert recognizer.score([c.text for c in plain], heard[:2]).wer < 0.15
    assert heard[2:] != heard[:2]
