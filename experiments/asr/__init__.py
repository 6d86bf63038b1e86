"""The speech experiment: fine-tunes a Whisper model with SSVD on real speech. Run `python -m experiments.asr.demo`."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class DemoError(Exception):
    """Something the user can put right: the message says what was wrong and what to do."""


_shown = True


def hide_progress() -> None:
    """From now on this process shows no progress bar: a worker, whose parent has one."""
    global _shown
    _shown = False


def progress(items: Any = None, **options: Any) -> tqdm:
    """A progress bar; a line every 20 seconds where stderr is no terminal."""
    return tqdm(items, mininterval=0.1 if sys.stderr.isatty() else 20, disable=not _shown, **options)
