"""Which cells an experiment has, and the learning rate of each: tuned on validation speech, never on test speech."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.asr import DemoError
from experiments.asr.cell import MEMORY_STEPS, Cell
from experiments.asr.methods import METHODS
from experiments.asr.runfolder import write_atomically
from experiments.asr.shifts import SHIFTS
from ssvd_kernels.model.parameter_groups import EXPONENT

TUNED = Path(__file__).with_name("results") / "tuned.csv"
TUNING_SEED, FACTOR, ROUNDS = 100, 3.0, 3
RECIPE = ("model", "steps", "batch", "longest")  # what learning rates are tuned for
COLUMNS = (*RECIPE, "shift", "method", "budget", "lr", "validation wer", "validation loss", "chosen")
LOW, MIDDLE, HIGH = 0.006, 0.02, 0.05

Choice = tuple[str, float | None]  # method, budget
Trained = tuple[str, str, float | None]  # shift, method, budget
Where = Mapping[str, Mapping[str, Any]]  # shift -> further fields of its cells


@dataclass(frozen=True)
class Grid:
    """`choices` of each shift are trained with every seed."""

    name: str
    choices: Mapping[str, Sequence[Choice]]
    seeds: int
    steps: int
    batch: int
    longest: float  # seconds: longer clips are left out
    limit: int | None = None
    tuned: bool = True  # whether its learning rates are, or those that tuning starts with
    model: str | None = None

    @property
    def trained(self) -> list[Trained]:
        """Every shift and choice that has a learning rate."""
        return [(shift, *c) for shift, choices in self.choices.items() for c in choices if c[0] != "zero-shot"]

    @property
    def recipe(self) -> dict[str, str]:
        """RECIPE, as tables have it."""
        return {name: str(getattr(self, name) or "") for name in RECIPE}

    def cells(self, rates: Mapping[Trained, float], where: Where) -> list[Cell]:
        """All cells; shift by shift and seed by seed, so that an unfinished grid holds what can be compared."""
        return [
            self.cell((shift, *choice), seed, rates.get((shift, *choice), 0.0), where)
            for shift, choices in self.choices.items()
            for seed in range(self.seeds)
            for choice in choices
            if seed == 0 or choice[0] != "zero-shot"
        ]

    def memory_cells(self, where: Where) -> list[Cell]:
        """One of each method and budget, on the first shift that has them."""
        first: dict[Choice, Trained] = {}
        for trained in self.trained:
            first.setdefault(trained[1:], trained)
        cells = [self.cell(trained, 0, 1e-6, where) for trained in first.values()]
        return [replace(cell, measure="memory", steps=MEMORY_STEPS) for cell in cells]

    def cell(self, trained: Trained, seed: int, lr: float, where: Where) -> Cell:
        shift, method, budget = trained
        recipe = {name: getattr(self, name) for name in (*RECIPE, "limit")}
        return Cell(shift, method, budget, seed, lr, **recipe, **where.get(shift, {}))

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
SIDES = ("ssvd", "ssvd-output", "ssvd-o")
EVERYTHING = [name for name, method in METHODS.items() if method.budgeted]

REDUCED = Grid(
    "reduced",
    {"child": CURVES, "telephone": CURVES, "spanish": CURVES},
    seeds=3,
    steps=36,
    batch=4,
    longest=9.0,
)
EVERY_BUDGET = [*_at((LOW, MIDDLE, HIGH), *(name for name in EVERYTHING if name != "vera")), ("vera", MIDDLE)]
GRIDS = {
    "reduced": REDUCED,
    "relatives": replace(
        REDUCED,
        name="relatives",
        choices={
            "telephone": [*UNBUDGETED, *_at((MIDDLE,), "lora", *SIDES), ("ssvd", HIGH)],
            "spanish": [*UNBUDGETED, *_at((MIDDLE,), "lora", *SIDES)],
            "child": [*UNBUDGETED, *_at((MIDDLE,), *EVERYTHING)],
        },
    ),
    "full": Grid(
        "full",
        {shift: [*UNBUDGETED, *EVERY_BUDGET] for shift in SHIFTS},
        seeds=3,
        steps=240,
        batch=8,
        longest=9.0,
    ),
    "smoke": Grid(
        "smoke",
        {"child": [*UNBUDGETED, *_at((MIDDLE,), *EVERYTHING)]},
        seeds=1,
        steps=1,
        batch=2,
        longest=3.0,
        limit=2,
        tuned=False,
    ),
}


def candidates(grid: Grid, tried: Mapping[Trained, Mapping[float, Any]]) -> list[tuple[Trained, float]]:
    """Learning rates to try next: three about the start, then on beyond the edge that is best so far.

    tried: learning rate -> what orders them, the best first.
    """
    wanted = []
    for trained in grid.trained:
        wanted += [(trained, lr) for lr in next_rates(tried.get(trained, {}), starting_rate(*trained[1:]))]
    return wanted


def starting_rate(method: str, budget: float | None) -> float:
    """METHODS' learning rate; of SSVD, whose rank goes by the root of the budget, as `sk.parameter_groups` has it."""
    how = METHODS[method]
    if budget is None or (how.arguments or {}).get("method") not in ("ssvd", "ssvd-o"):
        return how.lr
    return how.lr * (MIDDLE / budget) ** (EXPONENT / 2)


def next_rates(known: Mapping[float, Any], start: float, factor: float = FACTOR, most: int = 3 + ROUNDS) -> list[float]:
    """Those of `candidates` for one choice: at first three, `factor` apart; at most `most` altogether."""
    if not known:
        return [_tidy(start * factor**power) for power in (-1, 0, 1)]
    best = min(known, key=lambda lr: known[lr])
    if best not in (min(known), max(known)) or len(known) >= most:
        return []
    return [_tidy(best * (factor if best == max(known) else 1 / factor))]


def _tidy(lr: float) -> float:
    return float(f"{lr:.1e}")


def tuning_cell(grid: Grid, trained: Trained, lr: float, where: Where) -> Cell:
    return replace(grid.cell(trained, TUNING_SEED, lr, where), measure="validation")


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _trained(row: Mapping[str, str]) -> Trained:
    return row["shift"], row["method"], float(row["budget"]) if row["budget"] else None


def read_rates(grid: Grid, path: Path = TUNED) -> dict[Trained, float]:
    """The learning rates chosen for this grid's recipe. Raises DemoError where one was never tuned."""
    if not grid.tuned:
        return {trained: starting_rate(*trained[1:]) for trained in grid.trained}
    rates = {_trained(row): float(row["lr"]) for row in _read(path) if row["chosen"] and _recipe(row) == grid.recipe}
    for trained in grid.trained:
        if trained not in rates:
            shift, method, budget = trained
            at = "" if budget is None else f" at {budget:.2%}"
            recipe = ", ".join(f"{name} {value}" for name, value in grid.recipe.items() if value)
            raise DemoError(f"{path} has no learning rate of {method}{at} on {shift} for {recipe}: --tune")
    return rates


def _recipe(row: Mapping[str, str]) -> dict[str, str]:
    return {name: row[name] for name in RECIPE}


def write_rates(rows: Iterable[dict[str, Any]], grid: Grid, path: Path = TUNED) -> None:
    """Replaces the rows of what the grid trains in the table of everything that was tried."""
    mine = set(grid.trained)
    kept = [row for row in _read(path) if _recipe(row) != grid.recipe or _trained(row) not in mine]
    rows = [{**grid.recipe, **row} for row in rows]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])

    write_atomically(path, write)
