"""Figures from a CSV file alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_bench_goals import row

from bench import plot
from bench.records import Table

pytest.importorskip("matplotlib")

LAYER = {"operation": "layer", "d_in": 8, "d_out": 8, "k": 4, "backend": "auto"}
LAYER |= {"static_bytes": 100, "saved_bytes": 50, "input_bytes": 0}
CAYLEY = {"operation": "cayley", "batch": 2, "k": 4, "p50_ms": 1}
MODEL = {"operation": "model", "model": "m", "T": 4, "p50_ms": 1, "pass": "step"}


def write(path: Path, *rows: dict[str, str]) -> Path:
    table = Table(path)
    for each in rows:
        table.append(each)
    return path


def layer(version: str, T: int, p50: float, mode: str = "") -> dict[str, str]:
    return row(**LAYER, version=version, T=T, p50_ms=p50, mode=mode)


ROWS = [
    *(layer("frozen linear", T, 1) for T in (64, 4096)),
    *(layer("ssvd", T, 2, mode) for T in (64, 4096) for mode in ("auto (composed)", "composed", "factored")),
    *(row(**CAYLEY, version="ssvd", backend=name) for name in ("ext", "triton", "reference")),
    *(row(**CAYLEY, version=name, backend="torch") for name in ("linalg.solve", "parametrizations.orthogonal")),
    *(row(**MODEL, version=name) for name in ("frozen linear", "ssvd")),
]


def drawn(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.png")}


def test_every_figure_is_drawn_from_a_file(tmp_path, capsys):
    assert plot.main([str(write(tmp_path / "a.csv", *ROWS))]) == 0
    sizes = drawn(tmp_path)
    assert set(sizes) == {f"a-{name}.png" for name in ("layer", "cayley", "model", "memory", "crossover")}
    for name, size in sizes.items():
        assert size > 5000 and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("is drawn") == 5


def test_figures_without_rows_are_named_and_not_drawn(tmp_path, capsys):
    assert plot.main([str(write(tmp_path / "a.csv", *ROWS[-2:]))]) == 0
    assert set(drawn(tmp_path)) == {"a-model.png"}
    assert capsys.readouterr().out.count("not drawn, because a.csv has no rows for it") == 4
    refused = {**ROWS[0], "note": "refused: wrong result", "p50_ms": ""}
    assert plot.main([str(write(tmp_path / "b.csv", refused))]) == 0
    assert "nothing is drawn" in capsys.readouterr().out and "b-layer.png" not in drawn(tmp_path)


def test_each_machine_has_its_own_figures(tmp_path):
    write(tmp_path / "a.csv", *ROWS, *({**each, "device": "another"} for each in ROWS[-2:]))
    assert plot.main([str(tmp_path / "a.csv")]) == 0
    assert {"a-model.png", "a-model-2.png"} <= set(drawn(tmp_path)) and "a-layer-2.png" not in drawn(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_a_bad_file_is_refused(tmp_path, capsys, content):
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(path)])
    assert stopped.value.code == 2 and "bad.csv" in capsys.readouterr().err and not drawn(tmp_path)


def test_ratios_are_to_the_baseline_of_the_same_case():
    rows = [layer("frozen linear", 64, 2), layer("ssvd", 64, 5, "auto (factored)")]
    assert plot._over(rows, "frozen linear", lambda each: each["version"]) == {"ssvd": [(64, 2.5)]}
