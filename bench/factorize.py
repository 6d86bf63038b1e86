"""Factorising large weights: `OMP_NUM_THREADS=2 python -m bench.factorize --out bench/results/factorize-NAME.csv`.

Part "ways": the top k = 0.4 min(d_out, d_in) triplets of one random float32 weight by every way that was tried, taking
turns; errors are of the update U M V^T, stored in float32 as a layer stores it, against the float64 SVD's after signs
are repaired, which is what reloading an adapter sees. Part "models": `factorize`, hash and sketch included, once for
every linear layer of a model's shapes with random weights, or for `--sample` of each shape and the total extrapolated.
Rows are appended to the CSV file as they are measured; the Markdown table beside it is made from the file alone.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bench.records import machine
from ssvd_kernels.basis.factorize import factorize
from ssvd_kernels.basis.truncated_svd import _gram, by_gram, by_svd
from ssvd_kernels.ops.reference import skew

COLUMNS = ("part", "model", "d_out", "d_in", "k", "way", "count", "measured", "p20_ms", "p50_ms", "p80_ms",
           "over_svd", "error", "peak_bytes", "load", "device", "threads", "torch", "commit")  # fmt: skip
WAYS_SHAPES = [(1280, 1280), (5120, 1280), (1280, 5120)]
BASELINE = "svd float64"
Row = dict[str, object]

# (d_out, d_in) -> number of layers. Whisper-large-v3: 32 encoder layers of 6 and 32 decoder layers of 10 linears.
# OWSM-1B: 18 E-Branchformer layers of 11 (attention 4, two feed-forwards of 2, cgMLP 2, merge 1), 18 decoder layers of
# 10, the front end's projection and the output layer: 380, 91 of them wide; the last two shapes are reconstructed.
MODELS: dict[str, dict[tuple[int, int], int]] = {
    "whisper-large-v3": {(1280, 1280): 384, (5120, 1280): 64, (1280, 5120): 64},
    "owsm-1b": {(1024, 1024): 216, (4096, 1024): 72, (1024, 4096): 54, (1024, 2048): 36, (1024, 19456): 1,
                (50002, 1024): 1},
}  # fmt: skip


def _svd32(W: Tensor, k: int) -> tuple[Tensor, ...]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].mT


def _refined(W: Tensor, k: int) -> tuple[Tensor, ...]:
    """float32 eigenvectors of the Gram matrix, refined twice by float64 products (Ogita and Aishima 2018)."""
    if W.shape[0] < W.shape[1]:
        return _refined(W.mT, k)[::-1]
    A = W.double()
    G = A.mT @ A
    Q = torch.linalg.eigh(G.float())[1].double()
    for _ in range(2):
        R, S = torch.eye(len(Q), dtype=Q.dtype) - Q.mT @ Q, Q.mT @ (G @ Q)
        values = S.diagonal() / (1 - R.diagonal())
        E = (S + values * R) / (values - values.unsqueeze(1))
        Q = Q + Q @ E.diagonal_scatter(R.diagonal() / 2)
    values, V = values[-k:].flip(0), Q[:, -k:].flip(1)
    U = A @ (V / values.sqrt())
    return U, values.sqrt(), V


def _randomised(W: Tensor, k: int) -> tuple[Tensor, ...]:
    U, S, V = torch.svd_lowrank(W.double(), q=min(k + 32, *W.shape), niter=8)
    return U[:, :k], S[:k], V[:, :k]


def _two_at_once(W: Tensor, k: int) -> tuple[Tensor, ...] | None:
    """Two weights on two threads: the time is that of both, and is halved where it is reported."""
    found: list[tuple[Tensor, ...] | None] = [None, None]
    before = torch.get_num_threads()

    def run(index: int) -> None:
        torch.set_num_threads(1)
        found[index] = by_gram(W, k)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    return found[0]


def _only_eigh(W: Tensor, k: int) -> None:
    """What no way by the Gram matrix can do without."""
    torch.linalg.eigh(_gram(W if W.shape[0] >= W.shape[1] else W.mT))


Way = Callable[[Tensor, int], "tuple[Tensor, ...] | None"]
WAYS: dict[str, Way] = {
    BASELINE: by_svd,
    "svd float32": _svd32,
    "gram + Jacobi (used)": by_gram,
    "gram + Jacobi, two layers at once": _two_at_once,
    "gram and eigh alone": _only_eigh,
    "eigh float32, refined": _refined,
    "randomised, 8 iterations": _randomised,
}


def _update(found: Sequence[Tensor], signs: Tensor, core: Tensor) -> Tensor:
    """U core V^T of factors that are stored in float32."""
    U, V = (found[index].float().double() * signs for index in (0, 2))
    return U @ core @ V.mT


def measure_ways(d_out: int, d_in: int, repeats: int) -> list[Row]:
    W, k = torch.randn(d_out, d_in) / d_in**0.5, int(0.4 * min(d_out, d_in))
    exact = by_svd(W, k)
    K = skew(torch.randn(k * (k - 1) // 2, dtype=torch.float64) / k, k)
    eye = torch.eye(k, dtype=torch.float64)
    core = exact[1].unsqueeze(1) * torch.linalg.solve(eye + K, -2 * K)
    reference = _update(exact, torch.ones(k), core)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(WAYS), len(WAYS)):
            start = time.perf_counter()
            WAYS[name](W, k)
            times[name].append(1e3 * (time.perf_counter() - start) / (2 if WAYS[name] is _two_at_once else 1))
    rows: list[Row] = []
    for name, samples in times.items():
        found, error = WAYS[name](W, k), ""
        if found is not None:
            signs = torch.where((found[2] * exact[2]).sum(0) < 0, -1.0, 1.0)
            error = f"{float((_update(found, signs, core) - reference).norm() / reference.norm()):.2g}"
        over = statistics.median(samples) / statistics.median(times[BASELINE])
        rows.append({"part": "ways", "d_out": d_out, "d_in": d_in, "k": k, "way": name, "measured": repeats,
                     "over_svd": f"{over:.3g}", "error": error, **_quantiles(samples)})  # fmt: skip
    return rows


def measure_shape(model: str, d_out: int, d_in: int, count: int, sample: int) -> Row:
    k, samples, peak = int(0.4 * min(d_out, d_in)), [], 0
    for _ in tqdm(range(min(count, sample)), desc=f"{model} {d_out}x{d_in}", file=sys.stderr):
        W = torch.randn(d_out, d_in) / d_in**0.5
        before = _reset_peak()
        start = time.perf_counter()
        factorize(W, k)
        samples.append(1e3 * (time.perf_counter() - start))
        peak = max(peak, _memory("VmHWM") - before)
    return {"part": "models", "model": model, "d_out": d_out, "d_in": d_in, "k": k, "way": "factorize", "count": count,
            "measured": len(samples), "peak_bytes": peak, **_quantiles(samples)}  # fmt: skip


def _quantiles(samples: Sequence[float]) -> Row:
    values = torch.tensor(samples, dtype=torch.float64)
    return {f"p{q}_ms": f"{values.quantile(q / 100).item():.4g}" for q in (20, 50, 80)}


def _reset_peak() -> int:
    """Starts a new peak of resident memory (Linux, glibc) and returns what is resident now, free heap given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def table(rows: Sequence[Row]) -> str:
    """Markdown of all that the file holds."""
    about = sorted({f"{row['device']}, {row['threads']} threads, torch {row['torch']}." for row in rows})
    lines = [
        "Made by `python -m bench.factorize` from the CSV file of the same name. Float32 weights, k = 40 %.",
        *about,
    ]
    ways = [row for row in rows if row["part"] == "ways"]
    if ways:
        columns = ("d_out x d_in", "way", "runs", "median ms (20 %, 80 %)", "over svd float64", "error once reloaded")
        cells = [(_shape(row), row["way"], row["measured"], _spread(row), row["over_svd"], row["error"] or "-")
                 for row in ways]  # fmt: skip
        lines += [_loads(ways), "", *_markdown(columns, cells)]
    for model in MODELS:
        parts = [row for row in rows if row["model"] == model]
        if not parts:
            continue
        columns = ("d_out x d_in", "layers", "measured", "median ms (20 %, 80 %)", "working memory, MB")
        cells = [(_shape(row), row["count"], row["measured"], _spread(row), f"{int(str(row['peak_bytes'])) / 1e6:.0f}")
                 for row in parts]  # fmt: skip
        total = sum(float(str(row["p50_ms"])) * int(str(row["count"])) for row in parts) / 1e3
        layers, measured = (sum(int(str(row[name])) for row in parts) for name in ("count", "measured"))
        lines += ["", f"**{model}**, layer by layer. {_loads(parts)}", "", *_markdown(columns, cells)]
        lines += ["", f"Medians times layers: {total:.0f} s for {layers} layers, of which {measured} were measured."]
    return "\n".join(lines) + "\n"


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> list[str]:
    rows = [columns, ["---"] * len(columns), *cells]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def _shape(row: Row) -> str:
    return f"{row['d_out']} x {row['d_in']}"


