"""The experiment's figures. Colours of Okabe and Ito; methods are told apart by marker, too."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view

from experiments.asr.entries import Entry, interval
from experiments.asr.runfolder import write_atomically
from experiments.asr.speech import AS_RECORDED

if TYPE_CHECKING:
    from experiments.asr.curve_tables import Curve

STYLES = {
    "full": ("#000000", "*"),
    "lora": ("#E69F00", "o"),
    "dora": ("#E69F00", "s"),
    "pissa": ("#E69F00", "^"),
    "vera": ("#CC79A7", "v"),
    "oft": ("#009E73", "<"),
    "psoft": ("#009E73", ">"),
    "svft": ("#D55E00", "D"),
    "spectralft": ("#CC79A7", "P"),
    "ssvd": ("#0072B2", "o"),
    "ssvd-linear": ("#0072B2", "s"),
    "ssvd-free": ("#0072B2", "^"),
    "ssvd-output": ("#0072B2", "v"),
    "ssvd-spectrum": ("#0072B2", "X"),
    "ssvd-o-25": ("#56B4E9", "<"),
    "ssvd-o": ("#56B4E9", "D"),
    "ssvd-o-75": ("#56B4E9", ">"),
}
CURVED = ("full", "lora", "svft", "spectralft", "ssvd", "ssvd-linear", "ssvd-free", "ssvd-o")
NEIGHBOURS = 11  # singular values: one by one, their changes hide each other


def save(path: Path, figure: Figure | None) -> None:
    """Nothing where the results hold nothing to draw."""
    if figure is not None:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
        plt.close(figure)


def _panels(count: int, title: str, width: float = 5.2, height: float = 4.6) -> tuple[Figure, list[Any]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for panel in axes[0]:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _legend(figure: Figure, panels: Sequence[Any], most: int = 6) -> None:
    handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels())}
    columns = min(most, 3 * len(panels), len(handles))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def _by_shift(found: Sequence[Entry]) -> dict[str, list[Entry]]:
    return {shift: [e for e in found if e.shift == shift] for shift in dict.fromkeys(e.shift for e in found)}


def _compared(found: Sequence[Entry]) -> list[Entry]:
    """The entries without a budget, and those at the one that most methods have (of several the highest)."""
    budgets = [e.budget for e in found if e.budget]
    common = max(set(budgets), key=lambda budget: (budgets.count(budget), budget), default=None)
    return [e for e in found if e.budget in (None, common)]


def _mean(values: Sequence[float]) -> float:
    return 100 * statistics.fmean(values)


def wer_parameters(found: Sequence[Entry]) -> Figure | None:
    """Target WER against trainable parameters, with 95 % intervals, where a method has several budgets."""
    shifts = _by_shift(found)
    shifts = {shift: some for shift, some in shifts.items() if max(Counter(e.method for e in some).values()) > 1}
    if not shifts:
        return None
    figure, panels = _panels(len(shifts), "Word error rate against trainable parameters")
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        top = 250 * max(interval(e.results, ["test"])[1] for e in of_shift if e.method != "zero-shot")
        for method in dict.fromkeys(e.method for e in of_shift):
            points = [e for e in of_shift if e.method == method]
            means = [_mean(e.rates(["test"])) for e in points]
            if method == "zero-shot":
                if means[0] > top:  # would leave no room for the rest
                    panel.annotate(f"zero-shot: {means[0]:.0f} %", (0.98, 0.95), xycoords="axes fraction", ha="right")
                else:
                    panel.axhline(means[0], color="#999999", linestyle="--", label="zero-shot")
                continue
            colour, marker = STYLES[method]
            bounds = [interval(e.results, ["test"]) for e in points]
            errors = [
                [max(0.0, m - 100 * low) for m, (low, _) in zip(means, bounds, strict=True)],  # 0 but for rounding
                [max(0.0, 100 * high - m) for m, (_, high) in zip(means, bounds, strict=True)],
            ]
            counts = [e.results[0]["trainable"] for e in points]
            line = "-" if len(points) > 1 else ""
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 8, "capsize": 3}
            panel.errorbar(counts, means, errors, label=points[0].title, elinewidth=0.8, **style)
        panel.set_xscale("log")
        panel.set(xlabel="trainable parameters", ylabel="WER, % (lower is better)", ylim=(0, None))
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels)
    return figure


def methods(found: Sequence[Entry]) -> Figure | None:
    """Target WER of every method at one budget, with 95 % intervals and the seeds' own values."""
    shifts = {shift: _compared(of_shift) for shift, of_shift in _by_shift(found).items()}
    shifts = {shift: of_shift for shift, of_shift in shifts.items() if len(of_shift) > 5}
    if not shifts:
        return None
    most = max(map(len, shifts.values()))
    figure, panels = _panels(len(shifts), "Methods at one budget", width=7.5, height=1.2 + 0.32 * most)
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        ordered = sorted(of_shift, key=lambda e: -_mean(e.rates(["test"])))
        for place, entry in enumerate(ordered):
            low, high = (100 * bound for bound in interval(entry.results, ["test"]))
            colour, marker = STYLES.get(entry.method, ("#999999", "o"))
            panel.plot([low, high], [place, place], color=colour, linewidth=1.5)
            panel.plot(_mean(entry.rates(["test"])), place, color=colour, marker=marker, markersize=9, linestyle="")
            seeds = [100 * rate for rate in entry.rates(["test"])]
            panel.scatter(seeds, [place + 0.25] * len(seeds), s=8, color=colour, alpha=0.6)
        titles = [f"{e.title} ({e.share:.2%})" if e.method != "zero-shot" else e.title for e in ordered]
        panel.set_yticks(range(len(ordered)), titles)
        panel.set(xlabel="WER, % (bars: 95 % interval, small dots: seeds)", xlim=(0, None))
        panel.set_title(of_shift[0].domain, fontsize=11)
    return figure


