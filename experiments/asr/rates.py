"""Which learning rate suits which rank k: SSVD at several ranks and rates, by the loss on validation speech.

python -m experiments.asr.rates                     several hours on one CPU core; what matters most comes first
python -m experiments.asr.rates --minutes 60        a part of it at a time

Every cell is kept under what it depends on (--runs): the same command goes on where it was stopped, and writes what is
known so far to --out: a table, a CSV file and a picture. Exit status: 0 done, 1 cells failed, 75 unfinished.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.asr import rates_report
from experiments.asr.cell import Cell
from experiments.asr.commands import exit_status
from experiments.asr.experiment import UNFINISHED, Runner, contents
from experiments.asr.fetch import BASE, MODEL, default_data, ensure
from experiments.asr.grid import GRIDS, next_rates
from experiments.asr.rates_report import TRAINING, VALIDATION, Series, Tried, losses_of
from experiments.asr.shifts import parts_of
from experiments.asr.transcribe import pick_device

RULE = 6.3  # of RULE / k^2, which the tuned rates of earlier experiments seemed to follow
FACTOR = 1.5  # between rates
MOST = 12  # rates of one series
HIGHEST, BATCHES = 242, 8  # rank and batches of the gradients
RECIPE = replace(GRIDS["reduced"], longest=4.0)  # with a window of 5 s: a step takes 0.6 times as long as with 10 s
MODELS = {"tiny.en": MODEL, "base": BASE}


def _series(model: str, ranks: Sequence[int], shifts: Sequence[str], **which: Any) -> list[Series]:
    return [Series(model, shift, rank, **which) for shift in shifts for rank in ranks]


SHIFTS = ("child", "telephone", "spanish")
ALL = [  # what matters most first: the lowest and the highest rank
    *_series("tiny.en", (153, 242, 48), SHIFTS[:1]),
    *_series("tiny.en", (242, 48), SHIFTS[1:2]),
    *_series("tiny.en", (153, 242), SHIFTS[:1], by_spectrum=True),
    *_series("tiny.en", (242, 48), SHIFTS[2:]),
    *_series("base", (204, 96), SHIFTS),
    *_series("tiny.en", (153, 242), SHIFTS[1:], by_spectrum=True),
    *_series("tiny.en", (153,), SHIFTS[1:]),
    *_series("tiny.en", (204, 96), SHIFTS),
    *_series("tiny.en", (153, 242, 48), SHIFTS, seed=1),
    *_series("base", (153,), SHIFTS),
    *_series("tiny.en", (204, 96), SHIFTS, seed=1),
]


def _start(series: Series, tried: Tried) -> float:
    """Where to begin: at what is best at the nearest rank, by k^-1.5 from there; else by the rule."""
    known = [other for other in tried if other[:2] == series[:2] and other != series]
    if not known:
        return RULE / series.rank**2
    nearest = min(known, key=lambda other: abs(math.log(other.rank / series.rank)))
    return min(tried[nearest], key=tried[nearest].__getitem__) * (nearest.rank / series.rank) ** 1.5


class Explorer:
    """Trains series at further rates. results: of each series, by learning rate.

    A series is finished when its best rate is inside of those tried, by the loss on validation speech and in training.
    """

    def __init__(self, run: Runner, data: Path, device: str) -> None:
        self.run, self.data, self.device = run, data, device
        self.results: dict[Series, dict[float, Any]] = {}
        self.gradients: dict[tuple[str, str], list[float]] = {}  # by model and shift, see `cell`
        self._contents: dict[str, dict[str, str]] = {}

    def cell(self, series: Series, lr: float) -> Cell:
        model = None if series.model == "tiny.en" else str(self.data / MODELS[series.model])
        if series.model not in self._contents:
            self._contents[series.model] = contents(model, self.data, SHIFTS, RECIPE.longest, source=False)
        return Cell(
            series.shift, "ssvd", None, series.seed, lr, RECIPE.steps, RECIPE.batch, RECIPE.longest, "loss",
            source=False, model=model, device=self.device, contents=self._contents[series.model][series.shift],
            rank=series.rank, window=RECIPE.longest, amp=self.device == "cuda", by_spectrum=series.by_spectrum,
        )  # fmt: skip

    def look(self, model: str, shift: str) -> bool:
        """Whether there was time for the gradients of untrained rotations."""
        series = Series(model, shift, HIGHEST)
        cell = replace(self.cell(series, 0.0), measure="gradient", steps=BATCHES)
        found = self.run([cell], f"gradients of {model}, {shift}")
        self.gradients |= {series[:2]: result["sums"] for result in found.values()}
        return bool(found)

    def finish(self, series: Series) -> bool:
        """Whether its best rates could be found in time."""
        start = _start(series, losses_of(self.results))
        while True:
            known = [losses_of(self.results, which).get(series, {}) for which in (VALIDATION, TRAINING)]
            rates = [lr for losses in known for lr in next_rates(losses, start, FACTOR, MOST)]
            wanted = {self.cell(series, lr): lr for lr in rates}
            if not wanted:
                return True
            found = self.run(list(wanted), f"{series.model} {series.shift} k={series.rank}")
            for cell, result in found.items():
                self.results.setdefault(series, {})[wanted[cell]] = result
            if len(found) < len(wanted):
                return False


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.rates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, default=default_data(), help="data folder (default: $SSVD_DATA or ./data)")
    add("--runs", type=Path, default=Path("runs/asr-cells"), help="folder of the cells (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/asr-rates"), help="folder of table and picture (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="cells at a time (default: one for each CPU core)")
    add("--minutes", type=float, help="begin nothing new, and stop training, after this time; the same command goes on")
    add("--device", default="auto", help="auto, cpu or cuda (default: the GPU if there is one)")
    args = parser.parse_args(argv)
    for name in ("workers", "minutes"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name} must be greater than 0, got {value}")
    return args


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    runner = Runner(args.data, args.runs, args.workers, args.minutes)
    parts = [part for shift in SHIFTS for part in parts_of(shift)]
    ensure(args.data, tuple(dict.fromkeys([*parts, *MODELS.values()])))
    explorer, done = Explorer(runner, args.data, pick_device(args.device).type), True
    try:
        for series in ALL:
            if series[:2] not in explorer.gradients:
                done = explorer.look(*series[:2]) and done
            done = explorer.finish(series) and done
    finally:
        text = rates_report.write(explorer.results, explorer.gradients, RULE, args.out)
    print(f"\n{text}\ntable, cells and picture: {args.out}")
    for cell, error in runner.failed.items():
        print(f"failed: {cell}: {type(error).__name__}: {error}", file=sys.stderr)
    if not done:
        print("not finished: run the same command again to continue", file=sys.stderr)
    return 1 if runner.failed else 0 if done else UNFINISHED


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(partial(run, parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
