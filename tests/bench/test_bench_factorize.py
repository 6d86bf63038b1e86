"""The benchmark of large factorisations runs, and its numbers are those of the CSV file."""

from __future__ import annotations

import csv

import pytest

from bench import factorize


@pytest.mark.usefixtures("one_thread")
def test_every_part_runs_and_the_way_in_use_is_exact(tmp_path, capsys):
    path = tmp_path / "quick.csv"
    assert factorize.main(["--out", str(path), "--quick", "--repeats", "1", "--sample", "1"]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = [row for row in rows if row["part"] == "ways"]
    assert len(ways) == len(factorize.WAYS) * len(factorize.WAYS_SHAPES)
    errors = {way: max(float(row["error"] or 0) for row in ways if row["way"] == way) for way in factorize.WAYS}
    # float64's 1e-16 times the condition of the Gram matrix is far below 1e-8, float32's roundoff is far above
    assert errors["gram + Jacobi (used)"] <= 1e-8 < 1e-6 < errors["svd float32"]
    layers = {model: sum(shapes.values()) for model, shapes in factorize.MODELS.items()}
    assert layers == {"whisper-large-v3": 512, "owsm-1b": 380}
    wide = sum(count for (d_out, d_in), count in factorize.MODELS["owsm-1b"].items() if d_out < d_in)
    assert wide == 91
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    for row in rows:
        assert row["p50_ms"] in text and f"{row['d_out']} x {row['d_in']}" in text
    assert "for 512 layers, of which 3 were measured" in text and "for 380 layers, of which 6 were measured" in text
