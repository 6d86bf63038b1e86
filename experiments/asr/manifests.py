"""Manifests of speech as people have them: JSON lines, CSV, TSV, Kaldi's data folder, Hugging Face's audio folder."""

from __future__ import annotations

import csv
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.asr import DemoError
from experiments.asr.audio import CHANNELS
from experiments.asr.speech import Clip, Corpus, split, split_validation, words

AUDIO = ("audio", "audio_filepath", "file_name", "path")
TEXT = ("text", "sentence", "transcription", "transcript")
LINE = '{"audio": path, "text": words}'
Row = tuple[str, dict[str, Any]]  # file and line, for error messages; its keys and values


def read_manifest(path: Path, silent: bool = False) -> list[Clip]:
    """The clips of a manifest, their texts in NFC.

    path: a file of JSON lines {"audio": path, "text": what is said} (NeMo's "audio_filepath" and Hugging Face's
    "file_name", "sentence" or "transcription" are the same); a .csv or .tsv file whose first line has these names; or a
    folder, with Kaldi's wav.scp, text and segments or with Hugging Face's metadata.csv or metadata.jsonl. Audio paths
    are relative to the folder; Kaldi's first to the current directory.
    A line may hold "offset" and "duration", the part of the file in seconds, "pitch", a factor by which the voice is
    raised, and "channel", what it is heard through; without them the recording is used as it is.
    silent: whether texts may have no words: what is heard there counts as inserted.
    Raises DemoError naming file and line for whatever cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    clips = [_clip(where, entry, folder, silent) for where, entry in _rows(path)]
    if not clips:
        raise DemoError(f"{path}: the manifest is empty; each line is {LINE}")
    return clips


def _rows(path: Path) -> Iterator[Row]:
    if path.is_dir():
        if (path / "wav.scp").is_file():
            return _kaldi(path)
        path = next((p for p in (path / "metadata.csv", path / "metadata.jsonl") if p.is_file()), path)
        if path.is_dir():
            raise DemoError(f"{path}: a manifest's folder must have a wav.scp, a metadata.csv or a metadata.jsonl")
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {".csv": _csv, ".tsv": _csv}
    return readers.get(path.suffix.lower(), _json)(path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines, which end with LF or CR LF only: a text may hold what else splitlines() takes for an end."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{path}: the manifest cannot be read ({error})") from None
    if content.strip():
        for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
            if not line.strip():
                raise DemoError(f"{path}:{number}: the line is empty")
            yield f"{path}:{number}", line


def _json(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DemoError(f"{where}: not JSON ({error}); each line is {LINE}") from None
        if not isinstance(entry, dict):
            raise DemoError(f"{where}: not a JSON object; each line is {LINE}")
        yield where, entry


def _csv(path: Path) -> Iterator[Row]:
    """In .tsv files, as Common Voice has them, quotation marks belong to the text."""
    tabs = path.suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    lines = [line for _, line in _lines(path)]
    reader = csv.DictReader((f"{line}\n" for line in lines), **dialect)
    try:
        for entry in reader:
            where = f"{path}:{reader.line_num}"
            if None in entry or None in entry.values():
                raise DemoError(f"{where}: must have as many fields as the first line, {reader.fieldnames}")
            yield where, entry
    except csv.Error as error:
        raise DemoError(f"{path}:{reader.line_num + 1}: not CSV ({error})") from None


def _kaldi(folder: Path) -> Iterator[Row]:
    """wav.scp: `recording path`; text: `utterance words`; segments, if any: `utterance recording begin end`."""
    recordings, texts = (_table(folder / name) for name in ("wav.scp", "text"))
    parts = _table(folder / "segments") if (folder / "segments").is_file() else None
    for utterance, (where, rest) in (parts or recordings).items():
        entry: dict[str, Any] = {}
        recording = utterance
        if parts is not None:
            try:
                recording, begin, end = rest.split()
                entry = {"offset": float(begin), "duration": float(end) - float(begin)}
            except ValueError:
                raise DemoError(f"{where}: must be an utterance, its recording, begin and end in seconds") from None
        for name, table, key in (("wav.scp", recordings, recording), ("text", texts, utterance)):
            if key not in table:
                raise DemoError(f"{where}: {folder / name} has no line for {key!r}")
        scp, audio = recordings[recording]
        if audio.endswith("|"):
            raise DemoError(f"{scp}: commands are not run; write their output to a file and name that, got {audio!r}")
        here = Path(audio).absolute()
        entry |= {"audio": str(here) if here.is_file() else audio, "text": texts.pop(utterance)[1]}
        yield where, entry
    for where, _ in texts.values():
        raise DemoError(f"{where}: the text has no audio in {folder}")


def _table(path: Path) -> dict[str, tuple[str, str]]:
    """First field -> file and line, and the rest of the line."""
    found: dict[str, tuple[str, str]] = {}
    for where, line in _lines(path):
        key, *rest = line.split(maxsplit=1)
        if key in found:
            raise DemoError(f"{where}: {key!r} is also in {found[key][0]}")
        found[key] = where, "".join(rest).strip()
    return found


def _clip(where: str, entry: dict[str, Any], folder: Path, silent: bool) -> Clip:
    name, text = (_first(where, entry, keys) for keys in (AUDIO, TEXT))
    if not silent and not words(text):
        raise DemoError(f"{where}: the text {text!r} contains no words")
    audio = folder / name
    if not audio.is_file():
        raise DemoError(f"{where}: there is no audio file {audio}")
    channel = entry.get("channel") or ""
    if channel not in CHANNELS:
        raise DemoError(f"{where}: `channel` must be one of {', '.join(map(repr, CHANNELS))}, got {channel!r}")
    pitch = _number(where, entry, "pitch", lambda value: 0.5 <= value <= 2, "a factor from 0.5 to 2", 1.0)
    offset = _number(where, entry, "offset", lambda value: 0 <= value < float("inf"), "seconds from 0 on", 0.0)
    seconds = _number(where, entry, "duration", lambda value: 0 < value < float("inf"), "seconds above 0", None)
    return Clip(name, unicodedata.normalize("NFC", text), audio, pitch, channel, where, offset=offset, seconds=seconds)


def _first(where: str, entry: dict[str, Any], keys: tuple[str, ...]) -> str:
    found = next((entry[key] for key in keys if key in entry), None)
    if not isinstance(found, str):
        raise DemoError(f'{where}: no text under the key "{keys[0]}" (or {", ".join(keys[1:])}); it has {list(entry)}')
    return found


def _number(where: str, entry: dict[str, Any], key: str, fits: Callable[[float], bool], what: str, default: Any) -> Any:
    given = entry.get(key)
    if given is None or given == "":  # as CSV has it
        return default
    try:
        value = float("nan") if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        value = float("nan")
    if not fits(value):
        raise DemoError(f"{where}: `{key}` must be {what} (default: as recorded), got {given!r}")
    return value


def write_manifest(path: Path, clips: Iterable[Clip]) -> None:
    """The clips as a manifest that `read_manifest` reads."""
    lines = [
        {"audio": str(c.path.resolve()), "text": c.text, "pitch": c.voice, "channel": c.channel}
        | {"offset": c.offset, "duration": c.seconds}
        for c in clips
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def from_manifest(manifest: Path, eval_manifest: Path | None) -> Corpus:
    """A user's speech as the target domain, as it is. Without `eval_manifest` a quarter of the texts is held out."""
    clips = read_manifest(manifest)
    if eval_manifest is None:
        rest, test = split(clips)
        if not rest or not test:
            raise DemoError(
                f"{manifest}: {len(rest)} of its {len(clips)} lines fall on the training side and {len(test)} "
                "on the held-out side; give --eval-manifest"
            )
    else:
        rest, test = clips, read_manifest(eval_manifest, silent=True)
        known = {words(clip.text) for clip in rest}
        both = [clip for clip in test if words(clip.text) in known]
        if both:
            print(
                f"note: {len(both)} of the {len(test)} texts of {eval_manifest} are also in {manifest} (first: "
                f"{both[0].where}); the result will look better than on new texts",
                file=sys.stderr,
            )
    return Corpus(manifest.stem, *split_validation(rest, test), test)
