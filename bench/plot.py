"""Figures from a CSV file of `bench.run` alone: `python -m bench.plot FILE.csv` draws NAME-*.png beside it.

    layer      time of a layer over the frozen linear's against T, a panel a shape, a line a version
    cayley     speed-up of the Cayley map over torch.linalg.solve
    model      time of a model's training step over the frozen base's
    memory     static and saved bytes of a layer
    crossover  composed against factored across T

One machine a set of figures; those of a second machine in the file are called NAME-*-2.png.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.harness import WHOLE
from bench.records import MACHINE, Row, latest, of_each, read_rows

# Okabe and Ito's colours, which remain distinct to the colour-blind; markers and dashes say the same again.
STYLES = {
    "ssvd": ("#D55E00", "o", "-"),
    "naive": ("#0072B2", "s", "-"),
    "naive compiled": ("#0072B2", "s", ":"),
    "rebuilt weight": ("#009E73", "^", "-"),
    "rebuilt weight compiled": ("#009E73", "^", ":"),
    "full fine-tuning": ("#000000", "D", "--"),
    "LoRA r16": ("#56B4E9", "v", "-"),
    "LoRA r32": ("#56B4E9", "<", "--"),
    "OFT": ("#CC79A7", "P", "-"),
    "PSOFT": ("#E69F00", "X", "-"),
    "frozen linear": ("#7F7F7F", ".", "-"),
    "linalg.solve": ("#7F7F7F", ".", "-"),
    "parametrizations.orthogonal": ("#56B4E9", "v", "-"),
    "ssvd reference": ("#0072B2", "s", "-"),
    "ssvd ext": ("#D55E00", "o", "-"),
    "ssvd triton": ("#009E73", "^", "-"),
    "composed": ("#009E73", "^", "-"),
    "factored": ("#E69F00", "s", "--"),
    "activation": ("#CC79A7", "D", "-"),
    "auto": ("#D55E00", "o", ":"),
}
MEMORY_T = 4096
Times = dict[str, list[tuple[float, float]]]  # version -> points


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.csv")
    path = parser.parse_args(argv).file
    try:
        rows = [row for row in latest(read_rows(path)) if not row["note"]]
    except ValueError as error:
        parser.error(str(error))
    for number, group in enumerate(of_each(rows, MACHINE).values(), start=1):
        for name, draw in FIGURES.items():
            target = path.with_name(f"{path.stem}-{name}{'' if number == 1 else f'-{number}'}.png")
            figure = draw(group)
            if figure is None:
                print(f"{target.name}: not drawn, because {path.name} has no rows for it")
            else:
                figure.savefig(target, dpi=130, bbox_inches="tight")
                print(f"{target} is drawn")
    if not rows:
        print(f"{path.name} has no measurement: nothing is drawn")
    return 0


def layer_figure(rows: Sequence[Row]) -> Any:
    def lines(panel: Sequence[Row]) -> Times:
        return _over(panel, "frozen linear", lambda row: row["version"] if _main(row) else None)

    panels = {title: lines(panel) for title, panel in _layer_panels(rows).items()}
    return _line_panels(panels, "Layer, forward + backward: time over the frozen linear's", rows)


def crossover_figure(rows: Sequence[Row]) -> Any:
    def lines(panel: Sequence[Row]) -> Times:
        found = _over(panel, "frozen linear", lambda row: _mode(row) if row["version"] == "ssvd" else None)
        return found if {"composed", "factored"} <= set(found) else {}

    panels = {title: lines(panel) for title, panel in _layer_panels(rows).items()}
    return _line_panels(panels, "SSVD layer, composed against factored: time over the frozen linear's", rows)


def cayley_figure(rows: Sequence[Row]) -> Any:
    groups: dict[str, dict[str, float]] = {}
    for (batch, k), some in of_each((row for row in rows if row["operation"] == "cayley"), ("batch", "k")).items():
        times = _means(some, _rotation)
        if "linalg.solve" in times:
            base = times["linalg.solve"]
            groups[f"{batch} x {k}"] = {name: base / time for name, time in times.items() if name != "linalg.solve"}
    if not groups:
        return None
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, ((axes,),) = _figure(1, "Cayley map, forward + backward: speed-up over torch.linalg.solve", rows, 7)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(groups))]
        bars = axes.bar(places, [group.get(name, math.nan) for group in groups.values()], width * 0.92, label=name,
                        color=STYLES[name][0])  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1, color="#7F7F7F", linewidth=1)
    axes.set(xticks=range(len(groups)), xticklabels=list(groups), xlabel="batch x k", ylabel="times as fast")
    axes.margins(y=0.12)
    return _legend(figure)


def _rotation(row: Row) -> str:
    if row["version"] != "ssvd":
        return row["version"]
    return f"ssvd {row['backend']}"


def model_figure(rows: Sequence[Row]) -> Any:
    panels = {}
    for (name, dtype, T), some in of_each(
        (r for r in rows if r["operation"] == "model"), ("model", "dtype", "T")
    ).items():
        times = _means(some, lambda row: f"ssvd, {row['mode']}" if row["version"] == "ssvd" else row["version"])
        if "frozen linear" in times:
            base = times["frozen linear"]
            panels[f"{name} blocks, T = {T}, {dtype}"] = {label: [time / base] for label, time in times.items()}
    title = "Training step of a model's blocks: time over the frozen base's"
    return _bar_panels(panels, ["time"], title, "frozen base = 1 (forward and backward to the input)", rows)


def memory_figure(rows: Sequence[Row]) -> Any:
    mine = [
        r for r in rows if r["operation"] == "layer" and r["pass"] == WHOLE and r["saved_bytes"] and r["round"] == "1"
    ]
    if not mine:
        return None
    tokens = {int(row["T"]) for row in mine}
    T = MEMORY_T if MEMORY_T in tokens else max(tokens)
    panels = {}
    for title, panel in _layer_panels([row for row in mine if int(row["T"]) == T]).items():
        panels[f"{title}, T = {T}"] = {
            _mode_label(row): [float(row[name]) / 1e6 for name in ("static_bytes", "saved_bytes", "input_bytes")]
            for row in panel
            if row["backend"] != "reference"
        }
    parts = ["static (parameters, buffers)", "saved for backward", "input kept"]
    return _bar_panels(panels, parts, "Memory of a layer", "MB", rows)


FIGURES: dict[str, Callable[[Sequence[Row]], Any]] = {
    "layer": layer_figure,
    "cayley": cayley_figure,
    "model": model_figure,
    "memory": memory_figure,
    "crossover": crossover_figure,
}


def _layer_panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    mine = [row for row in rows if row["operation"] == "layer" and row["pass"] == WHOLE and row["timing"] == "eager"]
    titles = {}
    for (d_in, d_out, k, dtype, base), panel in of_each(mine, ("d_in", "d_out", "k", "dtype", "base")).items():
        mixed = dtype if dtype == base else f"{dtype} on {base}"
        titles[f"{d_in} to {d_out}, k = {k}, {mixed}"] = panel
    return titles


def _over(panel: Sequence[Row], baseline: str, name_of: Callable[[Row], str | None]) -> Times:
    lines: Times = {}
    for (T,), some in sorted(of_each(panel, ("T",)).items(), key=lambda item: int(item[0][0])):
        times = _means(some, name_of)
        base = _means(some, lambda row: row["version"]).get(baseline)
        for name, time in times.items():
            if base is not None and name != baseline:
                lines.setdefault(name, []).append((int(T), time / base))
    return lines


def _means(rows: Sequence[Row], name_of: Callable[[Row], str | None]) -> dict[str, float]:
    """Mean of the rounds' medians by name, eager; None leaves a row out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        name = name_of(row) if row["timing"] == "eager" else None
        if name is not None:
            found.setdefault(name, []).append(float(row["p50_ms"]))
    return {name: mean(times) for name, times in found.items()}


