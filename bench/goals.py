"""The project's goals against what a CSV file of `bench.run` holds: `python -m bench.goals FILE.csv`.

Each goal is a ratio of two times (or of a time or a size and a number) of one run. A goal whose rows are missing is
listed as not measured. The exit code is 0 whatever was met: the table is for reading.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bench.records import MACHINE, Row, latest, of_each, read_rows

OURS = {"version": "ssvd", "backend": "auto"}
AUTO = {**OURS, "mode": "auto"}
BIG = {"operation": "layer", "d_in": "1024", "d_out": "1024", "k": "409", "pass": "forward+backward"}


class Missing(Exception):
    """The file has no such measurement."""


class Goal(NamedTuple):
    """`measured(rows)` compared with `bound`: at most, or at least, that."""

    number: str
    what: str
    at_most: bool
    bound: float
    measured: Callable[[Sequence[Row]], float]

    def line(self, rows: Sequence[Row]) -> str:
        sign = "<=" if self.at_most else ">="
        try:
            value = self.measured(rows)
        except Missing:
            return f"| {self.number} | {self.what} | {sign} {self.bound:g} | not measured | |"
        rounded = round(value, 2)  # the goals have two decimals
        met = rounded <= self.bound if self.at_most else rounded >= self.bound
        return f"| {self.number} | {self.what} | {sign} {self.bound:g} | {value:.3g} | {'met' if met else 'missed'} |"


def pick(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """The timed rows with these values; of a `mode`, whatever it chose."""
    mode = wanted.pop("mode", None)
    found = [row for row in rows if not row["note"] and all(row[name] == value for name, value in wanted.items())]
    if mode is not None:
        found = [row for row in found if row["mode"].split(" ")[0] == mode]
    if not found:
        raise Missing(wanted)
    return found


def times(rows: Sequence[Row], **wanted: str) -> dict[str, float]:
    """Milliseconds, eager and (on CUDA, where there are) of a graph's replay."""
    kinds = of_each(pick(rows, **wanted), ("timing",))
    return {kind: mean(float(row["p50_ms"]) for row in some) for (kind,), some in kinds.items()}


def ms(rows: Sequence[Row], **wanted: str) -> float:
    found = times(rows, **wanted)
    return found["graph"] if "graph" in found else found["eager"]


def ratio(rows: Sequence[Row], a: dict[str, str], b: dict[str, str]) -> float:
    """Time of `a` over time of `b`, of graphs where both have one, else eager both."""
    first, second = times(rows, **a), times(rows, **b)
    both = [kind for kind in ("graph", "eager") if kind in first and kind in second]
    if not both:
        raise Missing(a, b)
    return first[both[0]] / second[both[0]]


def over(ours: dict[str, str], theirs: dict[str, str], **both: str) -> Callable[[Sequence[Row]], float]:
    """Time of `ours` over time of `theirs`."""
    return lambda rows: ratio(rows, both | ours, both | theirs)


def faster(theirs: dict[str, str], ours: dict[str, str], **both: str) -> Callable[[Sequence[Row]], float]:
    """How many times as fast `ours` is."""
    return lambda rows: ratio(rows, both | theirs, both | ours)


def extras(rows: Sequence[Row]) -> float:
    """Milliseconds that 256 layers take beyond their linears."""
    shape = {"operation": "extras", "batch": "256"}
    return ms(rows, **shape, **OURS, mode="composed") - ms(rows, **shape, version="frozen linear")


def held_per_weight(rows: Sequence[Row]) -> float:
    """Static and graph bytes a layer, without the z of its tokens, over d^2."""
    row = pick(rows, **BIG, **AUTO, T="1", dtype="bfloat16", base="bfloat16")[0]
    return (float(row["static_bytes"]) + float(row["saved_bytes"])) / 1024**2


def saved_a_token(rows: Sequence[Row]) -> float:
    """Bytes saved for each further token, over T k itemsize."""
    long, short = (pick(rows, **BIG, **OURS, mode="factored", T=T)[0] for T in ("4096", "1024"))
    size = 2 if long["dtype"] == "bfloat16" else 4
    return (float(long["saved_bytes"]) - float(short["saved_bytes"])) / (3072 * 409 * size)


FROZEN, FULL, NAIVE = ({"version": name} for name in ("frozen linear", "full fine-tuning", "naive"))
REBUILT, SOLVE = {"version": "rebuilt weight"}, {"version": "linalg.solve"}
HALF = {**BIG, "dtype": "bfloat16", "base": "bfloat16"}
OP = {**HALF, "operation": "linear", "T": "16384"}  # from a given core: a model makes those of all layers at once
SMALL = {**OP, "d_in": "384", "d_out": "384", "k": "153"}
STEP = {"operation": "model", "dtype": "bfloat16"}


def cayley(batch: int, k: int) -> dict[str, str]:
    return {"operation": "cayley", "batch": str(batch), "k": str(k)}


