"""Microbenchmarks of SSVD against plain PyTorch and other methods: `python -m bench.run`.

The op, a whole layer, the Cayley map, a stack of a real model's blocks and the injection, each beside its
counterparts in the same run (see cases.py). Every version must agree with float64 before it is timed. Rows go to a
CSV file one by one; a Markdown table of all that the file holds is written beside it and printed last, and figures
are drawn (plot.py). The exit code is 1 if any version was refused.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench import cases, plot
from bench.harness import Case, Clock, measure
from bench.records import CASE, MACHINE, Row, Table, machine, read_rows
from bench.report import refusal, summary

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.table is not None:
        try:
            return _write_table(options.table, [], not options.no_figures)
        except ValueError as error:
            parser.error(str(error))
    unknown = [name for name in options.only if name not in cases.OPERATIONS]
    if unknown:
        parser.error(f"--only must be one or more of {', '.join(cases.OPERATIONS)}, got {','.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be auto or cpu, as no CUDA device is visible to torch, got cuda")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    planned = [case for case in cases.table(device, options.quick) if case.operation in options.only]
    planned = [case for case in planned if options.match.search(str(case))]
    if options.list:
        print("\n".join(map(str, planned)))
        return 0
    about = machine(device)
    default = about["device"].lower().replace(" ", "-") if cuda else f"cpu-{about['threads']}threads"
    path = options.out or RESULTS / f"{default}.csv"
    try:
        table = Table(path)
    except ValueError as error:
        parser.error(str(error))
    if options.resume:
        planned = _unmeasured(planned, path, about)
    seconds = 0.005 if options.quick else 0.4 if cuda else 0.8
    refused, left, interrupted = _measure(planned, Clock(device, options.quick), seconds, about, table, options)
    _write_table(path, left, not options.no_figures)
    return 130 if interrupted else int(refused)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if it is there")
    parser.add_argument("--out", type=Path, help="the CSV file, appended to (default: bench/results/DEVICE.csv)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(cases.OPERATIONS),
                        metavar="OPERATION,...", help=f"of {', '.join(cases.OPERATIONS)}")  # fmt: skip
    parser.add_argument("--match", type=re.compile, default=re.compile(""), metavar="REGEX",
                        help="of the cases that --list prints those with a match")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--resume", action="store_true", help="skip the cases that the CSV file has in full")
    parser.add_argument("--table", type=Path, metavar="CSV", help="only write the Markdown table of that file")
    parser.add_argument("--no-figures", action="store_true", help="leave bench.plot for later")
    parser.add_argument("--limit-seconds", type=float, default=1800, help="start no case after this long (%(default)s)")
    return parser


def _unmeasured(planned: Sequence[Case], path: Path, about: Row) -> list[Case]:
    """The cases that no run completed on this machine; says of the others at which commit they were measured."""
    names = (*CASE, *MACHINE)
    commits = {tuple(row[name] for name in names): row["commit"] for row in read_rows(path) if row["last"]}
    left = []
    for case in planned:
        wanted = {**about, **case.row()}
        commit = commits.get(tuple(str(wanted[name]) for name in names))
        if commit is None:
            left.append(case)
        else:
            print(f"skipped, measured at commit {commit}: {case}")
    return left


def _measure(
    planned: Sequence[Case], clock: Clock, seconds: float, about: Row, table: Table, options: argparse.Namespace
) -> tuple[bool, list[str], bool]:
    """(whether a version was refused, the cases not completed, whether the run was interrupted)."""
    left, refused = [str(case) for case in planned], False
    end = time.monotonic() + options.limit_seconds
    try:
        for case in (progress := tqdm(planned, unit="case")):
            if time.monotonic() > end:
                break
            progress.set_description(str(case))
            for row in measure(case, clock, seconds, about):
                table.append(row)
                if row["note"]:
                    progress.write(refusal(row))
                    refused |= row["note"].startswith("refused")
            left.remove(str(case))
    except KeyboardInterrupt:
        return refused, left, True
    return refused, left, False


def _write_table(path: Path, left: Sequence[str], figures: bool) -> int:
    text = summary(read_rows(path), left)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{path.with_suffix('.md')} is written from {path.name}.")
    try:
        return plot.main([str(path)]) if figures else 0
    except ImportError as error:
        print(f"no figures: {error}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
