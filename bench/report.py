"""The rows of a CSV file as Markdown: one table an operation, ratios within one case and pass."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from bench.harness import WHOLE
from bench.records import MACHINE, SHAPE, Row, latest, of_each

COUNTERPARTS = ("frozen linear", "full fine-tuning", "naive", "rebuilt weight", "linalg.solve", "svd float64")
LINE = ("version", "backend", "mode", "pass", "timing")
ABOUT = """\
Milliseconds: the medians of two interleaved rounds, and the range from the lower 20th to the higher 80th percentile.
Floor: the larger of FLOPs and bytes over the rates of a large matrix product and copy in the same run. `/ name`: time
over that version's in the same pass. Static: parameters, buffers and frozen inputs; saved: what a forward leaves for
the backward, besides its output (+ its input, where that is kept too)."""


def summary(rows: Sequence[Row], left: Sequence[str] = ()) -> str:
    """The latest rows of every case, by machine; `left` names cases that were planned and not measured."""
    parts = [_of_machine(group) for group in of_each(latest(rows), MACHINE).values()]
    if left:
        parts.append("\n".join(["## Not measured", "", *(f"- {name}" for name in left)]))
    return "\n\n".join(parts or ["Nothing was measured."]) + "\n"


def refusal(row: Row) -> str:
    """One line on a version that has no time, and why."""
    named = [str(row[name]) for name in LINE if row[name]]
    error = f" (error {row['error']}, tolerance {row['error_bound']})" if row["error"] else ""
    return f"{row['operation']} {_shape(row)}, {' '.join(named)}: {row['note']}{error}"


def _of_machine(rows: Sequence[Row]) -> str:
    about = rows[0]
    commits = list(of_each(rows, ("commit",)))
    where = f"{about['device']}, {about['threads']} CPU threads, torch {about['torch']}, Triton {about['triton']}"
    when = f"Commit {', '.join(commit for (commit,) in commits)}; measured {min(row['run'] for row in rows)}"
    when += f" to {max(row['run'] for row in rows)}." if len(of_each(rows, ("run",))) > 1 else "."
    lines = [f"# {where}", "", when, "", ABOUT]
    for (operation,), group in of_each(rows, ("operation",)).items():
        timed = [row for row in group if not row["note"]]
        if timed:
            lines += ["", f"## {operation}", "", *_table(timed, len(commits) > 1)]
    for title, word in (("Refused", "refused"), ("Not run", "not run")):
        found = dict.fromkeys(refusal(row) for row in rows if str(row["note"]).startswith(word))
        if found:
            lines += ["", f"## {title}", "", *(f"- {line}" for line in found)]
    return "\n".join(lines)


def _table(rows: Sequence[Row], commits: bool) -> list[str]:
    present = {row["version"] for row in rows}
    peers = [name for name in COUNTERPARTS if name in present]
    memory = any(row["static_bytes"] for row in rows)
    head = ["shape", *LINE, "p50 ms", "p20-p80 ms", "/ floor", *(f"/ {name}" for name in peers)]
    head += [*(["static MB", "saved MB"] if memory else []), "error (bound)", *(["commit"] if commits else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    for group in of_each(rows, ("dtype", "base", *SHAPE)).values():
        by_line = of_each(group, LINE)
        medians = {(row["version"], row["pass"], row["timing"]): _mean(some, "p50_ms")
                   for some in by_line.values() for row in some[:1]}  # fmt: skip
        for key, some in by_line.items():
            row, p50 = some[0], _mean(some, "p50_ms")
            others = [medians.get((peer, row["pass"], row["timing"])) for peer in peers]
            low, high = min(float(r["p20_ms"]) for r in some), max(float(r["p80_ms"]) for r in some)
            cells = [_shape(row), *key, " ".join(f"{float(r['p50_ms']):.4g}" for r in some), f"{low:.4g}-{high:.4g}"]
            cells.append(f"{_mean(some, 'over_floor'):.2f}" if row["over_floor"] else "")
            cells += [f"{p50 / other:.2f}" if other else "" for other in others]
            cells += _memory(row) if memory else []
            cells += [f"{row['error']} ({row['error_bound']})", *([row["commit"]] if commits else [])]
            lines.append(_line(cells))
    return lines


def _memory(row: Row) -> list[str]:
    if not row["static_bytes"] or row["pass"] not in (WHOLE, "step"):
        return ["", ""]
    static, saved, kept = (float(row[name] or 0) / 1e6 for name in ("static_bytes", "saved_bytes", "input_bytes"))
    if row["saved_bytes"] == "":
        return [f"{static:.2f}", ""]
    return [f"{static:.2f}", f"{saved:.2f}" + (f" + {kept:.2f}" if kept else "")]


def _mean(rows: Sequence[Row], name: str) -> float:
    return mean(float(row[name]) for row in rows)


def _shape(row: Row) -> str:
    dtype = row["dtype"] if row["base"] in ("", row["dtype"]) else f"{row['dtype']} on {row['base']}"
    return " ".join([dtype, *(f"{name}={row[name]}" for name in SHAPE if row[name])])


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
