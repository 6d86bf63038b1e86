"""The recorded prompts and their transcripts as the Debian packages lay them out, and what of them is usable."""

from __future__ import annotations

import re
import statistics
import unicodedata
from pathlib import Path

from . import DemoError
from .audio import duration

MIN_WORDS = 3
MIN_PROMPTS = 150
UNSPOKEN = re.compile(r"[\[\](){}*#]")  # stage directions, and signs whose spoken form the transcript does not give
UNCLEAR = re.compile(r"[\d?]")  # outside English: digits, spoken as words, and "?" in the place of a lost letter
PACE = (0.6, 2.0)  # times the median duration a character: beyond, the transcript is not what is said


def parse_prompts(text: str) -> dict[str, str]:
    """`key: text` lines, `;` comments -> {key: text}; blanks collapsed, "..." (more speech follows) dropped."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith(";"):
            key, colon, spoken = line.partition(":")
            if not colon:
                raise DemoError(f"prompts.txt: no colon in the line {line!r}")
            found[key.strip()] = " ".join(spoken.replace("...", " ").split())
    return found


def usable(text: str) -> bool:
    """Whether the transcript is plain speech of at least three words."""
    return not UNSPOKEN.search(text) and len(re.findall(r"[\w']+", text)) >= MIN_WORDS


def read_prompts(folder: Path) -> list[tuple[str, str, Path]]:
    """(key, text, audio file) of every usable prompt, in order of the keys."""
    prompts = parse_prompts((folder / "prompts.txt").read_text(encoding="utf-8-sig"))
    return [(key, text, folder / "audio" / f"{key}.g722") for key, text in sorted(prompts.items()) if usable(text)]


def read_foreign_prompts(folder: Path, accents: bool = True) -> list[tuple[str, str, Path]]:
    """`read_prompts` for other languages: clear texts whose recordings last as long as such a text does.

    Without `accents` the texts lose them: Spanish prompts have them here and there only.
    """
    found = [item for item in read_prompts(folder) if not UNCLEAR.search(item[1]) and item[2].is_file()]
    paces = [duration(path) / len(text) for _, text, path in found]
    least, most = (factor * statistics.median(paces) for factor in PACE)
    kept = [item for item, pace in zip(found, paces, strict=True) if least <= pace <= most]
    return kept if accents else [(key, _without_accents(text), path) for key, text, path in kept]


def _without_accents(text: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", text) if not unicodedata.combining(letter))


def check_prompts(folder: Path) -> None:
    """Raises DemoError unless there are enough usable prompts, nearly all of them with sound."""
    prompts = read_prompts(folder)
    silent = [key for key, _, path in prompts if not path.is_file() or path.stat().st_size < 2000]
    if len(prompts) < MIN_PROMPTS or len(silent) > len(prompts) // 20:
        raise DemoError(
            f"the prompt package has changed: {len(prompts)} usable transcripts (at least {MIN_PROMPTS} "
            f"wanted), {len(silent)} of them without sound ({', '.join(silent[:5])})"
        )


def read_sphinx(folder: Path) -> list[tuple[str, str, Path]]:
    """(key, text, audio file) of one pocketsphinx test set: lines `<s> words </s> (key)`."""
    transcripts = sorted(folder.glob("*transcription"))
    if not transcripts:
        raise DemoError(f"{folder}: holds no transcription file")
    found = []
    for line in transcripts[0].read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\s*<s>(.*)</s>\s*\((.+)\)\s*", line):
            found.append((match[2], match[1].strip(), folder / f"{match[2]}.wav"))
    return found


def check_sphinx(folder: Path) -> None:
    """Raises DemoError unless both test sets have their transcripts and their sound."""
    for name in ("librivox", "cards"):
        found = read_sphinx(folder / name)
        silent = [path.name for _, _, path in found if not path.is_file() or path.stat().st_size < 2000]
        if len(found) < 5 or silent:
            raise DemoError(
                f"the test data have changed: {name} has {len(found)} transcripts (5 wanted), "
                f"without sound: {', '.join(silent) or 'none'}"
            )
