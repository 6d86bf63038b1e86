"""The end of a run: a table, Markdown, JSON and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.asr.recognizer import Score
from experiments.asr.runfolder import write_atomically, write_json

KEPT = ("errors", "words", "utterances", "wer", "characters", "character_errors", "cer")


@dataclass
class Row:
    """Word error rates of one set of recordings; `merged` only where it was measured."""

    name: str
    before: Score
    after: Score
    merged: Score | None = None


@dataclass
class Report:
    title: str
    rows: list[Row]  # the first is the target
    facts: dict[str, str]
    checks: dict[str, bool]
    losses: list[float]
    raw: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(self.checks.values())


def _percent(score: Score | None) -> str:
    return "" if score is None else f"{100 * score.wer:.1f} %"


def table(report: Report) -> str:
    """The whole report as Markdown that also reads well on a terminal."""
    head = ["Held-out speech", "utterances", "words", "WER before", "WER after", "WER merged"]
    cells = [head]
    for row in report.rows:
        sizes = [str(row.before.utterances), str(row.before.words)]
        cells.append([row.name, *sizes, _percent(row.before), _percent(row.after), _percent(row.merged)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]

    def line(values: list[str]) -> str:
        padded = [v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    lines = [f"# {report.title}", "", line(cells[0]), rule, *map(line, cells[1:]), ""]
    lines += [f"- {name}: {value}" for name, value in report.facts.items()]
    lines += [f"- {name}: {'yes' if ok else 'NO'}" for name, ok in report.checks.items()]
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> str:
    """Writes report.md, report.json and report.png into the folder; returns the Markdown."""
    text = table(report)
    write_atomically(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    rows = [
        {
            "name": r.name,
            **{
                k: None if s is None else {name: getattr(s, name) for name in KEPT}
                for k, s in (("before", r.before), ("after", r.after), ("merged", r.merged))
            },
        }
        for r in report.rows
    ]
    write_json(
        folder / "report.json",
        {
            "title": report.title,
            "rows": rows,
            "facts": report.facts,
            "checks": report.checks,
            "losses": report.losses,
            **report.raw,
        },
    )
    write_atomically(folder / "report.png", lambda path: draw(report, path))
    return text


def draw(report: Report, path: Path) -> None:
    """Bars of the WER before and after, and the training loss; colours of Okabe and Ito, told apart by hatch too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.6, 1), layout="constrained")
    figure.suptitle(report.title, fontsize=13, fontweight="bold")
    most = max(max(r.before.wer, r.after.wer) for r in report.rows)
    for shift, key, colour, hatch in ((-0.2, "before", "#E69F00", "//"), (0.2, "after", "#0072B2", "")):
        places = [i + shift for i in range(len(report.rows))]
        values = [100 * getattr(row, key).wer for row in report.rows]
        label = f"{key} fine-tuning"
        bars.bar(places, values, 0.38, label=label, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
        for place, value in zip(places, values, strict=True):
            bars.annotate(f"{value:.1f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=10)
    kinds = ["target", *["source"] * (len(report.rows) - 1)]
    names = [f"{row.name}\n{kind}, {row.before.words} words" for row, kind in zip(report.rows, kinds, strict=True)]
    bars.set_xticks(range(len(names)), names, fontsize=9)
    bars.set_ylabel("word error rate, % (lower is better)")
    bars.set_ylim(0, 118 * most or 1)
    bars.set_title("Held-out speech", fontsize=11)
    bars.legend(frameon=False, loc="upper right")
    bars.grid(axis="y", alpha=0.3)
    bars.set_axisbelow(True)
    steps = range(1, len(report.losses) + 1)
    curve.plot(steps, report.losses, color="#999999", linewidth=0.9, label="each step")
    mean = [sum(report.losses[max(0, i - 9) : i + 1]) / min(10, i + 1) for i in range(len(report.losses))]
    curve.plot(steps, mean, color="#0072B2", linewidth=2, label="mean of the last 10")
    curve.set(xlabel="step", ylabel="cross-entropy, nats per token", ylim=(0, None))
    curve.set_title("Training loss", fontsize=11)
    curve.grid(alpha=0.3)
    curve.legend(frameon=False)
    for axes in (bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
    shown = [f"{name}: {report.facts[name]}" for name in ("Trained parameters", "Time per step", "Adapter file")]
    figure.supxlabel("   ·   ".join(shown), fontsize=9)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
