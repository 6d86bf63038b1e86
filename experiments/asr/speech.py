"""Which recordings are trained on and which are measured: the built-in corpus, the split."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from experiments.asr import DemoError, progress
from experiments.asr.audio import (
    CHANNELS,
    CHILD_FACTOR,
    RATE,
    SLACK,
    AudioError,
    Samples,
    duration,
    raise_voice,
    read_audio,
)
from experiments.asr.fetch import ASTERISK, SPHINX
from experiments.asr.prompts import read_prompts, read_sphinx
from experiments.asr.runfolder import write_atomically

HELD_OUT = 0.25
VALIDATION = 0.15
MAX_PROMPT_SECONDS = 9.5  # the built-in prompts that fit a 10 s encoder window
MAX_SECONDS = 30.0  # what Whisper hears at once
CACHE_BYTES = 1 << 30
AS_RECORDED = "prompts as recorded"  # the English test prompts, unaltered
VERSION = 2  # of what is made of a recording; another one makes the kept samples again

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """One recording, or a part of it: where it is, what is said, and how it is to sound."""

    name: str
    text: str
    path: Path
    voice: float = 1.0  # the factor by which the voice is raised; 1 = as recorded
    channel: str = ""  # what it is heard through: a name of CHANNELS; "" = as recorded
    where: str = ""  # manifest and line, for error messages
    cache: Path | None = None  # folder that keeps what `read` has made
    offset: float = 0.0  # seconds before the part
    seconds: float | None = None  # its length; None = to the end

    def read(self) -> Samples:
        """Samples (n,) float32 at 16 kHz. Raises AudioError."""
        if self.cache is None or not self.path.is_file():
            return self._make()
        how = "\0".join(map(str, (VERSION, self.path.name, self.voice, self.channel, self.offset, self.seconds)))
        made = f"{how}\0".encode() + self.path.read_bytes()
        kept = self.cache / f"{hashlib.sha256(made).hexdigest()[:32]}.npy"
        if not kept.is_file():
            samples = self._make()
            write_atomically(kept, lambda path: _save(path, samples))
        loaded: Samples = np.load(kept)
        return loaded

    def duration(self) -> float:
        """Seconds. Raises AudioError."""
        return self.seconds or self._located(duration) - self.offset

    def _located(self, read: Callable[[Path], T]) -> T:
        try:
            return read(self.path)
        except AudioError as error:
            raise AudioError(f"{self.where}: {error}" if self.where else str(error)) from None

    def _make(self) -> Samples:
        samples = self._located(self._part if self.offset or self.seconds else read_audio)
        raised = samples if self.voice == 1.0 else raise_voice(samples, self.voice)
        return CHANNELS[self.channel](raised, self.path.name)

    def _part(self, path: Path) -> Samples:
        samples = _recording(path, path.stat().st_mtime_ns)
        begin, whole = round(self.offset * RATE), len(samples) / RATE
        end = len(samples) if self.seconds is None else begin + round(self.seconds * RATE)
        if begin >= len(samples) or end > len(samples) + SLACK * RATE:
            wanted = f"from {self.offset:g} s" + (f" to {self.offset + self.seconds:g} s" if self.seconds else " on")
            raise AudioError(f"{path}: lasts {whole:.2f} s, so it has no part {wanted}")
        return samples[begin:end].copy()  # a view would keep the whole recording


@lru_cache(maxsize=1)
def _recording(path: Path, changed: int) -> Samples:
    """The whole recording, kept until another one is read: its parts follow each other."""
    return read_audio(path)


def _save(path: Path, samples: Samples) -> None:
    with path.open("wb") as stream:
        np.save(stream, samples)


def words(text: str) -> str:
    """The text as the split sees it: in NFC and lower case, letters, their marks, digits and underscores only."""
    plain = unicodedata.normalize("NFC", text.lower())
    return " ".join("".join(c if c == "_" or unicodedata.category(c)[0] in "LMN" else " " for c in plain).split())


def held_out(text: str, share: float = HELD_OUT) -> bool:
    """Whether a text belongs to the test side: a fixed hash of its words, so equal texts are never on both sides."""
    return int.from_bytes(hashlib.sha256(words(text).encode()).digest()[:4], "big") < share * 2**32


def split(clips: Iterable[Clip], share: float = HELD_OUT) -> tuple[list[Clip], list[Clip]]:
    """(training side, test side); the clips that a smaller share holds out are among those of a larger one."""
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in clips:
        sides[held_out(clip.text, share)].append(clip)
    return sides


def split_validation(rest: Iterable[Clip], test: Iterable[Clip]) -> tuple[list[Clip], list[Clip]]:
    """(training side, validation side) of what does not test: 15 % of all texts, none of them one of `test`.

    Of the same hash, so that no text is on two sides, not even of two sets.
    """
    tested = {words(clip.text) for clip in test}
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in rest:
        held = held_out(clip.text, HELD_OUT + VALIDATION) and not held_out(clip.text)
        sides[held and words(clip.text) not in tested].append(clip)
    return sides


@dataclass
class Corpus:
    """What an experiment needs: clips of the target domain to train on, to choose by and to test, and test clips of
    the source domain, with those of its prompts to choose by."""

    target: str
    train: list[Clip]
    validation: list[Clip]
    test: list[Clip]
    source: dict[str, list[Clip]] = field(default_factory=dict)
    source_validation: list[Clip] = field(default_factory=list)

    def add_source(self, data: Path) -> None:
        """The built-in speech, as the source domain."""
        self.source = source_speech(data)
        self.source_validation = split_validation(english_prompts(data), self.test)[1]


def english_prompts(data: Path, voice: float = 1.0, channel: str = "") -> list[Clip]:
    found = read_prompts(data / ASTERISK)
    return [Clip(key, text, path, voice, channel) for key, text, path in found if path.is_file()]


def source_speech(data: Path) -> dict[str, list[Clip]]:
    """Speech the model knows: the test prompts as recorded, and two sets of other speakers."""
    sets = {AS_RECORDED: split(english_prompts(data))[1]}
    for folder, title in (("librivox", "LibriVox reader"), ("cards", "playing cards")):
        sets[title] = [Clip(f"{folder}/{k}", text, path) for k, text, path in read_sphinx(data / SPHINX / folder)]
    return sets


def built_in(data: Path) -> Corpus:
    """Child-like speech made from the real prompts, pitch and formants x1.6; split by text."""
    rest, test = split(english_prompts(data, CHILD_FACTOR))
    corpus = Corpus(f"child-like prompts (x{CHILD_FACTOR})", *split_validation(rest, test), test)
    corpus.add_source(data)
    return corpus


class Speech:
    """Clips whose audio has been read once and checked. Keeps samples up to `CACHE_BYTES`, reads the rest again."""

    def __init__(self, clips: list[Clip], desc: str, drop_above: float | None = None, language: str = "en") -> None:
        self.language = language
        self.clips: list[Clip] = []
        self.seconds: list[float] = []
        self.dropped = 0
        self._cache: OrderedDict[int, Samples] = OrderedDict()
        self._free = CACHE_BYTES
        digest = hashlib.sha256()
        for clip in progress(clips, desc=desc, unit="clip"):
            samples = clip.read()
            seconds = len(samples) / RATE
            if drop_above is not None and seconds > drop_above:
                self.dropped += 1
                continue
            if seconds > MAX_SECONDS:
                raise DemoError(
                    f"{clip.where or clip.path}: {clip.path} lasts {seconds:.1f} s; at most {MAX_SECONDS:.0f} s "
                    "fit Whisper's window, so cut it into shorter pieces"
                )
            digest.update(f"{clip.text}\0{clip.voice}\0".encode())
            digest.update(samples.tobytes())
            if samples.nbytes <= self._free:
                self._cache[len(self.clips)] = samples
                self._free -= samples.nbytes
            self.clips.append(clip)
            self.seconds.append(seconds)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def texts(self) -> list[str]:
        return [clip.text for clip in self.clips]

    def samples(self, index: int) -> Samples:
        return self._cache[index] if index in self._cache else self.clips[index].read()
