"""A Whisper model with what belongs to it: features, label batches, greedy transcription, error rates."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

import jiwer
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE

from experiments.asr import DemoError, progress
from experiments.asr.audio import RATE, Samples
from experiments.asr.fetch import MODEL
from experiments.asr.speech import Clip, Speech
from experiments.asr.whisper_ct2 import MULTILINGUAL, is_ct2_whisper, load_whisper_ct2

POSITIONS_PER_SECOND = 50
SILENCE = 1.0  # seconds
ELLIPSIS = re.compile(r"\.{2,}|\u2026")  # the normaliser would make a word of it
IGNORED = -100  # label that cross-entropy skips
UNSPACED = {"zh", "yue", "ja", "th", "lo", "my", "km", "bo"}  # written without blanks between words


@dataclass
class Score:
    """Counts of each utterance, (word errors, words, character errors, characters), and the rates of all together."""

    per_utterance: list[tuple[int, int, int, int]]

    def __post_init__(self) -> None:
        sums = [sum(column) for column in zip(*self.per_utterance, strict=True)]
        self.errors, self.words, self.character_errors, self.characters = sums

    @property
    def utterances(self) -> int:
        return len(self.per_utterance)

    @property
    def wer(self) -> float:
        return self.errors / self.words

    @property
    def cer(self) -> float:
        return self.character_errors / self.characters


class Recognizer:
    """`model` (float32, on `device`) hearing `window` seconds at a time."""

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        device: torch.device,
        language: str = "en",
    ) -> None:
        self.model = nn.Module.to(model, device).eval()  # transformers' own `to` hides its arguments from mypy
        self.tokenizer, self.name, self.device = tokenizer, name, device
        self.special = set(tokenizer.get_added_vocab().values())
        self.fingerprint = _fingerprint(model)
        _complete(model.generation_config, tokenizer.get_vocab(), model.config.vocab_size >= MULTILINGUAL)
        self.set_language(language)
        self._positions = model.model.encoder.embed_positions.weight.detach().clone()
        self.set_window(len(self._positions) // POSITIONS_PER_SECOND)

    def set_language(self, language: str, accents: bool = True) -> None:
        """Sets the prompt (of a multilingual model) and the text normaliser, which may drop accents outside English.

        language: Whisper's code or name for it, "de" or "german"; of one of UNSPACED, each character is a word. Raises
        DemoError for an unknown one.
        """
        self.language = language_code(language)
        basic = BasicTextNormalizer(remove_diacritics=not accents, split_letters=self.language in UNSPACED)
        if accents:
            basic.clean = _without_symbols
        self.normalise = EnglishTextNormalizer({}) if self.language == "en" else basic
        self.prefix = self._prefix()

    def _prefix(self) -> list[int]:
        names = ["<|startoftranscript|>", "<|notimestamps|>"]
        if getattr(self.model.generation_config, "is_multilingual", False):
            names[1:1] = [f"<|{self.language}|>", "<|transcribe|>"]
        vocabulary = self.tokenizer.get_vocab()
        for name in names:
            if name not in vocabulary:
                raise DemoError(
                    f"`language` must be one of the model {self.name}, which has no token {name}, got {self.language!r}"
                )
        return [vocabulary[name] for name in names]

    def set_window(self, seconds: float) -> None:
        """Sets the encoder's window (whole seconds): the first rows of its position table, nothing else changes."""
        window = math.ceil(seconds)
        if not 0 < window * POSITIONS_PER_SECOND <= len(self._positions):
            most = len(self._positions) // POSITIONS_PER_SECOND
            raise DemoError(f"`window` must be greater than 0 and at most {most} s, got {seconds} s")
        encoder, count = self.model.model.encoder, window * POSITIONS_PER_SECOND
        encoder.embed_positions = nn.Embedding.from_pretrained(self._positions[:count].to(self.device), freeze=True)
        encoder.max_source_positions = self.model.config.max_source_positions = count
        self.extractor = _extractor(self.model.config.num_mel_bins, window)
        self.window = window

    def fit_window(self, seconds: float) -> None:
        """Sets a window for clips of up to `seconds` and SILENCE: cut at the end of speech, models invent words."""
        self.set_window(min(seconds + SILENCE, len(self._positions) / POSITIONS_PER_SECOND))

    def features(self, samples: Sequence[Samples]) -> Tensor:
        """Log-mel features (B, mels, 100 x window) on the device."""
        out = self.extractor(list(samples), sampling_rate=RATE, return_tensors="pt")
        return out.input_features.to(self.device)

    def labels(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(decoder_input_ids, labels), each (B, L): the prompt tokens, the text, the end; only text and end count."""
        end, limit = self.model.config.eos_token_id, self.model.config.max_target_positions
        rows = []
        for text in texts:
            row = [*self.prefix, *self.tokenizer.encode(f" {text.strip()}", add_special_tokens=False), end]
            if special := self.special.intersection(row[len(self.prefix) : -1]):
                token = self.tokenizer.convert_ids_to_tokens(special.pop())
                raise DemoError(f"a text must not contain the model's own token {token}, got {text!r}")
            if len(row) > limit:
                raise DemoError(f"a text of {len(row)} tokens; at most {limit} fit the model: {text[:60]!r} ...")
            rows.append(row)
        inputs = torch.full((len(rows), max(map(len, rows)) - 1), end)
        labels = torch.full_like(inputs, IGNORED)
        skip = len(self.prefix) - 1
        for i, row in enumerate(rows):
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            labels[i, skip : len(row) - 1] = torch.tensor(row[skip + 1 :])
        return inputs.to(self.device), labels.to(self.device)

    def check(self, clips: Sequence[Clip]) -> None:
        """Raises DemoError, naming the line, for the first text that `labels` would refuse."""
        for clip in clips:
            try:
                self.labels([clip.text])
            except DemoError as error:
                raise DemoError(f"{clip.where or clip.path}: {error}") from None

    @torch.inference_mode()
    def hear(self, samples: Sequence[Samples]) -> list[str]:
        """Greedy transcripts of one batch, each of which fits the window."""
        multilingual = {"language": self.language, "task": "transcribe"} if len(self.prefix) > 2 else {}
        most = min(self.model.config.max_target_positions - len(self.prefix), 32 + 10 * math.ceil(self.window))
        ids = self.model.generate(
            input_features=self.features(samples),
            max_new_tokens=most,
            num_beams=1,
            do_sample=False,
            return_timestamps=False,
            **multilingual,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def transcribe(self, speech: Speech, desc: str, batch: int = 16) -> list[str]:
        """Greedy transcripts in the order of the clips; clips of like length share a batch."""
        self.model.eval()
        count = len(speech)
        order = sorted(range(count), key=lambda i: (speech.seconds[i], i))
        found: dict[int, str] = {}
        with progress(total=count, desc=desc, unit="clip") as bar:
            for start in range(0, count, batch):
                chosen = order[start : start + batch]
                found.update(zip(chosen, self.hear([speech.samples(i) for i in chosen]), strict=True))
                bar.update(len(chosen))
        return [found[i] for i in range(count)]

    def _plain(self, text: str) -> str:
        return self.normalise(ELLIPSIS.sub(" ", text)).strip()

    def score(self, texts: Sequence[str], transcripts: Sequence[str]) -> Score:
        """Word and character errors after Whisper's text normaliser, in both."""
        pairs = [(self._plain(t), self._plain(h)) for t, h in zip(texts, transcripts, strict=True)]
        if not any(text for text, _ in pairs):
            raise DemoError("no reference text has any words left after normalisation")
        counts = [_count(text, heard) for text, heard in pairs]
        if self.language in UNSPACED:  # the blanks between characters are none of them
            counts = [(errors, size, errors, size) for errors, size, *_ in counts]
        return Score(counts)


def language_code(language: str) -> str:
    """Whisper's code of a language, of which it is the code or the name. Raises DemoError for another."""
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if code not in LANGUAGES:
        raise DemoError(f"`language` must be a code or a name that Whisper knows (de, german), got {language!r}")
    return code


def _without_symbols(text: str) -> str:
    """The text in NFKC, blanks for symbols and punctuation; marks stay, which are vowels in Hindi, Tamil and Thai."""
    return "".join(" " if category(c)[0] in "SP" else c for c in normalize("NFKC", text))


def _complete(config: GenerationConfig, vocabulary: dict[str, int], multilingual: bool) -> None:
    """Adds what transcribing needs, and folders without a generation_config.json, or with an old one, lack."""
    wanted: dict[str, Any] = {"no_timestamps_token_id": vocabulary.get("<|notimestamps|>")}
    if multilingual:
        config.is_multilingual = True
        languages = (f"<|{code}|>" for code in LANGUAGES)
        wanted["lang_to_id"] = {name: vocabulary[name] for name in languages if name in vocabulary}
        wanted["task_to_id"] = {task: vocabulary.get(f"<|{task}|>") for task in TASK_IDS}
    for name, value in wanted.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)


