"""Several runs of the demo put together: mean error rates with 95 % bootstrap intervals over seeds and utterances.

python -m experiments.asr.seeds runs/asr-seed0 runs/asr-seed1 runs/asr-seed2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.asr import DemoError
from experiments.asr.commands import exit_status
from experiments.asr.entries import counts, with_interval

STATES = ("before", "strength 1", "chosen")


def read(folder: Path) -> dict[str, Any]:
    """The folder's report.json; each of its rows has the scores of STATES, in the form of a cell's result."""
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise DemoError(f"{folder}: no report.json of a finished run ({error.strerror})") from None
    for row in report["rows"]:
        scores = {**row["scores"], "chosen": row["scores"][f"strength {report['strength']:g}"]}
        row["scores"] = {state: {"scores": {"all": scores[state]}} for state in STATES}
    return report


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each set of recordings."""
    names = [[row["name"] for row in report["rows"]] for report in reports]
    if any(other != names[0] for other in names):
        raise DemoError(f"the runs must have measured the same sets, got {names}")
    chosen = ", ".join(f"{report['strength']:g}" for report in reports)
    heads = ["WER, %", "words", "before", "strength 1", f"chosen strength ({chosen})", "chosen minus 1"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for place, name in enumerate(names[0]):
        runs = {state: [report["rows"][place]["scores"][state] for report in reports] for state in STATES}
        words = int(counts(runs["before"][0], ["all"])[1].sum())
        cells = [name, str(words), *(with_interval(runs[state], ["all"]) for state in STATES)]
        cells.append(with_interval(runs["chosen"], ["all"], runs["strength 1"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.asr.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of experiments.asr.demo")
    args = parser.parse_args(argv)

    def command() -> int:
        print(table([read(folder) for folder in args.runs]))
        return 0

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
