"""The speech experiment: the reader of CTranslate2 models, and the recognizer around a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asr_tiny import logits, tone, write_ct2
from transformers import GenerationConfig, WhisperFeatureExtractor

from experiments.asr import DemoError
from experiments.asr import recognizer as recognizer_module
from experiments.asr.recognizer import IGNORED, Recognizer, Score, load_recognizer
from experiments.asr.speech import Clip
from experiments.asr.whisper_ct2 import is_ct2_whisper, load_whisper_ct2, read_ct2

pytestmark = pytest.mark.usefixtures("one_thread")


def test_reader_rebuilds_the_model(ct2_folder):
    assert is_ct2_whisper(ct2_folder.path)
    model, tokenizer, extractor = load_whisper_ct2(ct2_folder.path)
    assert torch.equal(logits(model), logits(ct2_folder.model))
    assert tokenizer.decode(tokenizer.encode(" two words", add_special_tokens=False)) == " two words"
    assert extractor.feature_size == 8
    assert model.generation_config.suppress_tokens == [1]
    assert model.config.decoder_attention_heads == 4


def test_reader_widens_half_precision(ct2_folder):
    rounded = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in ct2_folder.variables.items()}
    write_ct2(ct2_folder.path / "model.bin", rounded)
    model, *_ = load_whisper_ct2(ct2_folder.path)
    expected = ct2_folder.model.half().float()
    assert torch.equal(logits(model), logits(expected))


KEY_BIAS = np.eye(48, dtype=np.float32)[20]  # rows 16 to 31 are the keys'


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder/adapter/weight", np.zeros((2, 2), np.float32), "adapter/weight.*no counterpart"),
        ("encoder/conv1/bias", None, "no variable encoder/conv1/bias"),
        ("encoder/conv1/weight", np.zeros((16, 8, 3), np.int8), "int8"),
        ("encoder/layer_0/self_attention/linear_0/bias", KEY_BIAS, "key bias"),
    ],
    ids=["extra", "missing", "quantised", "key bias"],
)
def test_reader_refuses_another_model(ct2_folder, name, value, message):
    variables = {n: a for n, a in {**ct2_folder.variables, name: value}.items() if a is not None}
    write_ct2(ct2_folder.path / "model.bin", variables)
    with pytest.raises(DemoError, match=message):
        load_whisper_ct2(ct2_folder.path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_reader_names_the_file_that_is_missing(ct2_folder, name):
    (ct2_folder.path / name).unlink()
    with pytest.raises(DemoError, match=rf"model\.bin: {name} is missing beside it"):
        load_whisper_ct2(ct2_folder.path)


def test_reader_refuses_damaged_files(ct2_folder):
    path = ct2_folder.path / "model.bin"
    whole = path.read_bytes()
    for cut in (2, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DemoError, match="truncated"):
            read_ct2(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(DemoError, match="continues after its end"):
        read_ct2(path)
    write_ct2(path, ct2_folder.variables, version=5)
    with pytest.raises(DemoError, match=r"must have CTranslate2 format 6, got 5"):
        read_ct2(path)
    write_ct2(path, ct2_folder.variables, spec="TransformerSpec")
    assert not is_ct2_whisper(ct2_folder.path)
    with pytest.raises(DemoError, match="TransformerSpec"):
        load_whisper_ct2(ct2_folder.path)


@pytest.fixture
def tiny(ct2_folder: SimpleNamespace) -> Recognizer:
    return load_recognizer(str(ct2_folder.path), ct2_folder.path, torch.device("cpu"))


def test_error_rates_after_the_normaliser(tiny):
    same = tiny.score(["Mister Smith has two dogs, doesn't he?"], ["Mr. Smith has 2 dogs does not he"])
    assert (same.errors, same.words, same.character_errors, same.utterances) == (0, 8, 0, 1)
    score = tiny.score(["press any key", "good bye now"], ["press a key", "good now"])
    assert score.per_utterance == [(1, 3, 2, 13), (1, 3, 4, 12)]
    assert score.wer == 2 / 6 and score.cer == 6 / 25
    assert tiny.score(["to exit the menu..."], ["to exit the menu\u2026"]) == Score([(0, 4, 0, 16)])
    assert tiny.score(["two words"], [""]).wer == 1.0
    with pytest.raises(DemoError, match="no reference text"):
        tiny.score(["..."], ["word"])


def test_words_heard_where_nothing_is_said_are_inserted(tiny):
    score = tiny.score(["some words", "...", "uh"], ["some words", "thank you", ""])
    assert score.per_utterance == [(0, 2, 0, 10), (2, 0, 9, 0), (0, 0, 0, 0)] and score.wer == 1.0


def test_marks_are_letters_in_other_languages(tiny):
    """In Hindi, Tamil and Thai, vowels are combining marks; a decomposed text is the same text."""
    hindi, other = "\u0926\u093f\u0928 \u0915\u0940", "\u0926\u093e\u0928 \u0915\u093e"
    for language, text, heard, errors in (
        ("hi", hindi, other, 2),
        ("hi", hindi, f"{hindi}!", 0),
        ("ta", "\u0bae\u0bbf", "\u0bae\u0bc0", 1),
        ("fr", "\u00e9t\u00e9", "e\u0301te\u0301", 0),
        ("en", "caf\u00e9", "cafe\u0301", 0),
    ):
        tiny.set_language(language)
        score = tiny.score([text], [heard])
        assert score.errors == errors and bool(score.character_errors) == bool(errors), (language, text, heard)


def test_characters_are_the_words_of_languages_without_blanks(tiny):
    tiny.set_language("thai")
    said, heard = (
        "\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27",
        "\u0e01\u0e34\u0e19 \u0e02\u0e32\u0e27",
    )  # six code points and marks, one of them lost
    assert tiny.score([said], [heard]).per_utterance == [(1, 5, 1, 5)]
    tiny.set_language("ja")
    assert tiny.score(["\u4eca\u65e5\u306f"], ["\u4eca\u65e5 \u306f\u3002"]).errors == 0


def test_special_tokens_in_texts_are_refused_with_their_line(tiny):
    clips = [
        Clip("a", text, Path("a.wav"), where=f"m.jsonl:{n}") for n, text in enumerate(("fine", "a <|endoftext|> b"))
    ]
    with pytest.raises(DemoError, match=r"m.jsonl:1: a text must not contain the model's own token <\|endoftext\|>"):
        tiny.check(clips)


def test_an_english_model_hears_another_language(ct2_folder):
    french = load_recognizer(str(ct2_folder.path), ct2_folder.path, torch.device("cpu"), "fr")
    ids = french.tokenizer.get_vocab()
    assert french.prefix == [ids["<|startoftranscript|>"], ids["<|notimestamps|>"]]
    assert french.score(["L\u2019été, c'est fini!"], ["l'été c est FINI"]).errors == 0
    assert french.score(["Press one"], ["press 1"]).errors == 1  # English numbers are left alone


def test_labels_count_text_and_end_only(tiny):
    inputs, labels = tiny.labels(["ab", "a"])
    vocabulary = tiny.tokenizer.get_vocab()
    start, plain, end = (vocabulary[n] for n in ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"))
    space, a, b = (vocabulary[n] for n in ("Ġ", "a", "b"))
    assert inputs.tolist() == [[start, plain, space, a, b], [start, plain, space, a, end]]
    assert labels.tolist() == [[IGNORED, space, a, b, end], [IGNORED, space, a, end, IGNORED]]
    with pytest.raises(DemoError, match="at most 64"):
        tiny.labels(["a" * 80])


def test_window_shortens_and_comes_back(tiny):
    before = logits(tiny.model)
    tiny.set_window(0.9)
    assert tiny.window == 1
    assert tiny.features([tone(300, 0.5)]).shape == (1, 8, 100)
    tiny.set_window(2)
    assert torch.equal(logits(tiny.model), before)
    with pytest.raises(DemoError, match=r"`window` must be greater than 0 and at most 2 s, got 3 s"):
        tiny.set_window(3)


def test_unknown_model_and_language_are_refused(ct2_folder, tmp_path):
    with pytest.raises(DemoError, match="--model must be a folder with a Whisper model, or the name of one"):
        load_recognizer(str(tmp_path / "nothing"), tmp_path, torch.device("cpu"))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DemoError, match=r"--model must be a whisper model, .*of type bert"):
        load_recognizer(str(tmp_path / "bert"), tmp_path, torch.device("cpu"))
    model, tokenizer, _ = load_whisper_ct2(ct2_folder.path)
    with pytest.raises(DemoError, match=r"`language` must be a code or a name .*got 'xx'"):  # also by English models
        Recognizer(model, tokenizer, "tiny", torch.device("cpu"), "xx")
    model.generation_config.is_multilingual = True
    with pytest.raises(DemoError, match=r"`language` must .*no token <\|de\|>, got 'de'"):
        Recognizer(model, tokenizer, "tiny", torch.device("cpu"), "German")


def test_hugging_face_folder_loads_the_same(ct2_folder, tiny, tmp_path):
    folder = tmp_path / "hf"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    other = load_recognizer(str(folder), tmp_path, torch.device("cpu"))
    assert other.fingerprint == tiny.fingerprint
    assert other.prefix == tiny.prefix


@pytest.mark.parametrize("multilingual", [False, True, "by its vocabulary alone"])
def test_training_and_transcribing_share_the_prompt(multilingual, ct2_folder, clips, monkeypatch):
    """Some folders have no generation_config.json, or one from before its language tokens."""
    model, tokenizer, _ = load_whisper_ct2(ct2_folder.path)
    ids = tokenizer.get_vocab()
    if isinstance(multilingual, str):
        monkeypatch.setattr(recognizer_module, "MULTILINGUAL", model.config.vocab_size)
        model.generation_config = GenerationConfig.from_model_config(model.config)
    elif multilingual:
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