def _count(text: str, heard: str) -> tuple[int, int, int, int]:
    if not text:  # jiwer wants a reference
        return len(heard.split()), 0, len(heard), 0
    found = []
    for out in (jiwer.process_words(text, heard), jiwer.process_characters(text, heard)):
        missed = out.substitutions + out.deletions
        found += [missed + out.insertions, out.hits + missed]
    return found[0], found[1], found[2], found[3]


@lru_cache
def _extractor(mels: int, window: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=window)


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy())
    return digest.hexdigest()[:16]


def load_recognizer(model: str | None, data: Path, device: torch.device, language: str = "en") -> Recognizer:
    """The built-in tiny.en (None), a Hugging Face name or folder, or a folder of CTranslate2's."""
    folder = data / MODEL if model is None else Path(model)
    if is_ct2_whisper(folder):
        converted, own_tokenizer, _ = load_whisper_ct2(folder)
        return Recognizer(converted, own_tokenizer, folder.name, device, language)
    name = str(model)
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "whisper":
            raise DemoError(f"--model must be a whisper model, got {name}, which is of type {kind}")
        loaded = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DemoError(
            "--model must be a folder with a Whisper model, or the name of one that this machine can obtain from "
            f"Hugging Face, got {name} ({str(error).splitlines()[0]})"
        ) from error
    return Recognizer(loaded, tokenizer, Path(name).name, device, language)