def _main(row: Row) -> bool:
    return row["version"] != "ssvd" or (row["backend"] == "auto" and row["mode"].startswith("auto"))


def _mode(row: Row) -> str | None:
    return row["mode"].partition(" ")[0] if row["backend"] == "auto" else None


def _mode_label(row: Row) -> str:
    return f"ssvd, {row['mode']}" if row["version"] == "ssvd" else row["version"]


def _line_panels(panels: dict[str, Times], title: str, rows: Sequence[Row]) -> Any:
    panels = {name: lines for name, lines in panels.items() if lines}
    if not panels:
        return None
    figure, grid = _figure(len(panels), title, rows, 4.2)
    for axes, (name, lines) in zip((axes for line in grid for axes in line), panels.items()):
        axes.axhline(1, color="#7F7F7F", linewidth=1.2)
        for version, points in lines.items():
            colour, marker, dashes = STYLES[version]
            front = 3 if version == "ssvd" else 2
            axes.plot(*zip(*points), color=colour, marker=marker, linestyle=dashes, markersize=5, label=version,
                      linewidth=2.2 if front == 3 else 1.3, zorder=front)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        tokens = sorted({T for points in lines.values() for T, _ in points})
        axes.set_xticks(tokens, [f"{T:g}" for T in tokens], fontsize=7)
        axes.minorticks_off()
        highest = max(y for points in lines.values() for _, y in points)
        lowest = min(1.0, *(y for points in lines.values() for _, y in points))
        ticks = [y for y in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if lowest / 2 < y < 2 * highest]
        axes.set_yticks(ticks, [f"{y:g}" for y in ticks])
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("T (tokens)")
        axes.grid(alpha=0.25)
    grid[0][0].set_ylabel("frozen linear = 1 (grey)")
    return _legend(figure)


