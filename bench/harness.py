"""Correctness gate and interleaved timing of the benchmarks; knows nothing of SSVD.

A version of an operation is first compared with float64: one whose error is above its bound is refused, and no time
is reported for it. The versions of a case are then timed in turn, repeat by repeat, in two rounds, so that what
disturbs one disturbs all; the two rounds of one version show how far a difference can be trusted.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.memory import saved_bytes, static_bytes
from bench.records import COLUMNS, SHAPE, Row

WHOLE, FORWARD, BACKWARD = "forward+backward", "forward", "backward"
ROUNDS = 2
MIN_REPEATS = 5
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Passes:
    """y = forward(*leaves) and the gradients of `leaves` for dy, together (a call) or apart.

    within   the context of every pass
    """

    forward: Callable[..., Tensor]
    leaves: Sequence[Tensor]  # the input first
    dy: Tensor
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> tuple[Tensor, ...]:
        with self.within():
            (y,) = self.only_forward()
            return y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)

    def only_forward(self) -> tuple[Tensor, ...]:
        """(y,), with its graph."""
        with self.within():
            return (self.forward(*self.leaves),)

    def only_backward(self) -> Run:
        """The gradients, from a graph that is built once and kept."""
        (y,) = self.only_forward()

        def run() -> tuple[Tensor, ...]:
            with self.within():
                return torch.autograd.grad(y, self.leaves, self.dy, retain_graph=True)

        return run

    def of_input(self, x: Tensor) -> Tensor:
        """y of another input."""
        with self.within():
            return self.forward(x, *self.leaves[1:])


@dataclass(frozen=True)
class Version:
    """One way to compute an operation. `run` gives the results and gradients whose float64 values are `exact`."""

    name: str
    run: Run
    exact: Sequence[Tensor]
    bound: Sequence[float]  # largest allowed |result - exact| / |exact| of each
    flops: float = 0  # 0: not counted, so no floor
    bytes: float = 0
    backend: str = "torch"
    mode: str = ""
    held: Sequence[Tensor] = ()  # parameters, buffers and frozen inputs
    check: Run | None = None  # what the gate looks at, where that is not `run` itself
    saves: Callable[[], tuple[int, int]] | None = None  # `memory.saved_bytes`, where `run` is not `Passes`
    capturable: bool = True  # False: it synchronises with the host, so no CUDA graph can hold it
    compiled: bool = False  # by torch.compile, which guards on the poison and allocates past it
    absent: str = ""  # why there is nothing to run


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
    model: str = ""
    base: torch.dtype | None = None  # of the frozen weights, where that is not `dtype`
    passes: tuple[str, ...] = (WHOLE,)

    def row(self) -> Row:
        """What identifies the case, and its baseline."""
        names = ("operation", *SHAPE, "baseline")
        shape = {name: str(getattr(self, name)) for name in names}
        return {**shape, "dtype": _name(self.dtype), "base": _name(self.base or self.dtype)}

    def __str__(self) -> str:
        row = self.row()
        dtype = row["dtype"] if row["dtype"] == row["base"] else f"{row['dtype']} on {row['base']}"
        return " ".join([self.operation, dtype, *(f"{name}={row[name]}" for name in SHAPE if row[name])])


class Clock:
    """Times calls on `device`: CUDA events with the L2 cache flushed before each call, or the host's clock."""

    def __init__(self, device: torch.device, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.flush: Tensor | None = None
        if device.type == "cuda":
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(size, 2**26), dtype=torch.int8, device=device)

    def interleaved(self, runs: Sequence[Run], repeats: int) -> list[list[float]]:
        """Milliseconds of each call: `repeats` of every run, taking turns in another order each time.

        A fixed order would always give a version the caches that the same predecessor leaves.
        """
        spans: list[list[Any]] = [[] for _ in runs]
        for repeat in range(repeats):
            for index in random.Random(repeat).sample(range(len(runs)), len(runs)):
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
        """(FLOP/s of the library's large square product, bytes/s of a large copy, read + write), the best of ten."""
        n, size = (8192, 2**31) if self.device.type == "cuda" else (2048, 2**27)
        if self.device.type == "cuda" and dtype == torch.float32:
            n = 4096
        if self.quick:
            n, size = 256, 2**22
        a, b = torch.randn(2, n, n, device=self.device, dtype=dtype)
        source = torch.randn(size // 4, device=self.device)
        target = torch.empty_like(source)
        product, copy = self.interleaved([lambda: (a @ b,), lambda: (target.copy_(source),)], 11)
        return 2 * n**3 / (1e-3 * min(product[1:])), 2 * size / (1e-3 * min(copy[1:]))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact|| in float64; infinite for a wrong shape, NaN or infinity in `result`."""
    if result.shape != exact.shape:
        return math.inf
    error = ((result.to(exact) - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()
    return error if math.isfinite(error) else math.inf


def gate(results: Sequence[Tensor], exact: Sequence[Tensor], bound: Sequence[float]) -> tuple[float, float, bool]:
    """(error, bound) of the result nearest to, or furthest beyond, its bound, and whether all are within theirs."""
    pairs = [(relative_error(r, e), allowed) for r, e, allowed in zip(results, exact, bound, strict=True)]
    error, allowed = max(pairs, key=lambda pair: pair[0] / pair[1])
    return error, allowed, error <= allowed


def measure(case: Case, clock: Clock, seconds: float, common: Row) -> Iterator[Row]:
    """Yields a row for every measurement of `case`, and one with a note and no time for every version without one.

    The note begins with "refused" for a wrong or broken version, with "not run" for one that is not there. The row
    that completes the case says so (`last`).
    """
    waiting: Row | None = None
    try:
        for row in _measurements(case, clock, seconds, {**dict.fromkeys(COLUMNS, ""), **common, **case.row()}):
            if waiting is not None:
                yield waiting
            waiting = row
    except BaseException:
        if waiting is not None:
            yield waiting
        raise
    if waiting is not None:
        yield {**waiting, "last": 1}


def _measurements(case: Case, clock: Clock, seconds: float, common: Row) -> Iterator[Row]:
    present = []
    for version in case.build(clock.device):
        row = {**common, "version": version.name, "backend": version.backend, "mode": version.mode}
        if version.absent:
            yield {**row, "note": f"not run: {version.absent}"}
        else:
            present.append((version, row))
    refused: set[int] = set()
    memory: dict[int, Row] = {}
    for name in sorted(case.passes, key=lambda name: name in (FORWARD, BACKWARD)):  # the gate sees everything first
        apart = name in (FORWARD, BACKWARD)
        for timing in ("eager", "graph") if clock.flush is not None and not apart else ("eager",):
            group: list[tuple[Version, Run, Row]] = []
            for index, (version, row) in enumerate(present):
                if index in refused or not _has(version, name, timing):
                    continue
                row |= {"pass": name, "timing": timing}
                try:
                    run, row = _checked(version, name, timing, row, clock.device)
                    if not row["note"] and index not in memory:
                        memory[index] = _memory(version)
                    row |= memory.get(index, {})
                except Exception as error:  # a version that cannot run must not cost the others their numbers
                    lines = str(error).splitlines() or [""]
                    row = {**row, "note": f"refused: {type(error).__name__}: {lines[0]}"}
                if row["note"]:
                    refused |= {index} if timing == "eager" else set()
                    yield row
                else:
                    group.append((version, run, row))
            if group:
                yield from _time(case, clock, seconds, name, group)


def _has(version: Version, name: str, timing: str) -> bool:
    if name in (FORWARD, BACKWARD):  # a compiled backward consumes its graph: it cannot run again on its own
        return isinstance(version.run, Passes) and not (version.compiled and name == BACKWARD)
    return timing == "eager" or version.capturable


def _checked(version: Version, name: str, timing: str, row: Row, device: torch.device) -> tuple[Run, Row]:
    """What is to be timed, and the row with its error and memory; its note says so if the result is wrong."""
    row = {**row, "peak_bytes": ""}
    run, exact, bound = version.run, version.exact, version.bound
    if isinstance(run, Passes) and name == FORWARD:
        run, exact, bound = run.only_forward, exact[:1], bound[:1]
    elif isinstance(run, Passes) and name == BACKWARD:
        run, exact, bound = run.only_backward(), exact[1:], bound[1:]
    if timing == "graph":
        run = _captured(run)
        results = run()
    else:
        before = _allocated(device)
        with nullcontext() if version.compiled else _poisoned():
            results = (version.check or run)()
        if device.type == "cuda":
            if version.check is not None:
                before = _allocated(device)
                run()
            row["peak_bytes"] = _peak(device) - before
    error, allowed, good = gate(results, exact, bound)
    row |= {"error": f"{error:.3g}", "error_bound": f"{allowed:.3g}", "note": "" if good else "refused: wrong result"}
    return run, row


def _memory(version: Version) -> Row:
    if not version.held:
        return {}
    row, saved = {"static_bytes": static_bytes(version.held)}, None
    if version.saves is not None:
        saved = version.saves()
    elif isinstance(version.run, Passes) and not version.compiled:
        run = version.run
        saved = saved_bytes(run.of_input, run.leaves[0], [*version.held, *run.leaves])
    return row if saved is None else {**row, "saved_bytes": saved[0], "input_bytes": saved[1]}


def _time(case: Case, clock: Clock, seconds: float, name: str, group: list[tuple[Version, Run, Row]]) -> Iterator[Row]:
    runs = [run for _, run, _ in group]
    once = sum(min(samples) for samples in clock.interleaved(runs, 2))  # the gate was a warm-up already
    repeats = max(MIN_REPEATS, min(200, round(1e3 * seconds / once)))
    flops_per_s, bytes_per_s = clock.ceilings(case.dtype)
    for number in range(1, ROUNDS + 1):
        times = [torch.tensor(samples, dtype=torch.float64) for samples in clock.interleaved(runs, repeats)]
        medians = {version.name: t.quantile(0.5).item() for (version, _, _), t in zip(group, times)}
        for (version, _, row), samples in zip(group, times):
            p20, p50, p80 = (samples.quantile(q).item() for q in (0.2, 0.5, 0.8))
            row = {**row, "round": number, "repeats": repeats}
            row |= {"p20_ms": f"{p20:.6g}", "p50_ms": f"{p50:.6g}", "p80_ms": f"{p80:.6g}"}
            if version.flops and name not in (FORWARD, BACKWARD):
                floor = 1e3 * max(version.flops / flops_per_s, version.bytes / bytes_per_s)
                row |= {"flops": f"{version.flops:.6g}", "bytes": f"{version.bytes:.6g}"}
                row |= {"floor_ms": f"{floor:.6g}", "over_floor": f"{p50 / floor:.4g}"}
            if case.baseline in medians:
                row["over_baseline"] = f"{p50 / medians[case.baseline]:.4g}"
            yield row


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
