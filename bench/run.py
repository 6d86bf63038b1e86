"""Microbenchmarks of SSVD against plain PyTorch: `python -m bench.run`.

Forward and backward of the op, of a whole layer and of the Cayley map, each beside its counterparts (frozen
nn.Linear, full fine-tuning, the naive factored layer, the layer that rebuilds its weight, torch.linalg.solve) in the
same run. Every version must agree with float64 before it is timed. Rows go to a CSV file one by one; a Markdown
table is written beside it and printed last. The exit code is 1 if any version was refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from tqdm.auto import tqdm

from bench import cases
from bench.harness import SHAPE, Clock, Row, Table, machine, measure

RESULTS = Path(__file__).parent / "results"
COUNTERPARTS = ("frozen linear", "full fine-tuning", "naive", "rebuilt weight", "linalg.solve")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if it is there")
    parser.add_argument("--out", type=Path, help="the CSV file, appended to (default: bench/results/DEVICE.csv)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--limit-seconds", type=float, default=1800, help="start no case after this long (%(default)s)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible to torch; allowed here are auto and cpu")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    about = machine(device)
    default = about["device"].lower().replace(" ", "-") if cuda else f"cpu-{about['threads']}threads"
    path = options.out or RESULTS / f"{default}.csv"
    try:
        table = Table(path)
    except ValueError as error:
        parser.error(str(error))
    rows: list[Row] = []
    planned = cases.table(device, options.quick)
    left = [str(case) for case in planned]
    seconds = 0.005 if options.quick else 0.4 if cuda else 1.5
    end = time.monotonic() + options.limit_seconds
    interrupted = False
    try:
        clock = Clock(device, options.quick)
        for case in (progress := tqdm(planned, unit="case")):
            if time.monotonic() > end:
                break
            progress.set_description(str(case))
            for row in measure(case, clock, seconds, about):
                table.append(row)
                rows.append(row)
                if row["note"]:
                    progress.write(_refusal(row))
            left.remove(str(case))
    except KeyboardInterrupt:
        interrupted = True
    text = summary(rows, left, about)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name} are written.")
    return 130 if interrupted else int(any(row["note"] for row in rows))


def summary(rows: Sequence[Row], left: Sequence[str], about: Row) -> str:
    """The measurements as Markdown: one table an operation, ratios within one case and round."""
    where = f"{about['device']}, {about['threads']} CPU threads, torch {about['torch']}, Triton {about['triton']}"
    lines = [
        f"# {where}",
        "",
        f"Commit {about['commit']}, {about['run']}. Forward and backward, milliseconds: the medians of two interleaved",
        "rounds, and the range from the lower 20th to the higher 80th percentile. Floor: the larger of FLOPs and bytes",
        "over the rates of a large matrix product and copy in this run. `/ name`: time over that version's.",
    ]
    for operation in dict.fromkeys(row["operation"] for row in rows):
        mine = [row for row in rows if row["operation"] == operation and not row["note"]]
        present = {row["version"] for row in mine}
        peers = [name for name in COUNTERPARTS if name in present]
        head = ["shape", "version", "backend", "mode", "timing", "p50 ms", "p20-p80 ms", "/ floor"]
        head += [f"/ {name}" for name in peers] + ["error (bound)"]
        lines += ["", f"## {operation}", "", _line(head), _line(["---"] * len(head))]
        for key in dict.fromkeys(_shape(row) for row in mine):
            lines += _lines_of([row for row in mine if _shape(row) == key], key, peers)
    refused = [row for row in rows if row["note"]]
    if refused:
        lines += ["", "## Refused", "", *(f"- {_refusal(row)}" for row in refused)]
    if left:
        lines += ["", "## Not measured", "", *(f"- {name}" for name in left)]
    return "\n".join(lines) + "\n"


def _lines_of(rows: Sequence[Row], shape: str, peers: Sequence[str]) -> list[str]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("version", "backend", "mode", "timing")), []).append(row)
    medians = {(key[0], key[3]): mean(float(row["p50_ms"]) for row in group) for key, group in groups.items()}
    lines = []
    for (version, backend, mode, timing), group in groups.items():
        p50 = mean(float(row["p50_ms"]) for row in group)
        ratios = [f"{p50 / medians[peer, timing]:.2f}" if (peer, timing) in medians else "" for peer in peers]
        low, high = min(float(row["p20_ms"]) for row in group), max(float(row["p80_ms"]) for row in group)
        floor = mean(float(row["over_floor"]) for row in group)
        times = " ".join(f"{float(row['p50_ms']):.4g}" for row in group)
        cells = [shape, version, backend, mode, timing, times, f"{low:.4g}-{high:.4g}", f"{floor:.2f}", *ratios]
        lines.append(_line([*cells, f"{group[0]['error']} ({group[0]['error_bound']})"]))
    return lines


def _shape(row: Row) -> str:
    named = [f"{name}={row[name]}" for name in SHAPE if row[name]]
    return " ".join([row["dtype"], *named])


def _refusal(row: Row) -> str:
    named = [row[name] for name in ("version", "backend", "mode", "timing") if row[name]]
    error = f" (error {row['error']}, allowed {row['error_bound']})" if row["error"] else ""
    return f"{row['operation']} {_shape(row)}, {' '.join(named)}: {row['note']}{error}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
