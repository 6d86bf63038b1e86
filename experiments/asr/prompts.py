"""The recorded prompts and their transcripts as the Debian packages lay them out, and what of them is usable."""

from __future__ import annotations

import json
import re
import statistics
import unicodedata
from pathlib import Path

from experiments.asr import DemoError
from experiments.asr.audio import RATE, duration, read_audio, write_wav

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
    """(key, text, audio file) of one set in the form of pocketsphinx's: lines `<s> words </s> (key)`."""
    transcripts = sorted(folder.glob("*transcription"))
    if not transcripts:
        raise DemoError(f"{folder}: contains no transcription file")
    found = []
    for line in transcripts[0].read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\s*<s>(.*)</s>\s*\((.+)\)\s*", line):
            found.append((match[2], match[1].strip(), folder / f"{match[2]}.wav"))
    return found


def check_sphinx(folder: Path) -> None:
    """Raises DemoError unless both test sets have their transcripts and their sound."""
    for name in ("librivox", "cards"):
        check_utterances(folder / name)


def check_utterances(folder: Path) -> None:
    """Raises DemoError unless the set has its transcripts and their sound."""
    found = read_sphinx(folder)
    silent = [path.name for _, _, path in found if not path.is_file() or path.stat().st_size < 2000]
    if len(found) < 5 or silent:
        raise DemoError(
            f"the test data have changed: {folder.name} has {len(found)} transcripts (at least 5 wanted), "
            f"without sound: {', '.join(silent) or 'none'}"
        )


def write_sonnet(tool: Path, out: Path) -> None:
    """The sonnet that a forced aligner brings, line by line, as a set that `read_sphinx` reads; the title is left out.

    tool: the aligner's folder with `audio.mp3` and the times and words of `sonnet.json`.
    """
    samples = read_audio(tool / "audio.mp3")
    lines = []
    for part in json.loads((tool / "sonnet.json").read_text(encoding="utf-8"))["fragments"][1:]:
        begin, end = (round(float(part[key]) * RATE) for key in ("begin", "end"))
        write_wav(out / f"{part['id']}.wav", samples[begin:end])
        lines.append(f"<s> {' '.join(part['lines'])} </s> ({part['id']})\n")
    (out / "transcription").write_text("".join(lines), encoding="utf-8")
