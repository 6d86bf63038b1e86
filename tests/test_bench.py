"""The benchmark's own promises: its gate, its rows, interruption, and the script for CUDA machines without one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ssvd_kernels as sk
from bench import cases, run
from bench.harness import COLUMNS, ROUNDS, Case, Table, Version, gate, relative_error

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return list(reader)


def bench(path: Path, *options: str) -> int:
    return run.main(["--quick", "--device", "cpu", "--out", str(path), *options])


def test_a_quick_run_measures_every_version_of_every_operation(tmp_path, capsys):
    assert bench(tmp_path / "new" / "cpu.csv") == 0
    rows = rows_of(tmp_path / "new" / "cpu.csv")
    versions = {(row["operation"], row["version"], row["backend"], row["mode"].partition(" ")[0]) for row in rows}
    assert len(rows) == ROUNDS * len(versions)
    for operation, peers in {
        "linear": {"frozen linear", "full fine-tuning", "naive"},
        "layer": {"frozen linear", "full fine-tuning", "naive", "rebuilt weight"},
        "cayley": {"linalg.solve"},
    }.items():
        assert {version for name, version, *_ in versions if name == operation} == peers | {"ssvd"}
    for mode in ("composed", "factored"):
        assert ("linear", "ssvd", "reference", mode) in versions
    assert ("layer", "ssvd", "auto", "auto") in versions
    for row in rows:
        optional = {"mode", "peak_bytes", "note", "triton", *(("T", "d_in", "d_out") if row["batch"] else ("batch",))}
        assert not [name for name in COLUMNS if not row[name] and name not in optional], row
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= float(row["error_bound"])
        assert float(row["flops"]) > 0 and float(row["floor_ms"]) > 0
        assert row["note"] == "" and int(row["threads"]) == torch.get_num_threads()
    assert {row["over_baseline"] for row in rows if row["version"] == row["baseline"]} == {"1"}
    table = (tmp_path / "new" / "cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"## {operation}" in table for operation in ("linear", "layer", "cayley"))


def test_rows_are_appended_to_those_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "table", lambda device, quick: [cases.cayley_case(1, 4)])
    path = tmp_path / "a.csv"
    assert bench(path) == 0
    first = path.read_bytes()
    assert bench(path) == 0
    assert path.read_bytes().startswith(first) and len(rows_of(path)) == 2 * first.count(b"\n") - 2


def test_a_file_with_other_columns_is_refused_and_stays(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stopped:
        bench(path)
    assert stopped.value.code == 2 and "other columns" in capsys.readouterr().err
    assert path.read_text() == "a,b\n1,2\n"


def test_a_wrong_version_is_refused_and_reports_no_speed(tmp_path, monkeypatch, capsys):
    case = cases.linear_case(torch.float32, 24, 32, 48, 8)

    def no_kernel(y, dx, dcore):
        raise RuntimeError("no such kernel")

    defects = {
        "scaled": lambda y, dx, dcore: (y * (1 + 1e-5), dx, dcore),
        "nan": lambda y, dx, dcore: (y.index_fill(0, torch.tensor([3]), float("nan")), dx, dcore),
        "nan gradient": lambda y, dx, dcore: (y, dx, dcore.index_fill(0, torch.tensor([3]), float("nan"))),
        "shape": lambda y, dx, dcore: (y, dx, dcore[None]),
        "count": lambda y, dx, dcore: (y, dx),
        "wrong gradient": lambda y, dx, dcore: (y, dx, dcore.mT.contiguous()),
        "raises": no_kernel,
    }

    def build(device: torch.device) -> list[Version]:
        *good, last = case.build(device)
        wrong = [replace(last, name=name, run=lambda f=f: f(*last.run())) for name, f in defects.items()]
        return [good[0], last, *wrong]

    monkeypatch.setattr(cases, "table", lambda device, quick: [replace(case, build=build)])
    assert bench(tmp_path / "a.csv") == 1
    rows = rows_of(tmp_path / "a.csv")
    refused = [row for row in rows if row["note"]]
    assert [row["version"] for row in refused] == list(defects)
    for row in refused:
        assert row["note"].startswith("refused: ")
        assert not any(row[name] for name in ("p20_ms", "p50_ms", "p80_ms", "over_floor", "over_baseline"))
    assert [row["version"] for row in rows if row["p50_ms"]] == ROUNDS * ["frozen linear", "ssvd"]
    assert "## Refused" in capsys.readouterr().out


def test_the_gate_bounds_each_result_on_its_own():
    exact = [torch.ones(64, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    version = Version("v", lambda: (), exact, [1e-6, 1e-3], 1, 1)
    assert gate(version, [torch.ones(64), torch.full((8,), 1.0005)])[2]
    error, bound, good = gate(version, [torch.full((64,), 1.0005), torch.ones(8)])
    assert not good and bound == 1e-6 and error == pytest.approx(5e-4, rel=1e-3)
    assert relative_error(torch.tensor([float("inf")]), torch.ones(1, dtype=torch.float64)) == float("inf")


def test_the_gate_runs_with_nan_in_memory_that_nobody_wrote(tmp_path, monkeypatch):
    def run() -> tuple[torch.Tensor, ...]:
        return (torch.empty(64).isnan().float(),)

    version = Version("unwritten", run, [torch.zeros(64, dtype=torch.float64)], [1e-6], 1, 1)
    case = Case("linear", torch.float32, lambda device: [version], "unwritten", T=1)
    monkeypatch.setattr(cases, "table", lambda device, quick: [case])
    torch.use_deterministic_algorithms(False)  # not the suite's poison but the benchmark's own
    assert bench(tmp_path / "a.csv") == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    def interrupt(device: torch.device) -> list[Version]:
        raise KeyboardInterrupt

    first, second = cases.cayley_case(2, 8), cases.linear_case(torch.float32, 24, 32, 48, 8)
    monkeypatch.setattr(cases, "table", lambda device, quick: [first, replace(second, build=interrupt)])
    path = tmp_path / "a.csv"
    assert bench(path) == 130
    assert {row["operation"] for row in rows_of(path)} == {"cayley"}
    assert f"## Not measured\n\n- {second}" in path.with_suffix(".md").read_text()


def test_no_case_is_begun_after_the_limit(tmp_path, capsys):
    assert bench(tmp_path / "a.csv", "--limit-seconds", "0") == 0
    assert rows_of(tmp_path / "a.csv") == []
    assert capsys.readouterr().out.count("\n- ") == 3


def test_rows_survive_a_killed_process(tmp_path):
    path = tmp_path / "a.csv"
    code = f"import os, pathlib; from bench.harness import *; t = Table(pathlib.Path({str(path)!r}))\n"
    code += "t.append(dict.fromkeys(COLUMNS, 'a,b')); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 9
    assert [row["note"] for row in rows_of(path)] == ["a,b"]
    Table(path).append(dict.fromkeys(COLUMNS, 2))
    assert len(rows_of(path)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_clearly_where_there_is_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cuda", "--out", str(tmp_path / "a.csv")])
    assert stopped.value.code == 2 and "no CUDA device is visible" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


# -- bench/gpu.sh --------------------------------------------------------------------------------------------------


def gpu_script(out: Path, python: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "OUT": str(out), "PYTHON": python}
    return subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_the_gpu_script_is_valid_shell():
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True, timeout=20)


def fake_python(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_the_gpu_script_says_what_is_missing(tmp_path):
    no_torch = "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1"
    no_cuda = 'case "$2" in *get_device_capability*) exit 1;; *) echo 9.9.9;; esac'
    for name, python, message in (
        ("a", str(tmp_path / "none"), "is not a command"),
        ("b", fake_python(tmp_path / "python-b", no_torch), "cannot import torch: ModuleNotFoundError"),
        ("c", fake_python(tmp_path / "python-c", no_cuda), "torch 9.9.9, imported by"),
    ):
        done = gpu_script(tmp_path / name, python)
        assert done.returncode == 1 and message in done.stderr, done
        assert message in (tmp_path / name / "summary.txt").read_text()
    assert "sees no CUDA device" in done.stderr


def test_the_gpu_script_goes_on_after_a_failed_stage_and_fails_itself(tmp_path):
    """A Python whose torch pretends to see a device: every stage fails, each is reported, few files are left."""
    python = fake_python(tmp_path / "python", 'case "$2" in *print*) echo 9.0;; *) echo broken >&2; exit 3;; esac')
    done = gpu_script(tmp_path / "out", python)
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for stage in ("build for sm_9.0", "info", "GPU tests", "compute-sanitizer", "benchmark", "op and kernel tests"):
        assert any(line.startswith(stage) and "FAILED" in line for line in summary.splitlines()), summary
    assert done.stdout.rstrip().endswith(summary.rstrip())
    assert len(list((tmp_path / "out").iterdir())) <= 8


# -- timings by pytest-benchmark -----------------------------------------------------------------------------------


def test_layer_passes(benchmark):
    p = cases.Problem.draw(torch.float32, 128, 256, 256, 102, CPU)
    layer, x = cases.ssvd_layer(p, 102), cases.leaf(p.x)
    leaves = (x, layer.theta, layer.delta_sigma)
    dx, dtheta, ddelta = benchmark.pedantic(
        lambda: torch.autograd.grad(layer(x), leaves, p.dy), rounds=20, warmup_rounds=2
    )
    assert dx.isfinite().all() and dtheta.shape == layer.theta.shape and ddelta.shape == (102,)


def test_cayley_passes(benchmark):
    theta, dE = cases.leaf(torch.randn(4, 128 * 127 // 2) / 128), torch.randn(4, 128, 128)
    (dtheta,) = benchmark.pedantic(
        lambda: torch.autograd.grad(sk.cayley_delta(theta, 128), theta, dE), rounds=20, warmup_rounds=2
    )
    assert dtheta.isfinite().all() and dtheta.shape == theta.shape
