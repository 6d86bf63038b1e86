"""The benchmark of many adapters in a batch: a small run names every version and writes its table."""

from __future__ import annotations

import csv

import pytest
import torch

pytest.importorskip("peft", reason="compares with PEFT's mixed batches")
pytest.importorskip("transformers")

from bench import many


@pytest.mark.slow
def test_a_small_run(tmp_path):
    path = tmp_path / "many.csv"
    options = ["--ranks", "32", "--counts", "1", "3", "--generate", "2", "--seconds", "0"]
    assert many.main(["--out", str(path), *options]) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    versions = {many.ONE, many.COMPOSED, many.LORA, many.AFTER, many.MIXED}
    for N in ("1", "3"):
        for T in ("1", "64"):
            assert {row["version"] for row in rows if (row["what"], row["N"], row["T"]) == ("layers", N, T)} == versions
    assert sum(row["what"] == "generate" for row in rows) == 4 and sum(row["what"] == "add" for row in rows) == 2
    assert all(float(row["ms"]) > 0 for row in rows)
    mixed = next(row for row in rows if row["version"] == many.MIXED and row["what"] == "layers")
    assert int(mixed["bytes"]) == 16 * 32 * 32 * 4
    text = path.with_suffix(".md").read_text()
    assert all(name in text for name in (*versions, "add, from a file", "bytes an adapter"))


def test_loras_put_in_by_hand_serve_their_own_rows():
    torch.manual_seed(0)
    model = many.with_lora(many.Layers(), 2, ["one", "two"])
    x, h = torch.randn(2, 3, many.D), torch.randn(2, 3, 4 * many.D)
    last = model.base_model.model.layers[-1]
    with torch.no_grad():
        mixed = model(x, h, adapter_names=["one", "two"])
        for row, name in enumerate(["one", "two"]):
            own = last.base_layer(h[row]) + last.lora_B[name](last.lora_A[name](h[row]))
            assert torch.allclose(mixed[row], own, atol=1e-5)
        assert not torch.allclose(mixed[1], last.base_layer(h[1]), atol=1e-3)