def learning_forgetting(found: Sequence[Entry]) -> Figure | None:
    """Points of WER won on the target against points lost on other speakers of the source domain."""
    shifts = {
        shift: e for shift, e in _by_shift(found).items() if e[0].method == "zero-shot" and e[0].others and len(e) > 1
    }
    if not shifts:
        return None
    figure, panels = _panels(len(shifts), "Learning against forgetting (best: right and low; large: budgets above 1 %)")
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        before = of_shift[0]
        target, source = _mean(before.rates(["test"])), _mean(before.rates(before.others))
        for entry in of_shift:
            if entry is before:
                continue
            colour, marker = STYLES[entry.method]
            x, y = target - _mean(entry.rates(["test"])), _mean(entry.rates(entry.others)) - source
            size = 60 if (entry.budget or 1) > 0.01 else 25
            panel.scatter(x, y, s=size, color=colour, marker=marker, label=entry.title)
        panel.axhline(0, color="#999999", linewidth=0.8)
        panel.set(
            xlabel="learnt: WER points won on the target",
            ylabel="forgotten: WER points, other speakers",
        )
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels)
    return figure


def allocation(found: Sequence[Entry]) -> Figure | None:
    """WER over the share of the rotations' parameters that goes to the inner (input) side."""
    shares = {"ssvd-output": 0.0, "ssvd-o-25": 0.25, "ssvd-o": 0.5, "ssvd-o-75": 0.75, "ssvd": 1.0}
    budget = max((e.budget for e in found if e.method == "ssvd-o-25" and e.budget), default=None)
    if budget is None:
        return None
    shifts = _by_shift([e for e in found if e.method in shares and e.budget == budget])
    shifts = {shift: of_shift for shift, of_shift in shifts.items() if len(of_shift) > 2}
    if not shifts:
        return None
    figure, panels = _panels(len(shifts), f"SSVD-O: where {budget:.1%} of the parameters go", width=6)
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        of_shift = sorted(of_shift, key=lambda e: shares[e.method])
        x = [shares[e.method] for e in of_shift]
        for name, colour, sets in (
            ("target", "#0072B2", lambda e: ["test"]),
            (
                "English prompts, as recorded",
                "#999999",
                lambda e: [s for s in e.results[0]["scores"] if s == AS_RECORDED],
            ),
            ("other speakers", "#E69F00", lambda e: e.others),
        ):
            if not sets(of_shift[0]):
                continue
            rates = [[100 * rate for rate in e.rates(sets(e))] for e in of_shift]
            means = [statistics.fmean(values) for values in rates]
            panel.plot(x, means, color=colour, marker="o", label=name)
            for place, values in zip(x, rates, strict=True):
                panel.scatter([place] * len(values), values, s=10, color=colour, alpha=0.5)
        panel.set(xlabel="share of the inner (input) side", ylabel="WER, % (small dots: seeds)", ylim=(0, None))
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels)
    return figure


