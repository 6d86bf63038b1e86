"""What the cells' results say together: CSV files, a table for each domain shift in the papers' layout, figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.asr import figures
from experiments.asr.entries import Entry, entries, interval, with_interval
from experiments.asr.methods import METHODS
from experiments.asr.runfolder import write_atomically
from experiments.asr.speech import AS_RECORDED

COLUMNS = (
    "method",
    "ranks",
    "trainable",
    "% of model",
    "seeds",
    "WER % (95 % interval)",
    "sd of seeds",
    "CER %",
    "English prompts",
    "other speakers",
    "s/step",
    "peak MiB",
    "adapter kB",
)


Peaks = dict[tuple[str, float | None], int | None]  # method, budget -> bytes


def peaks(results: Iterable[dict[str, Any]]) -> Peaks:
    """What the cells that measure memory found."""
    cells = [(result["cell"], result.get("peak_bytes")) for result in results if result["cell"]["measure"] == "memory"]
    return {(cell["method"], cell["budget"]): peak for cell, peak in cells}


def table(found: Sequence[Entry], memory: Peaks) -> str:
    """Markdown: one row for each method and budget on one shift."""
    rows = [_row(entry, memory.get((entry.method, entry.budget))) for entry in found]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _row(entry: Entry, peak: int | None) -> list[str]:
    trained = entry.method != "zero-shot"
    wers = entry.rates(["test"])
    return [
        entry.title,
        entry.results[0]["ranks"],
        f"{entry.results[0]['trainable']:,}" if trained else "",
        f"{entry.share:.2%}" if trained else "",
        str(len(entry.results)) if trained else "",
        with_interval(entry.results, ["test"]),
        f"{100 * statistics.stdev(wers):.1f}" if len(wers) > 1 else "",
        _percent(entry.rates(["test"], "cer")),
        _percent(entry.rates([AS_RECORDED])) if AS_RECORDED in entry.results[0]["scores"] else "",
        _percent(entry.rates(entry.others)) if entry.others else "",
        f"{statistics.median(s for r in entry.results for s in r['seconds']):.2f}" if trained else "",
        "" if peak is None else f"{peak / 2**20:.0f}",
        f"{entry.results[0]['adapter_bytes'] / 1000:.0f}" if trained else "",
    ]


def _percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f}"


def comparisons(found: Sequence[Entry]) -> list[str]:
    """Sentences: SSVD against LoRA at each budget, and against full fine-tuning, on one shift."""
    by_key = {(entry.method, entry.budget): entry for entry in found}
    lines = []
    for entry in found:
        for other_name in ("lora", "full"):
            other = by_key.get((other_name, entry.budget if other_name == "lora" else None))
            if entry.method != "ssvd" or other is None:
                continue
            mine, theirs = (statistics.fmean(e.rates(["test"])) for e in (entry, other))
            low, high = interval(entry.results, ["test"], other.results)
            lines.append(
                f"- {entry.title} with {entry.share:.2%} of the parameters: {100 * mine:.1f} %, {other.title} "
                f"({other.share:.2%}) {100 * theirs:.1f} %; difference {100 * (mine - theirs):+.1f} points "
                f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
                + (f", ratio {mine / theirs:.2f}" if theirs else "")
            )
    return lines


def diverged(results: Iterable[dict[str, Any]]) -> list[str]:
    """Sentences: the runs that the tables lack because training did not stay finite."""
    cells = [result["cell"] for result in results if result.get("diverged")]
    return [
        f"- diverged: {METHODS[cell['method']].title}, budget {cell['budget']}, on {cell['shift']}, seed {cell['seed']}"
        for cell in cells
    ]


def as_csv(results: Iterable[dict[str, Any]], memory: Peaks) -> str:
    """One line a cell, with the error rates of every set."""
    rows = []
    for result in results:
        cell = {key: value for key, value in result["cell"].items() if key not in ("measure", "limit")}
        row = {**cell, **{key: result[key] for key in ("trainable", "total", "ranks", "adapter_bytes")}}
        row["peak_bytes"] = memory.get((cell["method"], cell["budget"]))
        row["seconds/step"] = round(statistics.median(result["seconds"]), 4) if result["seconds"] else ""
        row["last losses"] = round(statistics.fmean(result["losses"][-5:]), 4) if result["losses"] else ""
        for name, score in result["scores"].items():
            row |= {f"{name} wer": round(score["wer"], 5), f"{name} cer": round(score["cer"], 5)}
            row |= {f"{name} errors": score["errors"], f"{name} words": score["words"]}
        rows.append({**row, "machine": result["machine"], "finished": result["finished"]})
    fields = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, fields, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write(results: Sequence[dict[str, Any]], folder: Path) -> str:
    """Writes cells.csv, tables.md and the figures into `folder`; returns the tables."""
    found, memory = entries(results), peaks(results)
    ordered = [result for entry in found for result in entry.results]
    parts = []
    for shift in dict.fromkeys(entry.shift for entry in found):
        of_shift = [entry for entry in found if entry.shift == shift]
        words = {name: score["words"] for name, score in of_shift[0].results[0]["scores"].items()}
        sizes = ", ".join(f"{name} {count} words" for name, count in words.items())
        parts += [f"## {of_shift[0].domain}", "", f"Measured on: {sizes}.", "", table(of_shift, memory), ""]
        parts += [*comparisons(of_shift), ""]
    text = "\n".join([*parts, *diverged(results)])
    write_atomically(folder / "cells.csv", lambda path: path.write_text(as_csv(ordered, memory), encoding="utf-8"))
    write_atomically(folder / "tables.md", lambda path: path.write_text(text, encoding="utf-8"))
    for name, draw in figures.FIGURES.items():
        figures.save(folder / f"{name}.png", draw(found))
    return text