def _spread(row: Row) -> str:
    return f"{row['p50_ms']} ({row['p20_ms']}, {row['p80_ms']})"


def _loads(rows: Sequence[Row]) -> str:
    """Whether others used the machine: a load above the number of threads makes times long, ratios less so."""
    loads = [float(str(row["load"])) for row in rows]
    return f"Load of the machine before it began: {min(loads):.1f} to {max(loads):.1f}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.factorize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, help="CSV file, appended to; a .md file is written beside it"
    )
    parser.add_argument("--parts", nargs="+", choices=("ways", *MODELS), default=["ways", *MODELS])
    parser.add_argument("--repeats", type=int, default=5, help="of each way (%(default)s)")
    parser.add_argument("--sample", type=int, default=10**6, help="layers of each shape of a model (default: all)")
    parser.add_argument("--quick", action="store_true", help="an eighth of each dimension, to see that everything runs")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    about, small = machine(torch.device("cpu")), 8 if options.quick else 1
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        if new:
            writer.writeheader()
        for part in options.parts:
            shapes = dict.fromkeys(WAYS_SHAPES, 1) if part == "ways" else MODELS[part]
            for (d_out, d_in), count in shapes.items():
                size = (d_out // small, d_in // small)
                load = f"{os.getloadavg()[0]:.2g}"
                rows = (measure_ways(*size, options.repeats) if part == "ways"
                        else [measure_shape(part, *size, count, options.sample)])  # fmt: skip
                writer.writerows({**row, **about, "load": load} for row in rows)
                file.flush()
    with options.out.open(newline="") as file:
        text = table(list(csv.DictReader(file)))
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
