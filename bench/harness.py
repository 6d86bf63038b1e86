"""Correctness gate, interleaved timing and CSV rows of the benchmarks; knows nothing of SSVD.

A version of an operation is first compared with float64: one whose error is above its bound is refused, and no time
is reported for it. The versions of a case are then timed in turn, repeat by repeat, in two rounds, so that what
disturbs one disturbs all; the two rounds of one version show how far a difference can be trusted.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE = ("T", "d_in", "d_out", "k", "batch")
COLUMNS = (
    *("run", "operation", "version", "backend", "mode", "pass", "timing", "round", "repeats", "dtype", *SHAPE),
    *("p20_ms", "p50_ms", "p80_ms", "flops", "bytes", "floor_ms", "over_floor", "baseline", "over_baseline"),
    *("error", "error_bound", "peak_bytes", "note", "device", "threads", "torch", "triton", "commit"),
)
ROUNDS = 2
Row = dict[str, Any]
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Version:
    """One way to compute an operation. `run` gives the results and gradients whose float64 values are `exact`."""

    name: str
    run: Run
    exact: Sequence[Tensor]
    bound: Sequence[float]  # largest allowed |result - exact| / |exact| of each
    flops: float
    bytes: float
    backend: str = "torch"
    mode: str = ""
    capturable: bool = True  # False: it synchronises with the host, so no CUDA graph can hold it


@dataclass(frozen=True)
class Case:
    """One operation at one shape; `build` makes its data and versions, `baseline` names the one to compare with."""

    operation: str
    dtype: torch.dtype
    build: Callable[[torch.device], list[Version]]
    baseline: str
    T: int | str = ""
    d_in: int | str = ""
    d_out: int | str = ""
    k: int | str = ""
    batch: int | str = ""

    def __str__(self) -> str:
        shape = [f"{name}={getattr(self, name)}" for name in SHAPE if getattr(self, name)]
        return f"{self.operation} {str(self.dtype).removeprefix('torch.')} {' '.join(shape)}"


class Table:
    """A CSV file that grows by one row in one write: whatever was measured survives an interruption."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        header = _csv_line(COLUMNS)
        present = path.read_text().partition("\n")[0] + "\n" if path.exists() else ""
        if present.strip() and present != header:
            raise ValueError(f"out={str(path)!r} has other columns: allowed is a new file, or one of this version")
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


