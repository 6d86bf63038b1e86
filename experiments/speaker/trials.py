"""Trial lists in VoxCeleb's format: lines "1 path/a.wav path/b.wav" (of one speaker) or "0 ..." (of two)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from experiments.asr import DemoError
from experiments.asr.runfolder import write_atomically

SUFFIXES = (".wav", ".flac", ".ogg", ".g722", ".gsm")


class Trial(NamedTuple):
    """`label` 1: a target trial, both recordings are of one speaker. Paths are relative to the folder of speakers."""

    label: int
    first: str
    second: str


def speaker_of(path: str) -> str:
    """The first folder of a recording's path, as in VoxCeleb: id10270/5r0dWxy17C8/00001.wav."""
    return path.split("/")[0]


def list_recordings(folder: Path) -> dict[str, list[str]]:
    """Speaker -> its recordings in order, from folder/SPEAKER/.../NAME.wav (or another of SUFFIXES)."""
    if not folder.is_dir():
        raise DemoError(f"{folder}: there is no such folder of speakers")
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in SUFFIXES and len(inside.parts) > 1:
            found.setdefault(inside.parts[0], []).append(inside.as_posix())
    if not found:
        raise DemoError(f"{folder}: contains no recording SPEAKER/.../NAME with {', '.join(SUFFIXES)}")
    return found


def read_trials(file: Path, folder: Path | None = None) -> list[Trial]:
    """The trials of a file; with `folder`, every recording must be there. Errors name the file and the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{file}: cannot be read as a trial list ({error})") from error
    found: list[Trial] = []
    known: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, fields = f"{file}, line {number}", line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise DemoError(f"{where}: {line!r} is not of the form '1 a.wav b.wav' or '0 a.wav b.wav'")
        trial = Trial(int(fields[0]), fields[1], fields[2])
        if trial.first == trial.second:
            raise DemoError(f"{where}: compares {trial.first} with itself")
        for path in {trial.first, trial.second} - known:
            if folder is not None and not (folder / path).is_file():
                raise DemoError(f"{where}: {folder / path} is not there")
            known.add(path)
        found.append(trial)
    kinds = {trial.label for trial in found}
    if kinds != {0, 1}:
        raise DemoError(
            f"{file}: must contain at least one target (1) and one non-target (0) trial, got {len(found)} trials"
        )
    return found


def write_trials(file: Path, trials: Iterable[Trial]) -> None:
    """Writes one line a trial; raises DemoError for a path with white space in it, which the format cannot hold."""
    listed = list(trials)
    for path in {path for _, *paths in listed for path in paths}:
        if len(path.split()) != 1:
            raise DemoError(f"{path!r}: paths in a trial list must not contain white space; rename the recording")
    text = "".join(f"{trial.label} {trial.first} {trial.second}\n" for trial in listed)
    write_atomically(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def make_trials(
    recordings: Mapping[str, Sequence[str]], most: int = 1000, group: Callable[[str], object] | None = None
) -> list[Trial]:
    """As many target as non-target trials, at most `most` of each: those of all pairs whose SHA-256 comes first.

    No recording is compared with itself, no pair comes twice, and the same recordings always give the same list.
    group: non-target trials only between speakers for which it gives the same value.
    Raises DemoError if one of both kinds cannot be made.
    """
    if most < 1:
        raise DemoError(f"`most` must allow at least one trial of each kind, got {most}")
    same = [Trial(1, *pair) for paths in recordings.values() for pair in combinations(sorted(set(paths)), 2)]
    other = [
        Trial(0, a, b)
        for one, two in combinations(sorted(recordings), 2)
        if group is None or group(one) == group(two)
        for a in sorted(set(recordings[one]))
        for b in sorted(set(recordings[two]))
    ]
    count = min(most, len(same), len(other))
    if not count:
        raise DemoError(
            f"{len(recordings)} speakers give {len(same)} target and {len(other)} non-target trials: at least two "
            "speakers, one of them with two recordings, are needed"
        )
    return [trial for kind in (same, other) for trial in sorted(kind, key=_order)[:count]]


def _order(trial: Trial) -> bytes:
    return hashlib.sha256(f"{trial.first} {trial.second}".encode()).digest()
