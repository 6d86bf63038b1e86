"""The end of a run: results.csv (a line a method, seed and list), report.md and det.png."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import numpy as np

from experiments.asr.runfolder import write_atomically
from experiments.speaker.metrics import eer, mean_and_spread, min_dcf, operating_points
from experiments.speaker.plan import UNSEEN, VALIDATION

Cell = dict[str, Any]
# Okabe and Ito's colours, which remain distinct to the colour-blind; dashes say the same again
STYLES = (("#7F7F7F", ":"), ("#000000", "--"), ("#D55E00", "-"), ("#0072B2", "-."), ("#009E73", (0, (5, 1))))


def rows_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One line for each list of each cell, validation left out."""
    found = []
    for cell in cells:
        for name, labels in cell["labels"].items():
            if name == VALIDATION:
                continue
            scores = cell["scores"][name]
            found.append(
                {key: cell[key] for key in ("method", "title", "seed", "lr", "steps", "batch")}
                | {"list": name, "trials": len(labels), "eer": eer(scores, labels)}
                | {f"min_dcf_{p}": min_dcf(scores, labels, p) for p in (0.01, 0.05)}
                | {k: cell[k] for k in ("adapter_parameters", "head_parameters", "seconds_per_step", "machine")}
            )
    return found


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as a CSV file; numbers to six significant digits."""

    def fill(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    write_atomically(path, fill)


def _figure(values: Sequence[float], factor: float, digits: int) -> str:
    middle, spread = mean_and_spread([factor * value for value in values])
    return f"{middle:.{digits}f}" if np.isnan(spread) else f"{middle:.{digits}f} ± {spread:.{digits}f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a table a list: mean and standard deviation over the seeds."""
    lines = ["# Speaker verification", ""]
    for name in dict.fromkeys(row["list"] for row in rows):
        here = [row for row in rows if row["list"] == name]
        lines += [f"## {name[0].upper()}{name[1:]} ({here[0]['trials']} trials)", ""]
        lines += [
            "| method | EER, % | minDCF 0.01 | minDCF 0.05 | adapter, parameters | head, parameters | s/step | seeds |"
        ]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
        for title in dict.fromkeys(row["title"] for row in here):
            own = [row for row in here if row["title"] == title]
            seconds = [row["seconds_per_step"] for row in own if row["seconds_per_step"] is not None]
            values = [_figure([row["eer"] for row in own], 100, 1)]
            values += [_figure([row[f"min_dcf_{p}"] for row in own], 1, 3) for p in (0.01, 0.05)]
            values += [f"{own[0]['adapter_parameters']:,}", f"{own[0]['head_parameters']:,}"]
            values += [f"{mean(seconds):.2f}" if seconds else "", str(len(own))]
            lines.append(f"| {title} | {' | '.join(values)} |")
        lines.append("")
    used = ", ".join(dict.fromkeys(row["machine"] for row in rows))
    return "\n".join([*lines, f"± is the standard deviation over seeds. {used}.", ""])


def write(cells: Sequence[Cell], folder: Path) -> str:
    """Writes results.csv, report.md and det.png into the folder; returns the Markdown."""
    rows = rows_of(cells)
    write_csv(folder / "results.csv", rows)
    text = table(rows)
    write_atomically(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(folder / "det.png", lambda path: draw(cells, path))
    return text


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Detection error trade-off on unseen speakers (seeds pooled), and the EER of each seed and list."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (det, dots) = plt.subplots(1, 2, figsize=(12.5, 5.5), layout="constrained")
    titles = list(dict.fromkeys(cell["title"] for cell in cells))
    lists = [name for name in cells[0]["labels"] if name != VALIDATION]
    probit = np.vectorize(NormalDist().inv_cdf)
    ticks = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6])
    for number, title in enumerate(titles):
        own = [cell for cell in cells if cell["title"] == title]
        colour, dash = STYLES[number % len(STYLES)]
        scores = np.concatenate([cell["scores"][UNSEEN] for cell in own])
        miss, alarm = operating_points(scores, np.concatenate([cell["labels"][UNSEEN] for cell in own]))
        det.plot(
            *(probit(np.clip(p, 1e-3, 1 - 1e-3)) for p in (alarm, miss)), color=colour, linestyle=dash, label=title
        )
        for place, name in enumerate(lists):
            values = [100 * eer(cell["scores"][name], cell["labels"][name]) for cell in own]
            x = place + 0.13 * (number - (len(titles) - 1) / 2)
            dots.plot([x] * len(values), values, "o", color=colour, markersize=5, alpha=0.8)
            dots.plot([x - 0.05, x + 0.05], [mean(values)] * 2, color=colour, linewidth=2)
    det.plot(*[probit(ticks)] * 2, color="#BBBBBB", linewidth=0.8)
    for set_ticks in (det.set_xticks, det.set_yticks):
        set_ticks(probit(ticks), [f"{100 * tick:g}" for tick in ticks])
    limits = (probit(0.008), probit(0.65))
    det.set(xlabel="false acceptances, %", ylabel="misses, %", xlim=limits, ylim=limits, aspect="equal")
    det.set_title(f"Detection error trade-off, {UNSEEN}", fontsize=11)
    det.legend(loc="lower left", framealpha=0.9, edgecolor="none")
    dots.set_xticks(range(len(lists)), lists)
    dots.set(ylabel="equal error rate, % (lower is better)", ylim=(0, None))
    dots.set_title("Each seed (dot) and their mean (line)", fontsize=11)
    for axes in (det, dots):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
