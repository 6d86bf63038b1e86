"""The recorded prompts and their transcripts as the Debian packages lay them out, and what of them is usable."""

from __future__ import annotations

import re
from pathlib import Path

from . import DemoError

MIN_WORDS = 3
MIN_PROMPTS = 200
UNSPOKEN = re.compile(r"[\[\](){}*#]")  # stage directions, and signs whose spoken form the transcript does not give


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
    return not UNSPOKEN.search(text) and len(re.findall(r"[A-Za-z0-9']+", text)) >= MIN_WORDS


def read_prompts(folder: Path) -> list[tuple[str, str, Path]]:
    """(key, text, audio file) of every usable prompt, in order of the keys."""
    prompts = parse_prompts((folder / "prompts.txt").read_text(encoding="utf-8"))
    return [(key, text, folder / "audio" / f"{key}.g722") for key, text in sorted(prompts.items()) if usable(text)]


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
