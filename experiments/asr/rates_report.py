"""What the losses at several ranks and learning rates say: best rates, their exponent, and rules compared."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.asr.grid import TUNED
from experiments.asr.runfolder import write_atomically

COLUMNS = (
    *("model", "shift", "rank", "seed", "by spectrum", "lr", "validation loss", "training loss"),
    *("trainable", "machine"),
)
RANKS = (48, 96, 153, 204, 242)  # between which the growth of gradients is given
EXPONENTS = (2.0, 1.5, 1.0, 0.0)  # of the rules lr = c / k^p that are compared
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito's


class Series(NamedTuple):
    """What is trained at several rates, until the best of them is inside of what was tried."""

    model: str
    shift: str
    rank: int
    seed: int = 0
    by_spectrum: bool = False  # see `Cell`


VALIDATION, TRAINING, EARLIER = "on validation speech", "in training", "on validation speech, earlier"
EARLIER_RANKS = {"0.006": 83, "0.02": 153, "0.05": 242}  # of tiny.en at these budgets

Results = Mapping[Series, Mapping[float, Mapping[str, Any]]]  # learning rate -> result of a cell
Gradients = Mapping[tuple[str, str], Sequence[float]]  # model, shift -> sum of |dL / d theta| at k = 1, 2, ...
Losses = Mapping[float, float]  # learning rate -> loss, infinite where training diverged
Tried = Mapping[Series, Losses]


def losses_of(results: Results, which: str = VALIDATION) -> dict[Series, dict[float, float]]:
    """After training on validation speech, or the mean in the last two thirds of training; infinite where it diverged.

    The latter varies less: it has more clips, most of which are new to the model.
    """

    def one(result: Mapping[str, Any]) -> float:
        if result.get("diverged"):
            return math.inf
        losses = result["losses"]
        return float(result["loss"] if which == VALIDATION else np.mean(losses[len(losses) // 3 :]))

    return {series: {lr: one(result) for lr, result in found.items()} for series, found in results.items()}


def earlier(path: Path = TUNED) -> tuple[dict[Series, dict[float, float]], dict[Series, float]]:
    """(losses, rate chosen by error rate) of SSVD in 36 steps, in tuning's table: its rates are a factor of 3 apart."""
    tried: dict[Series, dict[float, float]] = {}
    chosen = {}
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            if (row["method"], row["model"], row["steps"]) == ("ssvd", "", "36"):
                series, lr = Series("tiny.en", row["shift"], EARLIER_RANKS[row["budget"]]), float(row["lr"])
                tried.setdefault(series, {})[lr] = float(row["validation loss"])
                if row["chosen"]:
                    chosen[series] = lr
    return tried, chosen


def inside(losses: Losses) -> bool:
    """Whether rates on both sides of the best one were tried."""
    return min(losses) < min(losses, key=losses.__getitem__) < max(losses)


def best_rate(losses: Losses) -> float:
    """The vertex of the parabola, in log rate, through the best rate and its neighbours; the best has to be `inside`.

    The best rate itself where a neighbour diverged.
    """
    rates = sorted(losses)
    place = rates.index(min(losses, key=losses.__getitem__))
    near = rates[place - 1 : place + 2]
    y = [losses[lr] for lr in near]
    if not np.isfinite(y).all():
        return near[1]
    a, b, _ = np.polyfit(np.log(near) - math.log(near[1]), y, 2)
    return near[1] * math.exp(-b / (2 * a))


def loss_at(lr: float, losses: Losses) -> float:
    """Interpolated linearly in log rate; beyond the rates tried the line goes on, which is too little."""
    x, y = zip(*sorted((math.log(rate), loss) for rate, loss in losses.items() if math.isfinite(loss)), strict=True)
    at = math.log(lr)
    place = min(max(int(np.searchsorted(x, at)), 1), len(x) - 1)
    slope = (y[place] - y[place - 1]) / (x[place] - x[place - 1])
    return float(y[place] + slope * (at - x[place]))


def lost(lr: float, losses: Losses) -> float:
    """Nats above the lowest loss that was measured, not below 0."""
    return max(0.0, loss_at(lr, losses) - min(losses.values()))


def exponent(rates: Mapping[Series, float]) -> tuple[float, float] | None:
    """(p, half its 95 % interval) of rate = c / k^p, with c of each model, shift and seed; None from too few ranks.

    By least squares of logarithms, Student's t; infinite from no more rates than fit exactly.
    """
    x, y, groups = [], [], 0
    key: Callable[[Series], tuple[str, str, int]] = lambda s: (s.model, s.shift, s.seed)  # noqa: E731
    for _, members in groupby(sorted(rates, key=key), key=key):
        series = list(members)
        logs = np.log([s.rank for s in series]), np.log([rates[s] for s in series])
        x, y = [*x, *(logs[0] - logs[0].mean())], [*y, *(logs[1] - logs[1].mean())]
        groups += 1
    if not any(x):
        return None
    k, lr, freedom = np.array(x), np.array(y), len(x) - groups - 1
    slope = float(k @ lr / (k @ k))
    if not freedom:
        return -slope, math.inf
    spread = math.sqrt(float(((lr - slope * k) ** 2).sum()) / freedom / float(k @ k))
    t = float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, 200_000)), 0.95))
    return -slope, t * spread