def _bar_panels(
    panels: dict[str, dict[str, list[float]]], parts: Sequence[str], title: str, label: str, rows: Sequence[Row]
) -> Any:
    """Horizontal bars, stacked by `parts`, the sum written behind."""
    if not panels:
        return None
    figure, grid = _figure(len(panels), title, rows, 5.2)
    for axes, (name, bars) in zip((axes for line in grid for axes in line), panels.items()):
        left = [0.0] * len(bars)
        for part, colour in zip(range(len(parts)), ("#0072B2", "#E69F00", "#56B4E9")):
            values = [bar[part] for bar in bars.values()]
            highlight = [STYLES["ssvd"][0] if bar.startswith("ssvd") else colour for bar in bars]
            drawn = axes.barh(list(bars), values, left=left, label=parts[part],
                              color=highlight if len(parts) == 1 else colour)  # fmt: skip
            left = [a + b for a, b in zip(left, values)]
        axes.bar_label(drawn, [f"{total:.3g}" for total in left], fontsize=7, padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
    return _legend(figure) if len(parts) > 1 else figure


def _figure(panels: int, title: str, rows: Sequence[Row], width: float) -> tuple[Any, Any]:
    """An empty figure of so many panels, at most three a line, under a title that names the machine."""
    from matplotlib.figure import Figure  # without pyplot: Agg, and no state

    columns = min(3, panels)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, 3.6 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in [axes for line in grid for axes in line][panels:]:
        axes.set_visible(False)
    for axes in (axes for line in grid for axes in line):
        axes.spines[["top", "right"]].set_visible(False)
    about, dtypes = rows[0], ", ".join(sorted({row["dtype"] for row in rows}))
    where = f"{about['device']}, {about['threads']} CPU threads, torch {about['torch']}, {dtypes}"
    figure.suptitle(f"{title}\n{where}", fontsize=10)
    return figure, grid


def _legend(figure: Any) -> Any:
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            found.setdefault(name, handle)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(6, len(found)), fontsize=8,
                  frameon=False)  # fmt: skip
    return figure


if __name__ == "__main__":
    sys.exit(main())
