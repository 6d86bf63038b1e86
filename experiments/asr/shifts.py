"""The domain shifts of the experiment: real speech that the model hears worse, and speech that it should not forget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.asr import DemoError
from experiments.asr.audio import CHILD_FACTOR, TELEPHONE_SNR
from experiments.asr.fetch import ASTERISK, FRENCH, ITALIAN, SONNET, SPANISH, SPHINX
from experiments.asr.manifests import read_manifest
from experiments.asr.prompts import read_foreign_prompts, read_sphinx
from experiments.asr.speech import (
    AS_RECORDED,
    MAX_PROMPT_SECONDS,
    Clip,
    english_prompts,
    source_speech,
    split,
    split_validation,
)

CACHE = "cache"  # folder of the data folder


@dataclass(frozen=True)
class Shift:
    """Speech of one target domain, split by text, and test sets of the source domain by title."""

    name: str
    title: str
    language: str
    train: list[Clip]
    validation: list[Clip]
    test: list[Clip]
    source: dict[str, list[Clip]]
    accents: bool  # whether the texts have them
    left_out: int  # clips of the target that last too long


@dataclass(frozen=True)
class _Kind:
    title: str
    language: str
    part: str  # folder of its speech
    clips: Callable[[Path], list[Clip]]  # from the data folder
    accents: bool = True


def _child(data: Path) -> list[Clip]:
    return english_prompts(data, voice=CHILD_FACTOR)


def _telephone(data: Path) -> list[Clip]:
    return english_prompts(data, channel="telephone")


def _foreign(title: str, language: str, part: str, accents: bool = True) -> _Kind:
    def clips(data: Path) -> list[Clip]:
        return [Clip(*prompt) for prompt in read_foreign_prompts(data / part, accents)]

    return _Kind(title, language, part, clips, accents)


_KINDS = {
    "child": _Kind(f"child-like voice (x{CHILD_FACTOR})", "en", ASTERISK, _child),
    "telephone": _Kind(f"telephone, noise at {TELEPHONE_SNR:.0f} dB", "en", ASTERISK, _telephone),
    "french": _foreign("French", "fr", FRENCH),
    "spanish": _foreign("Spanish", "es", SPANISH, accents=False),
    "italian": _foreign("Italian", "it", ITALIAN),
}
SHIFTS = tuple(_KINDS)
SAME_VOICE = ("child", "telephone", "spanish")  # as that of the English prompts: Allison Smith's


def _own(manifest: Path, language: str) -> _Kind:
    return _Kind(manifest.stem, language, "", lambda data: read_manifest(manifest))


def _kind(name: str, language: str = "en") -> _Kind:
    if name in _KINDS:
        return _KINDS[name]
    if not Path(name).exists():
        raise DemoError(f"`shift` must be one of {', '.join(SHIFTS)} or a manifest, got {name!r}")
    return _own(Path(name), language)


def parts_of(name: str) -> tuple[str, ...]:
    """The folders of the data folder that the shift needs, for `fetch.ensure`. Raises DemoError for another name."""
    return tuple(filter(None, dict.fromkeys((_kind(name).part, ASTERISK, SPHINX, SONNET))))


def load_shift(name: str, data: Path, longest: float, language: str = "en", source: bool = True) -> Shift:
    """The shift's clips of at most `longest` seconds, 25 % of the texts for testing and 15 % for validation.

    name: one of SHIFTS, or a manifest of your own speech (see `read_manifest`), in `language`. source=False leaves out
    the source domain.
    Those of the source domain by other speakers are of at most MAX_PROMPT_SECONDS.

    The sides are those of the demo's split: a fixed hash of the text, so equal texts are never on two sides, not even
    in two shifts. What is made of a recording is kept in the data folder's `cache`. Fetches nothing. Raises DemoError
    for another name and where a side is left without clips.
    """
    kind = _kind(name, language)

    def usable(clips: list[Clip], most: float = longest) -> list[Clip]:
        return [replace(clip, cache=data / CACHE) for clip in clips if clip.duration() <= most]

    clips = kind.clips(data)
    short = usable(clips)
    rest, test = split(short)
    train, validation = split_validation(rest, test)
    known = (
        source_speech(data) | {"sonnet reader": [Clip(*line) for line in read_sphinx(data / SONNET)]} if source else {}
    )
    heard = {
        title: usable(clips, longest if title == AS_RECORDED else MAX_PROMPT_SECONDS) for title, clips in known.items()
    }
    left_out = len(clips) - len(short)
    shift = Shift(name, kind.title, kind.language, train, validation, test, heard, kind.accents, left_out)
    for side in ("train", "validation", "test"):
        if not getattr(shift, side):
            raise DemoError(f"shift {name}: no {side} clip lasts at most longest = {longest} s")
    return shift
