"""The end of a run: a table, Markdown, JSON and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.asr.recognizer import Score
from experiments.asr.runfolder import write_atomically, write_json

STYLES = (("#E69F00", "//"), ("#56B4E9", ".."), ("#0072B2", ""))  # before, as trained, at the chosen strength
KEPT = ("errors", "words", "utterances", "wer", "characters", "character_errors", "cer", "per_utterance")


@dataclass
class Row:
    """Word error rates of one set of recordings: of the base model, and at each strength of the adapter."""

    name: str
    before: Score
    after: dict[float, Score]

    @property
    def scores(self) -> dict[str, Score]:
        return {"before": self.before, **{f"strength {strength:g}": s for strength, s in self.after.items()}}


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


def table(report: Report) -> str:
    """The whole report as Markdown that also reads well on a terminal."""
    head = ["Held-out speech", "utterances", "words", *(f"WER {state}" for state in report.rows[0].scores)]
    cells = [head]
    for row in report.rows:
        sizes = [str(row.before.utterances), str(row.before.words)]
        cells.append([row.name, *sizes, *(f"{100 * score.wer:.1f} %" for score in row.scores.values())])
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
        {"name": r.name, "scores": {state: {k: getattr(s, k) for k in KEPT} for state, s in r.scores.items()}}
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
    """Bars of the WER of each state, and the training loss; colours of Okabe and Ito, told apart by hatch too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, curve) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.6, 1), layout="constrained")
    figure.suptitle(report.title, fontsize=13, fontweight="bold")
    states = list(report.rows[0].scores)
    most = max(score.wer for row in report.rows for score in row.scores.values())
    width = 0.8 / len(states)
    for number, (state, (colour, hatch)) in enumerate(zip(states, STYLES)):
        places = [i + (number - (len(states) - 1) / 2) * width for i in range(len(report.rows))]
        values = [100 * row.scores[state].wer for row in report.rows]
        label = "before fine-tuning" if number == 0 else f"after, {state}"
        bars.bar(places, values, 0.95 * width, label=label, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
        for place, value in zip(places, values, strict=True):
            bars.annotate(f"{value:.1f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=9)
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