GPU = [
    Goal("P1", "layer, T = 16k, over the frozen linear", True, 1.47, over(AUTO, FROZEN, **HALF, T="16384")),
    Goal("P1", "layer, T = 16k, over full fine-tuning", True, 0.98, over(AUTO, FULL, **HALF, T="16384")),
    Goal("P1", "op without the rotation, T = 16k, over the frozen linear", True, 1.47, over(AUTO, FROZEN, **OP)),
    Goal("P1", "op without the rotation, T = 16k, over full fine-tuning", True, 0.98, over(AUTO, FULL, **OP)),
    Goal("P2", "d = 384, T = 16k, over its floor", True, 1.10,
         lambda rows: mean(float(row["over_floor"]) for row in pick(rows, **SMALL, **AUTO, timing="graph"))),
    Goal("P2", "d = 384, T = 16k, against unfused library calls", False, 1.15,
         faster({**OURS, "backend": "reference", "mode": "composed"}, AUTO, **SMALL)),
    *(Goal("P3", f"layer, T = {T}, against the rebuilt weight", False, bound, faster(REBUILT, AUTO, **HALF, T=T))
      for T, bound in (("64", 8), ("1024", 2.5), ("4096", 1.5))),
    Goal("P3", "four micro-batches of 1k, against the rebuilt weight", False, 3,
         faster(REBUILT, AUTO, operation="accumulate", dtype="bfloat16", T="1024")),
    Goal("P4", "layer, T = 4k, against torch.compile of the naive one", False, 1.3,
         faster({"version": "naive compiled"}, AUTO, **HALF, T="4096")),
    *(Goal("P5", f"Cayley map {batch} x {k}, ms", True, bound,
           partial(ms, **cayley(batch, k), version="ssvd", backend="triton"))
      for batch, k, bound in ((256, 512, 2.0), (256, 409, 1.2), (128, 1024, 7.0))),
    *(Goal("P5", f"Cayley map {batch} x {k}, against torch.linalg.solve", False, bound,
           faster(SOLVE, {"version": "ssvd", "backend": "triton"}, **cayley(batch, k)))
      for batch, k, bound in ((256, 512, 12), (128, 1024, 20))),
    Goal("P6", "256 layers' rotations, compositions, projections, ms", True, 2.5, extras),
    *(Goal("P7", f"decoding, d = {d}, merged over nn.Linear", True, 1.00,
           over({**OURS, "mode": "merged"}, FROZEN, operation="decode", dtype="bfloat16", d_in=str(d)))
      for d in (1024, 4096)),
    Goal("P7", "decoding, d = 4096, unmerged over its floor", True, 1.25,
         lambda rows: mean(float(row["over_floor"])
                           for row in pick(rows, **AUTO, operation="decode", d_in="4096", timing="graph"))),
    Goal("P8", "saved bytes a token over 2 k", True, 1.00, saved_a_token),
    Goal("P8", "static and graph bytes over d^2", True, 8.5, held_per_weight),
    *(Goal("P9", f"{name}, step over the frozen base", True, 1.40, over(AUTO, FROZEN, **STEP, model=name))
      for name in ("whisper-large 16+16", "owsm-1b 12+12")),
    *(Goal("P9", f"{name}, step over full fine-tuning", True, 0.95, over(AUTO, FULL, **STEP, model=name))
      for name in ("whisper-large 16+16", "owsm-1b 12+12")),
    Goal("P9", "whisper-large, k = 256 on query and value, over LoRA r32", True, 1.08,
         over(AUTO, {"version": "LoRA r32"}, **STEP, model="whisper-large 16+16, query and value")),
]  # fmt: skip
CPU = [
    *(Goal("P10", f"Cayley map {batch} x {k}, against a loop of torch.linalg.solve", False, bound,
           faster(SOLVE, {"version": "ssvd", "backend": "ext"}, **cayley(batch, k)))
      for batch, k, bound in ((8, 256, 2), (8, 409, 2), (8, 512, 2), (1, 1024, 1.5))),
    *(Goal("P10", f"layer, T = {T}, against the rebuilt weight", False, bound, faster(REBUILT, AUTO, **BIG, T=T))
      for T, bound in (("64", 3.5), ("1024", 2), ("4096", 1.25))),
    Goal("P10", "layer, T = 4096, over full fine-tuning", True, 1.25, over(AUTO, FULL, **BIG, T="4096")),
    Goal("P8", "saved bytes a token over 4 k", True, 1.00, saved_a_token),
    Goal("", "step of Whisper tiny.en, over LoRA r16", True, 1.15,
         over({"version": "ssvd"}, {"version": "LoRA r16"}, operation="whisper")),
    *(Goal("P14", f"layer, T = {T}, activation form over the factored mode", True, 1.10,
           over({**OURS, "mode": "activation"}, {**OURS, "mode": "factored"}, **BIG, T=T))
      for T in ("64", "256", "1024")),
]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """One table a machine."""
    parts = []
    for group in of_each(latest(rows), MACHINE).values():
        about = group[0]
        goals = GPU if "NVIDIA" in about["device"] else CPU
        title = f"{about['device']}, {about['threads']} CPU threads, torch {about['torch']}, commit {about['commit']}"
        head = [f"## {title}", "", "| goal | what | bound | measured | |", "|---|---|---:|---:|---|"]
        parts.append("\n".join([*head, *(goal.line(group) for goal in goals)]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.goals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.csv")
    try:
        print(table(read_rows(parser.parse_args(argv).file)))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
