"""The folder of one run: files written whole or not at all, evaluations kept under what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.asr import DemoError

SETTINGS, CHECKPOINT, ADAPTER = "settings.json", "checkpoint.pt", "adapter.safetensors"


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a neighbour of `path`, which then takes its place: a killed process leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise DemoError(f"{path}: cannot be written ({error}); is there room on the disk?") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises DemoError unless the folder can be made and written to, before the work that fills it."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DemoError(f"{folder}: nothing can be written there, because of {there}")


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class RunFolder:
    """`folder` belongs to one set of `settings`; another set is refused with the names of what differs."""

    def __init__(self, folder: Path, settings: dict[str, Any], fresh: bool = False, resume: bool = False) -> None:
        self.path, self.settings = folder, settings
        if resume and not (folder / CHECKPOINT).is_file():
            raise DemoError(f"--resume requires a {CHECKPOINT} in {folder}; leave the option out to start there")
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (SETTINGS, CHECKPOINT, ADAPTER):
                (folder / name).unlink(missing_ok=True)
        known = folder / SETTINGS
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            differing = [
                f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now"
                for key in sorted(before.keys() | settings.keys())
                if before.get(key) != settings.get(key)
            ]
            if differing:
                raise DemoError(
                    f"{folder} contains a run with other settings ({'; '.join(differing)}): give another --out, "
                    "or --fresh to start again there"
                )
        else:
            write_json(known, settings)

    def transcripts(self, what: str, key: dict[str, Any], compute: Callable[[], list[str]]) -> list[str]:
        """The kept transcripts of this evaluation, or new ones; `key` names everything they depend on."""
        path = self.path / "evaluations" / f"{what.replace(' ', '-')}-{short_hash(key)}.json"
        if path.is_file():
            kept: list[str] = json.loads(path.read_text(encoding="utf-8"))["transcripts"]
            return kept
        found = compute()
        write_json(path, {"what": what, "key": key, "transcripts": found})
        return found

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        write_atomically(self.path / CHECKPOINT, lambda temporary: torch.save(state, temporary))

    def load_checkpoint(self) -> dict[str, Any] | None:
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises nearly anything on a damaged file
            why = type(error).__name__
            raise DemoError(f"{path}: cannot be read ({why}); delete it, or give --fresh, to start again") from error
        return state