def regret(p: float, tried: Tried) -> tuple[float, float, float]:
    """(mean, worst, c) of what is `lost` in all series by lr = c / k^p, at the c with the lowest mean."""
    candidates = np.geomspace(1e-5, 1, 461) * math.exp(p * np.mean([math.log(s.rank) for s in tried]))
    results = [([lost(c / s.rank**p, losses) for s, losses in tried.items()], c) for c in candidates]
    nats, c = min(results, key=lambda result: sum(result[0]))
    return float(np.mean(nats)), max(nats), float(c)


def _regret_apart(p: float, tried: Tried) -> tuple[float, float]:
    """(mean, worst) with a c for each model and shift."""
    key: Callable[[Series], tuple[str, str]] = lambda s: (s.model, s.shift)  # noqa: E731
    nats = []
    for _, members in groupby(sorted(tried, key=key), key=key):
        found = {s: tried[s] for s in members}
        _, _, c = regret(p, found)
        nats += [lost(c / s.rank**p, losses) for s, losses in found.items()]
    return float(np.mean(nats)), max(nats)


def _line(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _exponent(rates: Mapping[Series, float]) -> str:
    found = exponent(rates)
    if found is None:
        return ""
    return f"{found[0]:.2f} ± {found[1]:.2f}" if math.isfinite(found[1]) else f"{found[0]:.2f}"


def _gradient_lines(gradients: Gradients, ranks: Sequence[int]) -> list[str]:
    """How fast the sum of |dL / d theta| grows with the rank: exponents from each rank to the next, and by all."""
    pairs = list(pairwise(ranks))
    lines = [_line(["model", "shift", *(f"{low} to {high}" for low, high in pairs), "all"])]
    lines.append("|---|---|" + "---:|" * (len(pairs) + 1))
    for which, sums in gradients.items():
        x, y = np.log(ranks), np.log([sums[k - 1] for k in ranks])
        slopes = [*(np.diff(y) / np.diff(x)), np.polyfit(x, y, 1)[0]]
        lines.append(_line([*which, *(f"{slope:.2f}" for slope in slopes)]))
    return lines


def _chosen_lines(tried: Tried, chosen: Mapping[Series, float]) -> list[str]:
    """What the earlier choices lose, by error rate and among few rates."""
    lines = [_line(["shift", "k", "chosen rate", "best rate", "lost, at least"]), "|---|" + "---:|" * 4]
    for series, lr in sorted(chosen.items()):
        losses = tried[series]
        tails = f"{lr:.1e}", f"{best_rate(losses):.2e}", f"{lost(lr, losses):.4f}"
        lines.append(_line([series.shift, series.rank, *tails]))
    return lines


def _best_lines(tried: Tried, rule: float) -> list[str]:
    lines = [
        _line(
            ["model", "shift", "k", "seed", "rates tried", "best rate", "rate k^1.5", "lowest loss", "lost by the rule"]
        )
    ]
    lines.append("|---|---|" + "---:|" * 7)
    for series, losses in tried.items():
        lr = best_rate(losses)
        kind = f"{series.shift}, rates by spectrum" if series.by_spectrum else series.shift
        tails = [
            f"{lr:.2e}",
            f"{lr * series.rank**1.5:.2f}",
            f"{min(losses.values()):.4f}",
            f"{lost(rule / series.rank**2, losses):.4f}",
        ]
        lines.append(_line([series.model, kind, series.rank, series.seed, len(losses), *tails]))
    return lines


def _exponent_lines(tried: Tried) -> list[str]:
    rates = {series: best_rate(losses) for series, losses in tried.items()}
    lines = [_line(["model", "shift", "series", "p of 1 / k^p, 95 % interval"]), "|---|---|---:|---:|"]
    models = list(dict.fromkeys(s.model for s in rates))
    pairs = dict.fromkeys((s.model, s.shift) for s in rates)
    for model, shift in [*pairs, *((model, "all") for model in models), ("all", "all")]:
        some = {s: lr for s, lr in rates.items() if model in (s.model, "all") and shift in (s.shift, "all")}
        lines.append(_line([model, shift, len(some), _exponent(some)]))
    return lines


def _rule_lines(tried: Tried) -> list[str]:
    lines = [_line(["rule", "c", "mean lost", "worst", "mean, a c for each model and shift", "worst"])]
    lines.append("|---|" + "---:|" * 5)
    for p in EXPONENTS if tried else ():
        mean, worst, c = regret(p, tried)
        apart = _regret_apart(p, tried)
        name = f"c / k^{p:g}" if p else "c"
        lines.append(_line([name, f"{c:.3g}", *(f"{nats:.4f}" for nats in (mean, worst, *apart))]))
    return lines


def table(views: Mapping[str, Tried], chosen: Mapping[Series, float], gradients: Gradients, rule: float) -> str:
    """Markdown, in sections; the views are losses of different kinds."""
    sections = {}
    for view, tried in views.items():
        whole = {series: losses for series, losses in sorted(tried.items()) if inside(losses)}
        uniform = {series: losses for series, losses in whole.items() if not series.by_spectrum}
        sections[f"Loss {view}: best rates, and what {rule} / k^2 loses (nats per token)"] = _best_lines(whole, rule)
        sections[f"Loss {view}: the exponent"] = _exponent_lines(uniform)
        sections[f"Loss {view}: what rules lose (nats per token)"] = _rule_lines(uniform)
    growth = "How the sum of |dL / d theta| before training grows with k, as an exponent"
    sections[growth] = _gradient_lines(gradients, RANKS)
    coarse = "What the earlier choices, by error rate among rates a factor of 3 apart, lose"
    sections[coarse] = _chosen_lines(views[EARLIER], chosen)
    return "\n".join(line for title, lines in sections.items() for line in (f"## {title}", "", *lines, ""))


def draw(views: Mapping[str, Tried], rule: float, path: Path) -> None:
    """A row for each view: loss against rate, a line a rank, for each model and shift; best rate against rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    kept = {view: {s: losses for s, losses in sorted(tried.items()) if not s.by_spectrum and inside(losses)}
            for view, tried in views.items()}  # fmt: skip
    kept = {view: tried for view, tried in kept.items() if tried}
    pairs = list(dict.fromkeys((s.model, s.shift) for tried in kept.values() for s in tried))
    ranks = sorted({s.rank for tried in kept.values() for s in tried})
    size = len(kept), len(pairs) + 1
    figure, grid = plt.subplots(*size, figsize=(4.5 * size[1], 3.8 * size[0]), layout="constrained", squeeze=False)
    for (view, tried), row in zip(kept.items(), grid, strict=True):
        for place, (pair, panel) in enumerate(zip(pairs, row[:-1], strict=True)):
            own = {s: losses for s, losses in tried.items() if s[:2] == pair}
            if not own:
                panel.set_axis_off()
                continue
            for series, losses in own.items():
                colour, line = COLOURS[ranks.index(series.rank)], "o:" if series.seed else "o-"
                known = sorted((lr, loss) for lr, loss in losses.items() if math.isfinite(loss))
                label = None if series.seed else f"k = {series.rank}"
                panel.plot(*zip(*known, strict=True), line, color=colour, label=label, markersize=4)
                panel.axvline(rule / series.rank**2, color=colour, linewidth=0.8, linestyle="--", alpha=0.6)
            top = 1.4 * max(min(losses.values()) for losses in own.values())  # what diverges would leave no room
            panel.set(xscale="log", xlabel="learning rate", ylabel=f"loss {view}, nats")
            panel.set_ylim(top=min(top, panel.get_ylim()[1]))
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(lambda lr, _: f"{lr:.0e}".replace("e-0", "e-"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set_title(f"{pair[0]}, {pair[1]} (dashed: {rule:g} / k²)", fontsize=10)
            panel.legend(frameon=False, fontsize=8)
            points = [(s.rank, best_rate(losses)) for s, losses in own.items()]
            marker, colour = "os^Dv<>"[place], COLOURS[place]
            row[-1].plot(*zip(*points, strict=True), marker, color=colour, label=", ".join(pair), markersize=6)
        k = np.geomspace(ranks[0], ranks[-1], 20)
        for p, style in zip(EXPONENTS, ("--", "-", "-.", ":"), strict=True):
            label = f"c / k^{p:g}" if p else "c"
            row[-1].plot(k, regret(p, tried)[2] / k**p, style, color="#999999", label=label)
        row[-1].set(xscale="log", yscale="log", xlabel="rank k", ylabel="best learning rate")
        row[-1].set_title("Best rate against rank", fontsize=10)
        row[-1].set_xticks(ranks, map(str, ranks))
        row[-1].minorticks_off()
        row[-1].legend(frameon=False, fontsize=8)
    for each in grid.flat:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)

    write_atomically(path, write)


def write(results: Results, gradients: Gradients, rule: float, out: Path) -> str:
    """Writes cells.csv, gradients.csv, table.md and rates.png into `out`; returns the table."""
    rows: list[Sequence[object]] = [COLUMNS]
    before, chosen = earlier()
    views = {VALIDATION: losses_of(results), TRAINING: losses_of(results, TRAINING), EARLIER: before}
    for series, found in sorted(results.items()):
        for lr, result in sorted(found.items()):
            losses = [f"{views[view][series][lr]:.5f}" for view in (VALIDATION, TRAINING)]
            rows.append((*series[:4], int(series.by_spectrum), lr, *losses, *map(result.get, COLUMNS[-2:])))
    sums = [(*which, k, f"{value:.6g}") for which, found in gradients.items() for k, value in enumerate(found, 1)]
    text = table(views, chosen, gradients, rule)
    _write_csv(out / "cells.csv", rows)
    _write_csv(out / "gradients.csv", [("model", "shift", "rank", "sum"), *sums])
    write_atomically(out / "table.md", lambda path: path.write_text(text, encoding="utf-8"))
    write_atomically(out / "rates.png", lambda path: draw(views, rule, path))
    return text
