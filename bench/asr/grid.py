"""Which cells an experiment has, and the learning rate of each: tuned on validation speech, never on test speech."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import DemoError
from .cell import Cell
from .methods import METHODS
from .runfolder import write_atomically
from .shifts import SHIFTS

TUNED = Path(__file__).with_name("results") / "tuned.csv"
TUNING_SEED, FACTOR, ROUNDS = 100, 3.0, 3
COLUMNS = ("grid", "shift", "method", "budget", "steps", "lr", "validation wer", "validation loss", "chosen")
LOW, MIDDLE, HIGH = 0.006, 0.02, 0.05

Choice = tuple[str, float | None]  # method, budget


@dataclass(frozen=True)
class Grid:
    """`choices` of each shift are trained with every seed."""

    name: str
    choices: Mapping[str, Sequence[Choice]]
    seeds: int
    steps: int
    batch: int
    longest: float  # seconds: longer clips are left out
    tuned_as: str  # the name of its learning rates: grids of one recipe share them
    limit: int | None = None
    tuning_budget: float = 0.02

    def cells(self, rates: Mapping[tuple[str, str], float], **where: Any) -> list[Cell]:
        """All cells; shift by shift and seed by seed, so that an unfinished grid holds what can be compared."""
        return [
            self.cell(shift, choice, seed, rates[shift, choice[0]], **where)
            for shift, choices in self.choices.items()
            for seed in range(self.seeds)
            for choice in choices
            if seed == 0 or choice[0] != "zero-shot"
        ]

    def cell(self, shift: str, choice: Choice, seed: int, lr: float, **where: Any) -> Cell:
        method, budget = choice
        return Cell(shift, method, budget, seed, lr, self.steps, self.batch, self.longest, limit=self.limit, **where)

    def restricted(self, shifts: Sequence[str], methods: Sequence[str]) -> Grid:
        """The part of the grid with these shifts and methods; zero-shot and empty lists mean all."""
        kept = {
            shift: [c for c in choices if not methods or c[0] in ("zero-shot", *methods)]
            for shift, choices in self.choices.items()
            if not shifts or shift in shifts
        }
        if not any(method != "zero-shot" for choices in kept.values() for method, _ in choices):
            raise DemoError(
                f"--shifts {' '.join(shifts)} --methods {' '.join(methods)}: the {self.name} grid has no such cell; "
                f"it has the shifts {', '.join(self.choices)}"
            )
        return replace(self, choices=kept)

    def at(self, budgets: Sequence[float]) -> Grid:
        """The grid with each of its methods at these budgets; learning rates are tuned at the highest."""
        choices: dict[str, list[Choice]] = {}
        for shift, present in self.choices.items():
            methods = dict.fromkeys(method for method, _ in present)
            wanted = {method: budgets if METHODS[method].budgeted else [None] for method in methods}
            choices[shift] = [(method, budget) for method, at in wanted.items() for budget in at]
        return replace(self, choices=choices, tuning_budget=max(budgets))


def _at(budgets: Iterable[float], *methods: str) -> list[Choice]:
    return [(method, budget) for method in methods for budget in budgets]


UNBUDGETED: list[Choice] = [("zero-shot", None), ("full", None)]
CURVES = [*UNBUDGETED, *_at((LOW, MIDDLE), "lora", "ssvd")]
RELATIVES = ("dora", "pissa", "svft", "spectralft", "ssvd-linear", "ssvd-free", "ssvd-o", "ssvd-o-25", "ssvd-o-75")
EVERYTHING = [name for name, method in METHODS.items() if method.budgeted]

REDUCED = Grid(
    "reduced",
    {"child": CURVES, "telephone": CURVES, "spanish": CURVES},
    seeds=3,
    steps=40,
    batch=4,
    longest=5.0,
    tuned_as="reduced",
)
GRIDS = {
    "reduced": REDUCED,
    "relatives": replace(REDUCED, name="relatives", choices={"child": [*CURVES, *_at((MIDDLE,), *RELATIVES)]}),
    "full": Grid(
        "full",
        {shift: [*UNBUDGETED, *_at((LOW, MIDDLE, HIGH), *EVERYTHING)] for shift in SHIFTS},
        seeds=3,
        steps=240,
        batch=8,
        longest=8.5,
        tuned_as="full",
    ),
    "smoke": Grid(
        "smoke",
        {"child": [*UNBUDGETED, *_at((MIDDLE,), *EVERYTHING)]},
        seeds=1,
        steps=1,
        batch=2,
        longest=3.0,
        tuned_as="reduced",
        limit=2,
    ),
}


def candidates(grid: Grid, tried: Mapping[tuple[str, str], Mapping[float, Any]]) -> list[tuple[str, str, float]]:
    """(shift, method, learning rate) to try next: three about the start, then on beyond the edge that is best so far.

    tried: (shift, method) -> learning rate -> what orders them, the best first.
    """
    wanted = []
    for shift, choices in grid.choices.items():
        for method in dict.fromkeys(name for name, _ in choices if name != "zero-shot"):
            known = tried.get((shift, method), {})
            start = METHODS[method].lr
            if not known:
                wanted += [(shift, method, _tidy(start * FACTOR**power)) for power in (-1, 0, 1)]
                continue
            best = min(known, key=lambda lr: known[lr])
            if best in (min(known), max(known)) and len(known) < 3 + ROUNDS:
                wanted.append((shift, method, _tidy(best * (FACTOR if best == max(known) else 1 / FACTOR))))
    return wanted


def _tidy(lr: float) -> float:
    return float(f"{lr:.1e}")


def tuning_cell(grid: Grid, shift: str, method: str, lr: float, **where: Any) -> Cell:
    budget = grid.tuning_budget if METHODS[method].budgeted else None
    return replace(grid.cell(shift, (method, budget), TUNING_SEED, lr, **where), measure="validation")


def read_rates(grid: Grid, path: Path = TUNED) -> dict[tuple[str, str], float]:
    """(shift, method) -> the learning rate chosen for this grid. Raises DemoError where one was never tuned."""
    rates = {}
    if path.is_file():
        with path.open(newline="") as stream:
            for row in csv.DictReader(stream):
                if row["grid"] == grid.tuned_as and row["chosen"] == "yes":
                    rates[row["shift"], row["method"]] = float(row["lr"])
    for shift, choices in grid.choices.items():
        for method, _ in choices:
            if method == "zero-shot":
                rates[shift, method] = 0.0
            elif (shift, method) not in rates and grid.name == "smoke":
                rates[shift, method] = METHODS[method].lr
            elif (shift, method) not in rates:
                raise DemoError(f"{path} has no learning rate of {method} on {shift} for the {grid.name} grid: --tune")
    return rates


def write_rates(rows: Iterable[dict[str, Any]], grid: Grid, path: Path = TUNED) -> None:
    """Replaces the rows of the grid's methods in the table of everything that was tried."""
    mine = {(grid.tuned_as, shift, method) for shift, choices in grid.choices.items() for method, _ in choices}
    kept = []
    if path.is_file():
        with path.open(newline="") as stream:
            kept = [row for row in csv.DictReader(stream) if (row["grid"], row["shift"], row["method"]) not in mine]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])

    write_atomically(path, write)
