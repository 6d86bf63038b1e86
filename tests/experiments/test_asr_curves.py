"""Curves of strengths: which weights are measured, resuming, and what the tables say."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from asr_tiny import command as tiny_command
from asr_tiny import rows_of, tiny_model, tiny_tokenizer
from torch import nn

from experiments.asr import curve_tables, curves, experiment, train
from experiments.asr.cell import Cell
from experiments.asr.methods import apply

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(method: str) -> tuple[Cell, nn.Module, list[str], dict[str, torch.Tensor]]:
    """The tiny model with random parameters in place of training."""
    model = tiny_model(tiny_tokenizer())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and f"{name}.weight" in base]
    apply(model, method, None if method == "full" else 0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return Cell("child", method, 0.1, 0, 1e-3, 2, 2, 3.0), model.eval(), [] if method == "full" else linears, base


@pytest.mark.parametrize("method", ["ssvd", "lora", "full"])
def test_which_weights_are_measured(method):
    cell, model, linears, base = trained(method)
    end = curves.plain_weights(model, linears)
    average = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    found = {state[:2]: state.weights for state in curves.states(cell, model, linears, base, average)}
    ways = [("weights", a) for a in curves.ALPHAS]
    if method == "ssvd":
        ways = [(how, a) for a in curves.ALPHAS for how in ("strength", "weights") if how == "strength" or a == 0.5]
    assert list(found) == [*ways, ("average", 1.0)]
    assert all(weights.keys() == end.keys() for weights in found.values())
    same = {"ssvd": ("strength", 1.0)}.get(method, ("weights", 1.0))
    torch.testing.assert_close(found[same], end)
    for name, weight in found["weights", 0.5].items():
        torch.testing.assert_close(weight, (base[name] + end[name]) / 2)
    if method == "ssvd":  # the rotations are large here
        assert all((found["strength", 0.5][n] - w).norm() > 0.01 * w.norm() for n, w in found["weights", 0.5].items())
    if method != "full":  # a zero adapter
        torch.testing.assert_close(found["average", 1.0], {name: base[name] for name in end})


def test_the_mean_of_weights_is_loras_scaling():
    _, model, linears, base = trained("lora")
    end = curves.plain_weights(model, linears)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.25)
    for name, weight in curves.plain_weights(model, linears).items():
        torch.testing.assert_close(weight, base[name].lerp(end[name], 0.25))


def test_a_moving_average():
    model = nn.Linear(1, 1, bias=False)
    values = [1.0, 3.0, 2.0]
    nn.init.constant_(model.weight, values[0])
    average = curves.MovingAverage(model)
    for step, value in enumerate(values[1:]):
        nn.init.constant_(model.weight, value)
        average(step + 1)
    assert float(average.average["weight"]) == pytest.approx(0.81 * 1 + 0.09 * 3 + 0.1 * 2)


def test_a_curve_goes_on_where_it_was(tmp_path, monkeypatch):
    args = experiment.parse(tiny_command(tmp_path, 16, 20, 0.8))
    own = {"model": args.model, "source": False, "measure": "curve", "limit": 2}
    cell = Cell(str(args.manifest), "ssvd", 0.15, 0, 1e-3, 2, 2, 2.0, **own)
    whole = curves.run_curve(cell, args.data, tmp_path / "whole")
    assert [point["how"] for point in whole["points"]].count("strength") == len(curves.ALPHAS)
    assert all(point["scores"]["test"]["words"] > 0 for point in whole["points"])
    rates, calls = curves.error_rates, []

    def stopping(*args: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rates(*args)

    monkeypatch.setattr(curves, "error_rates", stopping)
    with pytest.raises(KeyboardInterrupt):
        curves.run_curve(cell, args.data, tmp_path / "cut")
    monkeypatch.setattr(train, "cross_entropy", Mock(side_effect=AssertionError("it trains again")))
    assert curves.run_curve(cell, args.data, tmp_path / "cut") == whole
    assert len(calls) == 1 + len(whole["points"])
    assert not list((tmp_path / "cut").glob("*/*.pt"))


def test_which_cells_there_are():
    rates = {(s, m, b): 1e-3 for s, (m, b) in product(curves.GRID.choices, curves.CHOICES)}
    cells = curves.cells(curves.GRID, rates, {})
    assert {cell.measure for cell in cells} == {"curve"} and len({cell.key for cell in cells}) == len(cells) == 26
    assert [(c.shift, c.method, c.lr) for c in cells[:8]] == [
        ("child", "zero-shot", 0.001), ("child", "ssvd", 2.7e-4), ("child", "lora", 0.001), ("child", "full", 0.001),
        ("spanish", "zero-shot", 0.001), ("spanish", "ssvd", 0.001), ("spanish", "lora", 0.001),
        ("spanish", "full", 0.001),
    ]  # fmt: skip
    assert [(c.shift, c.lr) for c in cells[-6:]] == 3 * [("child", 0.001), ("spanish", 2.7e-4)]


def result(method: str, seed: int, points: dict[tuple[str, float], int]) -> dict[str, Any]:
    def score(errors: int) -> dict[str, Any]:
        return {"per_utterance": [(errors, 20, 0, 90)] * 3}

    measured = [{"how": how, "alpha": alpha, "scores": {"test": score(e), "LibriVox reader": score(1)}}
                for (how, alpha), e in points.items()]  # fmt: skip
    cell = Cell("child", method, 0.02, seed, 0.0 if method == "zero-shot" else 1e-3, 2, 2, 3.0)
    return {"cell": vars(cell), "title": "child-like", "points": measured}


RESULTS = [
    result("zero-shot", 0, {("base", 0.0): 10}),
    *(result("ssvd", s, {("strength", 0.5): 2, ("weights", 0.5): 3, ("strength", 1.0): 4, ("average", 1.0): 6})
      for s in (0, 1)),
    result("lora", 0, {("weights", 0.5): 5, ("weights", 1.0): 4}),
    {**result("full", 0, {}), "points": []},
]  # fmt: skip


def test_what_is_written(tmp_path: Path):
    text = curve_tables.write([*RESULTS, {"cell": RESULTS[1]["cell"], "diverged": True}], tmp_path)
    assert text == (tmp_path / "tables.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| SSVD, strict, alpha K")]
    assert [line.split(" | ")[2:5] for line in lines] == [
        ["0", "", "50.0 (50.0 to 50.0)"], ["0.5", "2", "10.0 (10.0 to 10.0)"], ["1", "2", "20.0 (20.0 to 20.0)"],
    ]  # fmt: skip
    assert lines[1].endswith("| -10.0 (-10.0 to -10.0) | +0.0 (+0.0 to +0.0) |") and lines[2].endswith("|  |  |")
    assert "| SSVD, strict, moving average | 0.001 | 1 | 2 | 30.0 (30.0 to 30.0) | 5.0 (5.0 to 5.0) | +10.0 " in text
    assert "- alpha K minus mean of weights, lr 0.001, alpha 0.5: target -5.0 (-5.0 to -5.0), others +0.0 " in text
    rows = rows_of(tmp_path / "points.csv")
    assert [(r["alpha"], r["seed"], r["target errors"]) for r in rows if r["method"] == "lora"] == [
        ("0.0", "", "30"), ("0.5", "0", "15"), ("1.0", "0", "12")]  # fmt: skip
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
    assert "no trained model" in curve_tables.write(RESULTS[:1], tmp_path / "none")
