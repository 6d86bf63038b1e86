"""Measured tile sizes, stored in a file: SSVD_TUNING=choices.json.

Without that variable, the tables of tile_sizes.py decide by shape alone, so that equal shapes give equal bits on every
device. With it, the first call with a new shape times every configuration in the kernel's table, and the file stores
the fastest one for this GPU and this Triton version. (The tests check that all configurations compile without spills.)
Later processes read the file. Shapes whose first size (tokens, matrices or rows) rounds up to the same power of two
share a choice.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from ssvd_kernels.ops.kernels.tile_sizes import TileConfig

logger = logging.getLogger(__name__)
Launch = Callable[[TileConfig], object]
VARIABLE = "SSVD_TUNING"


def tuned(
    kernel: str,
    shape: tuple[int, ...],
    table: tuple[TileConfig, ...],
    default: TileConfig,
    like: Tensor,
    launch: Launch,
) -> TileConfig:
    """The configuration of `table` for `kernel` on `shape`: the measured one, else `default`.

    `launch(config)` runs the kernel on its own arguments, any number of times; `like` is a tensor on its device.
    Nothing is measured while a CUDA graph is captured.
    """
    path = os.environ.get(VARIABLE)
    if not path or len(table) == 1 or not like.is_cuda:
        return default
    choices = _choices(path)
    first, *rest = shape
    machine = f"{torch.cuda.get_device_name(like.device)}, triton {triton.__version__}"
    key = f"{machine}: {kernel} {'x'.join(map(str, [1 << max(first - 1, 0).bit_length(), *rest]))}"
    known = next((config for config in table if list(config) == choices.get(key)), None)
    if known is None and not torch.cuda.is_current_stream_capturing():
        known = min(table, key=lambda config: _milliseconds(lambda: launch(config)))
        choices[key] = list(known)
        _write(path, choices)
        logger.info("tuned %s: %s", key, known)
    return known or default


def _milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


@cache
def _choices(path: str) -> dict[str, list[int]]:
    """The choices in the file, as one object a process; none where there is no such file, or no readable one."""
    try:
        found = json.loads(Path(path).read_text())
        if isinstance(found, dict):
            return found
        reason: object = "not a JSON object"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error
    logger.warning("cannot read %s=%s (%s): tuning again", VARIABLE, path, reason)
    return {}


def _write(path: str, choices: dict[str, list[int]]) -> None:
    """Adds `choices` to those that other processes wrote meanwhile, atomically."""
    try:
        merged = {**_choices.__wrapped__(path), **choices}
        with tempfile.NamedTemporaryFile("w", dir=Path(path).parent, suffix=".json", delete=False) as file:
            file.write(json.dumps(merged, indent=1, sort_keys=True))
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("cannot write %s=%s (%s): the choices apply to this process only", VARIABLE, path, error)
