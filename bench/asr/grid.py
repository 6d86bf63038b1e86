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
Trained = tuple[str, str, float | None]  # shift, method, budget


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

    @property
    def trained(self) -> list[Trained]:
        """Every shift and choice that has a learning rate."""
        return [(shift, *c) for shift, choices in self.choices.items() for c in choices if c[0] != "zero-shot"]

    def cells(self, rates: Mapping[Trained, float], **where: Any) -> list[Cell]:
        """All cells; shift by shift and seed by seed, so that an unfinished grid holds what can be compared."""
        return [
            self.cell((shift, *choice), seed, rates.get((shift, *choice), 0.0), **where)
            for shift, choices in self.choices.items()
            for seed in range(self.seeds)
            for choice in choices
            if seed == 0 or choice[0] != "zero-shot"
        ]

    def cell(self, trained: Trained, seed: int, lr: float, **where: Any) -> Cell:
        shift, method, budget = trained
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
        """The grid with each of its methods at these budgets."""
        choices: dict[str, list[Choice]] = {}
        for shift, present in self.choices.items():
            methods = dict.fromkeys(method for method, _ in present)
            wanted = {method: budgets if METHODS[method].budgeted else [None] for method in methods}
            choices[shift] = [(method, budget) for method, at in wanted.items() for budget in at]
        return replace(self, choices=choices)


def _at(budgets: Iterable[float], *methods: str) -> list[Choice]:
    return [(method, budget) for method in methods for budget in budgets]


UNBUDGETED: list[Choice] = [("zero-shot", None), ("full", None)]
CURVES = [*UNBUDGETED, *_at((LOW, MIDDLE), "lora", "ssvd")]
EVERYTHING = [name for name, method in METHODS.items() if method.budgeted]

REDUCED = Grid(
    "reduced",
    {"child": CURVES, "telephone": CURVES, "spanish": CURVES},
    seeds=3,
    steps=36,
    batch=4,
    longest=9.0,
    tuned_as="reduced",
)
GRIDS = {
    "reduced": REDUCED,
    "relatives": replace(REDUCED, name="relatives", choices={"child": [*UNBUDGETED, *_at((MIDDLE,), *EVERYTHING)]}),
    "full": Grid(
        "full",
        {shift: [*UNBUDGETED, *_at((LOW, MIDDLE, HIGH), *EVERYTHING)] for shift in SHIFTS},
        seeds=3,
        steps=240,
        batch=8,
        longest=9.0,
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


def candidates(grid: Grid, tried: Mapping[Trained, Mapping[float, Any]]) -> list[tuple[Trained, float]]:
    """Learning rates to try next: three about the start, then on beyond the edge that is best so far.

    tried: learning rate -> what orders them, the best first.
    """
    wanted = []
    for trained in grid.trained:
        known, start = tried.get(trained, {}), METHODS[trained[1]].lr
        if not known:
            wanted += [(trained, _tidy(start * FACTOR**power)) for power in (-1, 0, 1)]
            continue
        best = min(known, key=lambda lr: known[lr])
        if best in (min(known), max(known)) and len(known) < 3 + ROUNDS:
            wanted.append((trained, _tidy(best * (FACTOR if best == max(known) else 1 / FACTOR))))
    return wanted


def _tidy(lr: float) -> float:
    return float(f"{lr:.1e}")


def tuning_cell(grid: Grid, trained: Trained, lr: float, **where: Any) -> Cell:
    return replace(grid.cell(trained, TUNING_SEED, lr, **where), measure="validation")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _trained(row: Mapping[str, str]) -> Trained:
    return row["shift"], row["method"], float(row["budget"]) if row["budget"] else None


def read_rates(grid: Grid, path: Path = TUNED) -> dict[Trained, float]:
    """The learning rates chosen for this grid. Raises DemoError where one was never tuned, but for the smoke test."""
    rates = {
        _trained(row): float(row["lr"])
        for row in _read(path)
        if row["grid"] == grid.tuned_as and row["chosen"] == "yes"
    }
    for trained in grid.trained:
        if trained in rates:
            continue
        if grid.name != "smoke":
            shift, method, budget = trained
            at = "" if budget is None else f" at {budget:.2%}"
            raise DemoError(f"{path} has no learning rate of {method}{at} on {shift} for the {grid.name} grid: --tune")
        rates[trained] = METHODS[trained[1]].lr
    return rates


def write_rates(rows: Iterable[dict[str, Any]], grid: Grid, path: Path = TUNED) -> None:
    """Replaces the rows of what the grid trains in the table of everything that was tried."""
    mine = set(grid.trained)
    kept = [row for row in _read(path) if row["grid"] != grid.tuned_as or _trained(row) not in mine]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])

    write_atomically(path, write)
