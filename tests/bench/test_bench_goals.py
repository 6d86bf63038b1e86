"""The table of goals says what the rows say, and "not measured" where there are none."""

from __future__ import annotations

import pytest

from bench import goals
from bench.records import COLUMNS, Table


def row(**values: object) -> dict[str, str]:
    machine = {"run": "r", "device": "a CPU", "threads": "2", "torch": "2", "commit": "c", "last": "1"}
    base = {"timing": "eager", "dtype": "float32", "base": "float32", "pass": "forward+backward", "round": "1"}
    return {name: str({**machine, **base, **values}.get(name, "")) for name in COLUMNS}


def cayley(version: str, backend: str, ms: float, **more: object) -> dict[str, str]:
    return row(operation="cayley", batch=8, k=256, version=version, backend=backend, p50_ms=ms, **more)


def line_of(text: str, what: str) -> str:
    (found,) = [line for line in text.splitlines() if what in line]
    return found


@pytest.mark.parametrize(("ours", "verdict"), [(1.0, "| 4 | met |"), (2.5, "| 1.6 | missed |")])
def test_a_ratio_is_compared_with_its_bound(ours, verdict):
    text = goals.table([cayley("linalg.solve", "torch", 4.0), cayley("ssvd", "ext", ours)])
    assert line_of(text, "Cayley map 8 x 256").endswith(verdict)
    assert "a CPU, 2 CPU threads, torch 2, commit c" in text


def test_rounds_are_averaged_graphs_compared_with_graphs_and_refused_rows_do_not_count():
    rows = [
        *(cayley("linalg.solve", "torch", ms) for ms in (3.0, 5.0)),
        cayley("ssvd", "ext", 2.0),
        cayley("ssvd", "ext", 1.0, timing="graph"),
        cayley("ssvd", "ext", 0.1, note="refused: wrong result"),
    ]
    assert "| 2 | met |" in line_of(goals.table(rows), "Cayley map 8 x 256")
    rows.append(cayley("linalg.solve", "torch", 1.5, timing="graph"))
    assert "| 1.5 | missed |" in line_of(goals.table(rows), "Cayley map 8 x 256")


def test_times_of_different_kinds_are_not_compared():
    rows = [cayley("linalg.solve", "torch", 4.0), cayley("ssvd", "ext", 1.0, timing="graph")]
    assert "not measured" in line_of(goals.table(rows), "Cayley map 8 x 256")


def test_what_no_row_holds_is_not_measured():
    text = goals.table([cayley("linalg.solve", "torch", 4.0)])
    goal_lines = [line for line in text.splitlines() if line.startswith("| P") or line.startswith("|  |")]
    assert len(goal_lines) == len(goals.CPU) and all("| not measured | |" in line for line in goal_lines)


def test_a_mode_stands_for_what_it_chose():
    shape = {"operation": "layer", "T": 64, "d_in": 1024, "d_out": 1024, "k": 409}
    rows = [
        row(**shape, version="ssvd", backend="auto", mode="auto (factored)", p50_ms=2.0),
        row(**shape, version="ssvd", backend="auto", mode="factored", p50_ms=9.0),
        row(**shape, version="rebuilt weight", backend="torch", p50_ms=8.0),
    ]
    assert "| 4 | met |" in line_of(goals.table(rows), "T = 64, against the rebuilt weight")


def test_a_gpu_has_goals_of_its_own(tmp_path, capsys):
    shape = {"operation": "layer", "T": 16384, "d_in": 1024, "d_out": 1024, "k": 409}
    shape |= {"dtype": "bfloat16", "base": "bfloat16", "device": "NVIDIA H200"}
    table = Table(tmp_path / "gpu.csv")
    table.append(row(**shape, version="ssvd", backend="auto", mode="auto (composed)", p50_ms=1.4))
    table.append(row(**shape, version="frozen linear", backend="torch", p50_ms=1.0))
    assert goals.main([str(tmp_path / "gpu.csv")]) == 0
    text = capsys.readouterr().out
    assert "| P1 | layer, T = 16k, over the frozen linear | <= 1.47 | 1.4 | met |" in text
    assert text.count("not measured") == len(goals.GPU) - 1
    with pytest.raises(SystemExit):
        goals.main([str(tmp_path / "none.csv")])
