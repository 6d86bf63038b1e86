"""What the curves of strengths say together: a CSV file, tables with 95 % bootstrap intervals, and the figure."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.asr import figures
from experiments.asr.entries import Results, counts, with_interval
from experiments.asr.methods import METHODS
from experiments.asr.runfolder import write_atomically

HOW = {"strength": "alpha K", "weights": "mean of weights", "average": "moving average"}


@dataclass(frozen=True)
class Curve:
    """One method at one learning rate on one shift; `points`: strength -> a result with `scores` for each seed."""

    shift: str
    domain: str
    method: str
    lr: float
    how: str
    points: dict[float, Results]

    @property
    def title(self) -> str:
        return f"{METHODS[self.method].title}, {HOW[self.how]}"

    @property
    def others(self) -> list[str]:
        """The sets of other speakers."""
        return [name for name in self.points[1.0][0]["scores"] if name != "test"]

    def means(self, sets: Sequence[str]) -> dict[float, float]:
        """Strength -> WER in per cent, mean over the seeds."""
        rates = {alpha: [counts(result, sets) for result in results] for alpha, results in self.points.items()}
        return {a: 100 * statistics.fmean(errors.sum() / words.sum() for errors, words in r) for a, r in rates.items()}


def curves(results: Iterable[dict[str, Any]]) -> list[Curve]:
    """The points put together, seeds in order, with the base model at 0; SSVD's two ways are one at 1."""
    base: dict[str, dict[str, Any]] = {}
    found: dict[tuple[Any, ...], dict[float, list[dict[str, Any]]]] = {}
    finished = [result for result in results if "points" in result]
    for result in sorted(finished, key=lambda r: r["cell"]["seed"]):
        cell = result["cell"]
        for point in result["points"]:
            if cell["method"] == "zero-shot":
                base[cell["shift"]] = point
                continue
            ways = ["strength", "weights"] if (point["how"], point["alpha"]) == ("strength", 1) else [point["how"]]
            for how in ways:
                key = (cell["shift"], result["title"], cell["method"], cell["lr"], how)
                found.setdefault(key, {}).setdefault(point["alpha"], []).append(point)
    made = []
    for key, points in found.items():
        if key[0] in base and key[-1] != "average":
            points[0.0] = [base[key[0]]] * len(points[1.0])
        made.append(Curve(*key, dict(sorted(points.items()))))
    methods, ways = list(METHODS), list(HOW)
    return sorted(made, key=lambda c: (c.shift, methods.index(c.method), c.lr, ways.index(c.how)))


def table(of_shift: Sequence[Curve]) -> str:
    """Markdown: every curve's strengths, and what each does to the error rates of the trained model."""
    heads = ["", "learning rate", "alpha", "seeds", "target WER %", "other speakers' WER %", "target: against trained"]
    heads.append("others: against trained")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for curve in of_shift:
        trained = next(c for c in of_shift if (c.method, c.lr, c.how) == (curve.method, curve.lr, "weights"))
        for alpha, results in curve.points.items():
            cells = [curve.title, f"{curve.lr:g}", f"{alpha:g}", str(len(results)) if alpha else ""]
            cells += [with_interval(results, sets) for sets in (["test"], curve.others)]
            same = alpha == 1 and curve.how != "average"
            against = trained.points[1.0]
            cells += ["" if same else with_interval(results, s, against) for s in (["test"], curve.others)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rotations_against_means(of_shift: Sequence[Curve]) -> list[str]:
    """Sentences: SSVD's alpha K minus the plain mean of its weights, at every strength that is measured of both."""
    lines = []
    for curve in of_shift:
        if curve.how != "strength":
            continue
        plain = next(c for c in of_shift if (c.method, c.lr, c.how) == (curve.method, curve.lr, "weights"))
        for alpha in (a for a in curve.points if a not in (0, 1) and a in plain.points):
            target, others = (
                with_interval(curve.points[alpha], sets, plain.points[alpha]) for sets in (["test"], curve.others)
            )
            lines.append(
                f"- alpha K minus mean of weights, lr {curve.lr:g}, alpha {alpha:g}: target {target}, others {others}"
            )
    return lines


def as_csv(found: Sequence[Curve]) -> str:
    """One line for each seed's point."""
    rows = []
    for curve in found:
        for alpha, results in curve.points.items():
            for seed, result in enumerate(results if alpha else results[:1]):
                row: dict[str, Any] = {"shift": curve.shift, "method": curve.method, "lr": curve.lr, "how": curve.how}
                row |= {"alpha": alpha, "seed": seed if alpha else ""}
                for name, sets in (("target", ["test"]), ("others", curve.others)):
                    errors, words = (int(column.sum()) for column in counts(result, sets))
                    row |= {f"{name} wer": round(errors / words, 5), f"{name} errors": errors, f"{name} words": words}
                rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Writes points.csv, tables.md and paths.png into `folder`; returns the tables."""
    found = curves(results)
    if not found:
        return "no trained model has been measured yet"
    parts = []
    for shift in dict.fromkeys(curve.shift for curve in found):
        of_shift = [curve for curve in found if curve.shift == shift]
        first = of_shift[0]
        words = [int(counts(first.points[1.0][0], sets)[1].sum()) for sets in (["test"], first.others)]
        parts += [f"## {first.domain}", "", f"Measured on: target {words[0]} words, other speakers {words[1]} words."]
        parts += ["", table(of_shift), "", *rotations_against_means(of_shift), ""]
    text = "\n".join(parts)
    write_atomically(folder / "points.csv", lambda path: path.write_text(as_csv(found), encoding="utf-8"))
    write_atomically(folder / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
    figures.save(folder / "paths.png", figures.strengths(found))
    return text