class Clock:
    """Times calls on `device`: CUDA events with the L2 cache flushed before each call, or the host's clock."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.flush: Tensor | None = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(size, 2**26), dtype=torch.int8, device=device)

    def interleaved(self, runs: Sequence[Run], repeats: int) -> list[list[float]]:
        """Milliseconds of each call: `repeats` of every run, taking turns, beginning with another one each time."""
        spans: list[list[Any]] = [[] for _ in runs]
        for repeat in range(repeats):
            for turn in range(len(runs)):
                index = (turn + repeat) % len(runs)
                spans[index].append(self._one(runs[index]))
        if self.flush is None:
            return spans
        torch.cuda.synchronize(self.device)
        return [[start.elapsed_time(end) for start, end in events] for events in spans]

    def _one(self, run: Run) -> Any:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        return begin, end

    @cache  # noqa: B019 - one clock a run
    def ceilings(self, dtype: torch.dtype) -> tuple[float, float]:
        """(FLOP/s of the library's large square product, bytes/s of a large copy, read + write), the best of five."""
        n, size = (8192, 2**31) if self.device.type == "cuda" else (1024, 2**27)
        if self.device.type == "cuda" and dtype == torch.float32:
            n = 4096
        if self.quick:
            n, size = 256, 2**22
        a, b = torch.randn(2, n, n, device=self.device, dtype=dtype)
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        product, copy = self.interleaved([lambda: (a @ b,), lambda: (target.copy_(source),)], 6)
        return 2 * n**3 / (1e-3 * min(product[1:])), 2 * size / (1e-3 * min(copy[1:]))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact|| in float64; infinite for a wrong shape, NaN or infinity in `result`."""
    if result.shape != exact.shape:
        return math.inf
    error = ((result.to(exact) - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()
    return error if math.isfinite(error) else math.inf


def gate(version: Version, results: Sequence[Tensor]) -> tuple[float, float, bool]:
    """(error, bound) of the result nearest to, or furthest beyond, its bound, and whether all are within theirs."""
    pairs = [(relative_error(r, e), bound) for r, e, bound in zip(results, version.exact, version.bound, strict=True)]
    error, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
    return error, bound, error <= bound


def measure(case: Case, clock: Clock, seconds: float, common: Row) -> Iterator[Row]:
    """Yields a row for every measurement of `case`, and one with a note and no time for every refused version."""
    shape = {name: getattr(case, name) for name in ("operation", *SHAPE, "baseline")}
    common = {**dict.fromkeys(COLUMNS, ""), **common, **shape, "pass": "forward+backward", "dtype": str(case.dtype)[6:]}
    groups: dict[str, list[tuple[Version, Run, Row]]] = {"eager": [], "graph": []}
    for version in case.build(clock.device):
        base = {**common, "version": version.name, "backend": version.backend, "mode": version.mode}
        base |= {"flops": f"{version.flops:.6g}", "bytes": f"{version.bytes:.6g}"}
        for timing in ("eager", "graph") if clock.flush is not None and version.capturable else ("eager",):
            row = {**base, "timing": timing}
            try:
                run, row = _checked(version, timing, row, clock.device)
            except Exception as error:  # a version that cannot run must not cost the others their numbers
                lines = str(error).splitlines() or [""]
                yield {**row, "note": f"refused: {type(error).__name__}: {lines[0]}"}
            else:
                if row["note"]:
                    yield row
                else:
                    groups[timing].append((version, run, row))
    for group in groups.values():
        if group:
            yield from _time(case, clock, seconds, group)


def _checked(version: Version, timing: str, row: Row, device: torch.device) -> tuple[Run, Row]:
    """What is to be timed, and the row with its error; its note says so if the result is wrong."""
    row = {**row, "peak_bytes": ""}
    if timing == "graph":
        run = _captured(version.run)
        error, bound, good = gate(version, run())
    else:
        run, before = version.run, _allocated(device)
        with _poisoned():
            results = run()
        if device.type == "cuda":
            row["peak_bytes"] = _peak(device) - before
        error, bound, good = gate(version, results)
    row |= {"error": f"{error:.3g}", "error_bound": f"{bound:.3g}", "note": "" if good else "refused: wrong result"}
    return run, row


def _time(case: Case, clock: Clock, seconds: float, group: list[tuple[Version, Run, Row]]) -> Iterator[Row]:
    runs = [run for _, run, _ in group]
    clock.interleaved(runs, 2)  # warm-up
    once = sum(min(samples) for samples in clock.interleaved(runs, 2))
    repeats = max(5, min(200, round(1e3 * seconds / once)))
    flops_per_s, bytes_per_s = clock.ceilings(case.dtype)
    for number in range(1, ROUNDS + 1):
        times = [torch.tensor(samples, dtype=torch.float64) for samples in clock.interleaved(runs, repeats)]
        medians = {version.name: t.quantile(0.5).item() for (version, _, _), t in zip(group, times)}
        for (version, _, row), samples in zip(group, times):
            p20, p50, p80 = (samples.quantile(q).item() for q in (0.2, 0.5, 0.8))
            floor = 1e3 * max(version.flops / flops_per_s, version.bytes / bytes_per_s)
            row = {**row, "round": number, "repeats": repeats, "floor_ms": f"{floor:.6g}"}
            row |= {"p20_ms": f"{p20:.6g}", "p50_ms": f"{p50:.6g}", "p80_ms": f"{p80:.6g}"}
            row["over_floor"] = f"{p50 / floor:.4g}"
            if case.baseline in medians:
                row["over_baseline"] = f"{p50 / medians[case.baseline]:.4g}"
            yield row


def machine(device: torch.device) -> Row:
    """What every row says of where it was measured."""
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


def _captured(run: Run) -> Run:
    """`run` as the replay of a CUDA graph, so that launch gaps stay out of the time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


@contextmanager
def _poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an element nobody wrote fails the gate."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _csv_line(values: Sequence[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
