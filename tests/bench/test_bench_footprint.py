"""The bytes of an adapted model by part are those of the formulas, on the meta device as on the CPU."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

import ssvd_kernels as sk
from bench import footprint
from bench.memory import Ledger
from ssvd_kernels.model import rotations
from ssvd_kernels.ops import extension

D = 64
K = int(0.4 * D)
WEIGHT, ACTIVATION = "weight form factored, ratio 0.4", "activation form, ratio 0.4"
needs_extension = pytest.mark.skipif(not extension.available(), reason="needs the C++ op")


def measured(tmp_path, *arguments: str) -> dict[str, dict[str, int]]:
    path = tmp_path / "footprint.csv"
    assert footprint.main(["--out", str(path), "--width", str(D), *arguments]) == 0
    assert "after inject" in path.with_suffix(".md").read_text()
    with path.open(newline="") as file:
        return {row["method"]: {name: int(value) for name, value in row.items() if name.startswith(
            ("resident", "peak", "left"))} for row in csv.DictReader(file)}  # fmt: skip


@needs_extension
def test_bytes_of_a_layer_are_those_of_the_formulas(tmp_path):
    rows = measured(tmp_path, "--parts", "layer", "--methods", footprint.FULL, WEIGHT, ACTIVATION)
    base, trained = 2 * D * (D + 1), 4 * K * (K + 1) // 2
    for row in rows.values():
        assert row["resident_base"] == row["peak_base"] == base
        assert row["left_bytes"] == 0  # cores and gradients do not outlive the step
    assert rows[footprint.FULL]["peak_gradients"] >= 2 * D * D
    assert rows[footprint.FULL]["peak_optimizer"] >= 2 * base
    for method, basis in ((WEIGHT, 4 * K * (2 * D + 1)), (ACTIVATION, K * (2 * D + 4))):
        row = rows[method]
        assert row["resident_basis"] == row["peak_basis"] == basis
        assert row["resident_trained"] == trained
        assert row["peak_optimizer"] == 2 * trained + 2 * 4  # and two counters of steps
        assert row["peak_cores"] >= 2 * 4 * K * K  # E, and M or C


@needs_extension
def test_the_meta_device_gives_the_bytes_of_the_cpu(tmp_path):
    arguments = ("--parts", "layer", "--methods", WEIGHT, ACTIVATION)
    (tmp_path / "cpu").mkdir()
    assert measured(tmp_path, *arguments) == measured(tmp_path / "cpu", *arguments, "--device", "cpu")


@pytest.mark.parametrize("side", ["input", "both"])
def test_no_temporary_of_the_cores_is_larger_than_two_batches(side, monkeypatch):
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(9)))
    sk.inject(model, sk.SSVDConfig(rank=20, side=side, form="activation", basis_dtype="float32"), progress=False)
    assert 2 * rotations.MAX_BYTES <= 2**28
    monkeypatch.setattr(rotations, "MAX_BYTES", 4 * 4 * 20**2)  # four layers
    sizes = []

    def kind_of(tensor: torch.Tensor) -> str:
        sizes.append(tensor.untyped_storage().nbytes())
        return ""

    with Ledger(kind_of):
        model(torch.zeros(1, 24)).sum().backward()
    assert rotations.MAX_BYTES <= max(sizes) <= (2 if side == "both" else 1) * rotations.MAX_BYTES
