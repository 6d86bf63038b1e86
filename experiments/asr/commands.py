"""What the command lines of the experiments have in common: how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

import transformers

from experiments.asr import DemoError
from experiments.asr.train import Interrupted


def exit_status(run: Callable[[], int]) -> int:
    """`run()`; where it is stopped 130, and 2 for what the user can put right, both with a message on stderr."""
    transformers.logging.set_verbosity_error()
    try:
        return run()
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"\n{str(stop) or 'stopped'}; run the same command again to continue", file=sys.stderr)
        return 130
    except (DemoError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