def spectra(found: Sequence[Entry]) -> Figure | None:
    """Relative change of the singular values of three weights by training, on the first shift that has them."""
    drawn = [e for e in _compared(found) if e.results[0]["spectra"] and e.method in CURVED]
    drawn = [e for e in drawn if e.shift == drawn[0].shift]
    if not drawn:
        return None
    names = list(drawn[0].results[0]["spectra"])
    title = f"Relative change of singular values ({drawn[0].domain}; each the median of {NEIGHBOURS} neighbours)"
    figure, panels = _panels(len(names), title)
    for panel, name in zip(panels, names, strict=True):
        for entry in drawn:
            spectrum = entry.results[0]["spectra"][name]
            change = np.abs(np.divide(spectrum["after"], spectrum["before"]) - 1).clip(min=1e-8)
            around = sliding_window_view(np.pad(change, NEIGHBOURS // 2, mode="edge"), NEIGHBOURS)
            panel.plot(range(1, len(change) + 1), np.median(around, axis=1), color=STYLES[entry.method][0],
                       label=entry.title, linestyle=_line(entry.method), linewidth=1.3)  # fmt: skip
        panel.set_yscale("log")
        panel.set_title(name.removeprefix("model."), fontsize=10)
        panel.set(xlabel="index of the singular value", ylabel="|after / before - 1|")
    _legend(figure, panels)
    return figure


def _line(method: str) -> str:
    return {"ssvd-linear": "--", "ssvd-free": ":", "spectralft": "--"}.get(method, "-")


def orthogonality(found: Sequence[Entry]) -> Figure | None:
    """Distance of the rotations from orthogonality in the course of training: mean of ||G^T G - I||_F / sqrt(k)."""
    rotating = ("ssvd", "ssvd-linear", "ssvd-free", "ssvd-o")
    drawn = [e for e in _compared(found) if e.method in rotating and e.results[0]["watched"]]
    if len({e.method for e in drawn}) < 2:
        return None
    most = max(len(of_shift) for of_shift in _by_shift(drawn).values())
    shifts = {shift: of_shift for shift, of_shift in _by_shift(drawn).items() if len(of_shift) == most}
    figure, panels = _panels(len(shifts), "How far the rotations are from orthogonal", width=6)
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        for entry in of_shift:
            for result in entry.results:
                steps = [w["step"] for w in result["watched"]]
                errors = [max(w["orthogonality error"], 1e-16) for w in result["watched"]]
                colour, marker = STYLES[entry.method]
                panel.plot(steps, errors, color=colour, marker=marker, label=entry.title, linewidth=1, markersize=5,
                           linestyle=_line(entry.method))  # fmt: skip
        panel.set_yscale("log")
        panel.set(xlabel="step", ylabel="mean of ||GᵀG - I|| / √k")
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels)
    return figure


def curves(found: Sequence[Entry]) -> Figure | None:
    """Validation loss in the course of training, mean over the seeds."""
    drawn = [e for e in _compared(found) if e.results[0]["watched"] and e.method in CURVED]
    if not drawn:
        return None
    shifts = _by_shift(drawn)
    figure, panels = _panels(len(shifts), "Learning curves")
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        for entry in of_shift:
            steps = [w["step"] for w in entry.results[0]["watched"]]
            losses = zip(*([w["validation loss"] for w in r["watched"]] for r in entry.results), strict=True)
            colour, marker = STYLES[entry.method]
            panel.plot(steps, [statistics.fmean(values) for values in losses], color=colour, marker=marker,
                       markersize=4, label=entry.title, linestyle=_line(entry.method))  # fmt: skip
        panel.set(xlabel="step", ylabel="validation cross-entropy, nats per token")
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels)
    return figure


def strengths(found: Sequence[Curve]) -> Figure:
    """Target WER against other speakers', a path of strengths for each method; single marks: averages beside it."""
    shifts = {shift: [c for c in found if c.shift == shift] for shift in dict.fromkeys(c.shift for c in found)}
    figure, panels = _panels(
        len(shifts), "Strengths from 0.25 to 1.25, of which 0.5 and 1 (as trained) are marked", width=7
    )
    for panel, of_shift in zip(panels, shifts.values(), strict=True):
        rates = sorted({c.lr for c in of_shift if c.method == "ssvd"})
        for curve in of_shift:
            colour, marker = STYLES[curve.method]
            if curve.method == "ssvd" and curve.lr != rates[-1]:
                colour = "#56B4E9"
            source, target = curve.means(curve.others), curve.means(["test"])
            whole = curve.how == "strength" or (curve.how == "weights" and curve.method != "ssvd")
            shown = [alpha for alpha in source if whole or curve.how == "average" or alpha not in (0, 1)]
            x, y = [source[alpha] for alpha in shown], [target[alpha] for alpha in shown]
            marker = marker if whole else {"average": "x", "weights": "D"}[curve.how]
            style = {"color": colour, "marker": marker, "linestyle": "-" if whole else "", "fillstyle": "none"}
            panel.plot(x, y, markersize=4 if whole else 9, label=f"{curve.title}, lr {curve.lr:g}", **style)
            for alpha, left, up in zip(shown, x, y, strict=True):
                if not whole or alpha not in (0.5, 1):
                    continue
                panel.annotate(f"{alpha:g}", (left, up), (4, 4), textcoords="offset points", color=colour, size=8)
        trained = [value for c in of_shift for alpha, value in c.means(["test"]).items() if alpha]
        panel.set(xlabel="WER of other speakers, %", ylabel="target WER, %", ylim=(0, 1.1 * max(trained)))
        panel.set_title(of_shift[0].domain, fontsize=11)
    _legend(figure, panels, most=3)
    return figure


FIGURES: dict[str, Callable[[Sequence[Entry]], Figure | None]] = {
    "wer-parameters": wer_parameters,
    "methods": methods,
    "learning-forgetting": learning_forgetting,
    "allocation": allocation,
    "spectra": spectra,
    "orthogonality": orthogonality,
    "curves": curves,
}
