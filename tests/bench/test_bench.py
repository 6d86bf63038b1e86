"""The benchmark's own promises: its gate, its rows, interruption and resumption."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import ssvd_kernels as sk
from bench import cases, run
from bench.harness import BACKWARD, FORWARD, ROUNDS, WHOLE, Case, Passes, Version, gate, relative_error
from bench.layers import Problem, ssvd_layer
from bench.records import CASE, COLUMNS, Table, latest, of_each, read_rows
from bench.versions import leaf

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.csv"


def bench(path: Path, *options: str, status: int = 0) -> list[dict[str, str]]:
    """The rows of the file after a run that ends with `status`."""
    assert run.main(["--quick", "--device", "cpu", "--out", str(path), *options]) == status
    return read_rows(path) if path.exists() else []


def only(monkeypatch: pytest.MonkeyPatch, *planned: Case) -> None:
    monkeypatch.setattr(cases, "table", lambda device, quick: list(planned))


TINY = (24, 32, 48, 8)
INTERRUPT = Mock(side_effect=KeyboardInterrupt)
PLAIN = {"frozen linear", "full fine-tuning", "naive", "rebuilt weight", "ssvd"}
OTHERS = {"LoRA r16", "LoRA r32", "OFT", "PSOFT"}


@pytest.mark.slow
def test_a_quick_run_measures_every_version_of_every_operation(tmp_path, capsys):
    rows = bench(tmp_path / "new" / "cpu.csv")
    timed = [row for row in rows if not row["note"]]
    lines = of_each(timed, ("operation", "model", "version", "backend", "mode", "pass"))
    assert all(len(group) == ROUNDS for group in lines.values())
    absent = {row["version"] for row in rows if row["note"].startswith("not run: ")}
    assert absent <= OTHERS and all(row["note"] == "" or row["version"] in absent for row in rows)
    for operation, versions in {
        "linear": PLAIN - {"rebuilt weight"},
        "layer": PLAIN | OTHERS,
        "cayley": {"linalg.solve", "parametrizations.orthogonal", "ssvd"},
        "accumulate": PLAIN,
        "model": PLAIN | OTHERS,
        "extras": {"frozen linear", "naive", "ssvd"},
        "decode": {"frozen linear", "naive", "ssvd"},
        "inject": {"ssvd", "svd float32", "svd float64", "PSOFT", "LoRA r16"},
    }.items():
        mine = [row for row in timed if row["operation"] == operation]
        assert {row["version"] for row in mine} == versions - absent, operation
    modes = {(row["operation"], row["version"], row["backend"], row["mode"].partition(" ")[0]) for row in timed}
    assert {("linear", "ssvd", "reference", mode) for mode in ("composed", "factored")} <= modes
    assert {("layer", "ssvd", "auto", mode) for mode in ("auto", "composed", "factored")} <= modes
    for row in timed:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert float(row["error"]) <= float(row["error_bound"])
        assert int(row["threads"]) == torch.get_num_threads() and row["commit"]
        whole = row["pass"] in ("forward+backward", "step")
        assert not whole or (float(row["flops"]) > 0 and float(row["floor_ms"]) > 0)
        memory = row["operation"] in ("linear", "layer", "model", "extras")
        assert all(bool(row[name]) == memory for name in ("saved_bytes", "input_bytes")), row
        assert bool(row["static_bytes"]) == (memory or row["operation"] == "decode")
    assert {row["over_baseline"] for row in timed if row["version"] == row["baseline"]} == {"1"}
    assert [row["last"] for row in rows].count("1") == len(of_each(rows, CASE))
    table = (tmp_path / "new" / "cpu.md").read_text()
    assert table in capsys.readouterr().out
    assert all(f"## {name}" in table for name in cases.OPERATIONS if name != "whisper")  # which needs its data


def test_the_passes_of_a_layer_are_timed_together_and_apart(path, monkeypatch):
    case = cases.layer_case(torch.float32, *TINY)
    only(monkeypatch, replace(case, build=lambda device: case.build(device)[:1]))
    rows = bench(path)
    assert [row["pass"] for row in rows] == [p for p in (WHOLE, FORWARD, BACKWARD) for _ in range(ROUNDS)]
    assert [bool(row["floor_ms"]) for row in rows] == [True] * ROUNDS + [False] * 2 * ROUNDS


def test_a_layer_in_training_keeps_nothing_of_its_parameters():
    """So that a repeated forward and backward is what a step pays; .data hides the change from what looks for one."""
    for version in cases.layer_case(torch.float32, *TINY).build(CPU):
        if version.name == "ssvd":
            (before,), theta = version.run.only_forward(), version.run.leaves[1]
            theta.data += 0.1
            assert not torch.equal(version.run.only_forward()[0], before), version


def test_rows_are_appended_to_those_of_an_earlier_run(path, monkeypatch):
    only(monkeypatch, cases.cayley_case(1, 4))
    bench(path)
    first = path.read_bytes()
    assert len(bench(path)) == 2 * first.count(b"\n") - 2
    assert path.read_bytes().startswith(first)


def test_a_wrong_version_is_refused_and_reports_no_speed(path, monkeypatch, capsys):
    case = cases.linear_case(torch.float32, *TINY)

    defects = {
        "scaled": lambda y, dx, dcore: (y * (1 + 1e-5), dx, dcore),
        "nan": lambda y, dx, dcore: (y.index_fill(0, torch.tensor([3]), float("nan")), dx, dcore),
        "nan gradient": lambda y, dx, dcore: (y, dx, dcore.index_fill(0, torch.tensor([3]), float("nan"))),
        "shape": lambda y, dx, dcore: (y, dx, dcore[None]),
        "count": lambda y, dx, dcore: (y, dx),
        "wrong gradient": lambda y, dx, dcore: (y, dx, dcore.mT.contiguous()),
        "raises": Mock(side_effect=RuntimeError("no such kernel")),
    }

    def build(device: torch.device) -> list[Version]:
        *good, last = case.build(device)
        wrong = [replace(last, name=name, run=lambda f=f: f(*last.run())) for name, f in defects.items()]
        return [good[0], last, *wrong]

    only(monkeypatch, replace(case, build=build))
    rows = bench(path, status=1)
    refused = [row for row in rows if row["note"]]
    assert [row["version"] for row in refused] == list(defects)
    for row in refused:
        assert row["note"].startswith("refused: ")
        assert not any(row[name] for name in ("p20_ms", "p50_ms", "p80_ms", "over_floor", "over_baseline"))
    assert [row["version"] for row in rows if row["p50_ms"]] == ROUNDS * ["frozen linear", "ssvd"]
    assert "## Refused" in capsys.readouterr().out


def test_the_gate_bounds_each_result_on_its_own():
    exact, bounds = [torch.ones(64, dtype=torch.float64), torch.ones(8, dtype=torch.float64)], [1e-6, 1e-3]
    assert gate([torch.ones(64), torch.full((8,), 1.0005)], exact, bounds)[2]
    error, bound, good = gate([torch.full((64,), 1.0005), torch.ones(8)], exact, bounds)
    assert not good and bound == 1e-6 and error == pytest.approx(5e-4, rel=1e-3)  # float32's 1.0005 is off by 6e-8
    assert relative_error(torch.tensor([float("inf")]), torch.ones(1, dtype=torch.float64)) == float("inf")


def test_the_gate_runs_with_nan_in_memory_that_nobody_wrote(path, monkeypatch, as_trained):
    """Not the suite's poison but the benchmark's own."""
    exact = [torch.zeros(64, dtype=torch.float64)]
    version = Version("unwritten", lambda: (torch.empty(64).isnan().float(),), exact, [1e-6])
    only(monkeypatch, Case("linear", torch.float32, lambda device: [version], "unwritten", T=1))
    bench(path, status=1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("wrong", [FORWARD, BACKWARD])
def test_a_pass_that_is_wrong_on_its_own_is_refused(path, monkeypatch, wrong):
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)  # the first call is the gate's of the whole; the next one is the first pass apart
        return x * (2 if len(calls) == 1 or wrong == BACKWARD else 3)

    x, dy = torch.ones(4, requires_grad=True), torch.ones(4)
    passes = Passes(forward, [x], dy)
    if wrong == BACKWARD:
        monkeypatch.setattr(Passes, "only_backward", lambda self: lambda: (torch.zeros(4),))
    exact = [torch.full((4,), 2.0, dtype=torch.float64)] * 2
    case = Case("layer", torch.float32, lambda device: [Version("v", passes, exact, [1e-6] * 2)], "v", passes=(wrong,))
    calls += [1] if wrong == FORWARD else []
    only(monkeypatch, case)
    (row,) = bench(path, status=1)
    assert row["pass"] == wrong and row["note"] == "refused: wrong result" and not row["p50_ms"]


@pytest.mark.slow
def test_a_peer_that_is_not_there_is_named_and_refuses_nothing(path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    only(monkeypatch, cases.layer_case(torch.float32, *TINY), cases.inject_case(16, 16, 4))
    notes = [(row["operation"], row["version"]) for row in bench(path) if row["note"]]
    assert sorted(notes) == [*(("inject", n) for n in ("LoRA r16", "PSOFT")), *(("layer", n) for n in sorted(OTHERS))]
    assert "## Not run" in (text := capsys.readouterr().out) and "## Refused" not in text


def test_a_case_cut_in_two_keeps_its_rows_and_is_not_complete(path, monkeypatch):
    case = cases.layer_case(torch.float32, *TINY)

    def build(device: torch.device) -> list[Version]:
        first = case.build(device)[0]
        assert isinstance(first.run, Passes)
        return [replace(first, run=replace(first.run, forward=partial(stop, first.run.forward)))]

    def stop(forward: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        if "only_backward" in {frame.name for frame in traceback.extract_stack()}:
            raise KeyboardInterrupt
        return forward(*leaves)

    only(monkeypatch, replace(case, build=build))
    rows = bench(path, status=130)
    assert [row["pass"] for row in rows] == [WHOLE] * ROUNDS + [FORWARD] * ROUNDS
    assert not any(row["last"] for row in rows)
    only(monkeypatch, replace(case, build=lambda device: case.build(device)[:1]))
    rows = bench(path, "--resume")
    assert rows[-1]["last"] == "1" and len(rows) == 5 * ROUNDS
    assert f"- {case}" not in path.with_suffix(".md").read_text()


def test_an_interrupted_run_keeps_what_it_measured_and_resuming_skips_that(path, monkeypatch, capsys):
    first, second = cases.cayley_case(1, 4), cases.cayley_case(2, 4)
    only(monkeypatch, first, replace(second, build=INTERRUPT))
    before = bench(path, status=130)
    assert {row["batch"] for row in before} == {"1"}
    assert f"## Not measured\n\n- {second}" in path.with_suffix(".md").read_text()
    only(monkeypatch, replace(first, build=INTERRUPT), second)
    after = bench(path, "--resume")
    assert f"skipped, measured at commit {before[0]['commit']}: {first}" in capsys.readouterr().out
    assert after[: len(before)] == before and {row["batch"] for row in after[len(before) :]} == {"2"}
    text = path.with_suffix(".md").read_text()
    assert "k=4 batch=1" in text and "k=4 batch=2" in text and "Not measured" not in text


def test_the_table_shows_the_latest_run_of_each_case_and_can_be_made_again(path, monkeypatch):
    only(monkeypatch, cases.cayley_case(1, 4))
    rows, table = bench(path), Table(path)
    for row in rows:
        table.append({**row, "run": "9999", "commit": "later", "p50_ms": "123.456"})
    assert {row["commit"] for row in latest(read_rows(path))} == {"later"}
    for row in rows:  # of a still later run that did not complete the case
        table.append({**row, "run": "99999", "commit": "cut", "last": ""})
    table.append({**rows[0], "batch": "7", "commit": "other"})
    assert run.main(["--table", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert "123.5" in text and "cut" not in text and "| commit |" in text and "| other |" in text


def test_operations_can_be_chosen_and_listed(path, capsys):
    bench(path, "--only", "cayley,linear", "--list")
    listed = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in listed if line] == ["linear", "cayley"] and not path.exists()
    assert {row["operation"] for row in bench(path, "--only", "cayley")} == {"cayley"}


def test_no_case_is_begun_after_the_limit(path, capsys):
    assert bench(path, "--limit-seconds", "0") == [] and path.exists()
    assert capsys.readouterr().out.count("\n- ") == len(cases.table(CPU, quick=True))


def test_rows_survive_a_killed_process(path):
    code = f"import os, pathlib; from bench.records import *; t = Table(pathlib.Path({str(path)!r}))\n"
    code += "t.append(dict.fromkeys(COLUMNS, 'a,b')); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 9
    assert [row["note"] for row in read_rows(path)] == ["a,b"]
    Table(path).append(dict.fromkeys(COLUMNS, 2))
    assert len(read_rows(path)) == 2


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ([], "a,b\n1,2\n", "other columns"),
        (["--only", "cayly"], None, "--only must be one or more of layer, linear"),
        (["--table", "none.csv"], None, "none.csv"),
        pytest.param(["--device", "cuda"], None, "no CUDA device is visible", marks=NO_CUDA),
    ],
)
def test_what_cannot_be_run_is_refused_and_changes_no_file(path, capsys, arguments, content, message):
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        bench(path, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (path.read_text() if path.exists() else None) == content


def test_layer_passes(benchmark):
    x, dy, f = Problem.draw(torch.float32, 128, 256, 256, 102, CPU)
    layer, x = ssvd_layer(f), leaf(x)
    leaves = (x, layer.theta, layer.delta_sigma)

    def step() -> tuple[torch.Tensor, ...]:
        layer.train()  # as a changed parameter would, it drops what the layer keeps
        return torch.autograd.grad(layer(x), leaves, dy)

    dx, dtheta, ddelta = benchmark.pedantic(step, rounds=20, warmup_rounds=2)
    assert dx.isfinite().all() and dtheta.shape == layer.theta.shape and ddelta.shape == (102,)


def test_cayley_passes(benchmark):
    theta, dE = leaf(torch.randn(4, 128 * 127 // 2) / 128), torch.randn(4, 128, 128)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sk.cayley_delta(theta, 128), theta, dE)

    (dtheta,) = benchmark.pedantic(step, rounds=20, warmup_rounds=2)
    assert dtheta.isfinite().all() and dtheta.shape == theta.shape
