"""The rows of a benchmark: their columns, the CSV file they are appended to, and what they say of the machine."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

SHAPE = ("model", "T", "d_in", "d_out", "k", "batch")
MACHINE = ("device", "threads", "torch", "triton")
CASE = ("operation", "dtype", "base", *SHAPE)
COLUMNS = (
    *("run", "operation", "version", "backend", "mode", "pass", "timing", "round", "repeats", "dtype", "base", *SHAPE),
    *("p20_ms", "p50_ms", "p80_ms", "flops", "bytes", "floor_ms", "over_floor", "baseline", "over_baseline"),
    *("error", "error_bound", "static_bytes", "saved_bytes", "input_bytes", "peak_bytes"),
    *("last", "note", *MACHINE, "commit"),
)
Row = dict[str, Any]


class Table:
    """A CSV file that grows by one row in one write: whatever was measured survives an interruption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        header = _csv_line(COLUMNS)
        present = path.read_text().partition("\n")[0] + "\n" if path.exists() else ""
        if present.strip() and present != header:
            raise ValueError(
                f"`out` must be a new file, or one of this version, got {str(path)!r}, which has other columns"
            )
        if not present.strip():
            self._write(header)

    def append(self, row: Row) -> None:
        self._write(_csv_line([row[name] for name in COLUMNS]))

    def _write(self, line: str) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `Table` wrote. Raises ValueError if there is no such file, or it has other columns."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"`file` must be written by bench.run, got {str(path)!r}, which has other columns")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"`file` must be readable, got {str(path)!r}: {error}") from None


def of_each(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """The rows grouped by their values under `names`, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    return groups


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each case on each machine the rows of one run: the latest that completed it, or else the latest."""
    kept: list[Row] = []
    for group in of_each(rows, (*CASE, *MACHINE)).values():
        runs = of_each(group, ("run",))
        kept += runs[max(runs, key=lambda run: (any(row["last"] for row in runs[run]), run))]
    return kept


def machine(device: torch.device) -> Row:
    """What every row says of when and where it was measured."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).parent
    answers = []
    for command in ("rev-parse --short HEAD", "status --porcelain --untracked-files=no -- .. :!results"):
        try:
            done = subprocess.run(["git", *command.split()], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def _csv_line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
