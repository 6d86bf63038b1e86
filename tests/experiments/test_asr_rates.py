"""Learning rates at several ranks: which are tried, what is fitted to the losses, and one cell on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asr_tiny import command as tiny_command
from asr_tiny import rows_of

import ssvd_kernels as sk
from experiments.asr import cell, experiment, rates, rates_report
from experiments.asr.cell import Cell, run_cell
from experiments.asr.rates_report import Series

pytestmark = pytest.mark.usefixtures("one_thread")


def bowl(lr: float, at: float, lowest: float = 1.0) -> float:
    return lowest + math.log(lr / at) ** 2


def tried(p: float, ranks: tuple[int, ...] = (48, 96, 242)) -> dict[Series, dict[float, float]]:
    """Losses that are lowest at c / k^p, with another c for each shift."""
    found = {}
    for shift, c in (("child", 3.0), ("spanish", 6.0)):
        for k in ranks:
            start = 1.1 * c / k**p
            found[Series("tiny.en", shift, k)] = {
                start * 1.5**power: bowl(start * 1.5**power, c / k**p) for power in range(-3, 4)
            }
    return found


def result(loss: float, training: float | None = None) -> dict[str, object]:
    """Of a cell; the first third of training does not count."""
    late = loss if training is None else training
    return {"loss": loss, "losses": [9.0, late + 0.5, late - 0.5]}


@pytest.fixture
def explorer(monkeypatch):
    """Its cells cost nothing: the loss is lowest at 3 / k^1.5, a rate above 0.04 diverges."""

    def run(cells: list[Cell], desc: str) -> dict[Cell, dict[str, object]]:
        calls.extend(cells)
        return {c: {"diverged": True} if c.lr > 0.04 else result(bowl(c.lr, 3 / (c.rank or 1) ** 1.5)) for c in cells}

    calls: list[Cell] = []
    monkeypatch.setattr(rates, "contents", lambda model, data, shifts, longest, source: dict.fromkeys(shifts, "hash"))
    made = rates.Explorer(run, Path("data"), "cpu")  # type: ignore[arg-type]
    made.calls = calls  # type: ignore[attr-defined]
    return made


def test_rates_are_tried_until_the_best_is_inside(explorer):
    for rank in (153, 242, 20):
        series = Series("tiny.en", "child", rank)
        assert explorer.finish(series)
        losses = rates_report.losses_of(explorer.results)[series]
        assert rates_report.inside(losses)
        assert min(losses, key=losses.__getitem__) == pytest.approx(3 / rank**1.5, rel=0.25)
    first = [c for c in explorer.calls if c.rank == 153][:3]
    assert [c.lr for c in first] == pytest.approx([6.3 / 153**2 * f for f in (1 / 1.5, 1, 1.5)], rel=0.05)
    start = next(c.lr for c in explorer.calls if c.rank == 20)
    known = rates_report.losses_of(explorer.results)[Series("tiny.en", "child", 153)]
    assert start == pytest.approx(min(known, key=known.get) * (153 / 20) ** 1.5 / 1.5, rel=0.05)  # of the nearest rank
    assert math.isinf(max(rates_report.losses_of(explorer.results)[Series("tiny.en", "child", 20)].values()))
    assert {(c.measure, c.source, c.amp, c.budget) for c in explorer.calls} == {("loss", False, False, None)}


def test_a_series_is_finished_when_the_best_rate_in_training_is_inside_as_well(explorer, monkeypatch):
    def run(cells, desc):
        return {c: result(bowl(c.lr, 6.3 / 153**2), bowl(c.lr, 20 / 153**2)) for c in cells}

    monkeypatch.setattr(explorer, "run", run)
    series = Series("tiny.en", "child", 153)
    assert explorer.finish(series)
    for which in (rates_report.VALIDATION, rates_report.TRAINING):
        assert rates_report.inside(rates_report.losses_of(explorer.results, which)[series])


def test_a_series_that_runs_out_of_time_is_not_finished(explorer, monkeypatch):
    monkeypatch.setattr(explorer, "run", lambda cells, desc: {})
    assert not explorer.finish(Series("base", "child", 96))


def test_the_command_writes_what_it_knows_and_says_whether_it_is_done(tmp_path, monkeypatch, capsys):
    class Fake:
        def __init__(self, data, root, workers, minutes):
            self.left, self.failed = 99 if minutes is None else 2, {}  # calls; by cell

        def __call__(self, cells, desc):
            self.left -= 1
            kinds = {"gradient": lambda c: {"sums": [k**1.5 for k in range(1, 243)]},
                     "loss": lambda c: result(bowl(c.lr, 3 / c.rank**1.5))}  # fmt: skip
            return {c: kinds[c.measure](c) for c in cells} if self.left >= 0 else {}

    monkeypatch.setattr(rates, "Runner", Fake)
    monkeypatch.setattr(rates_report, "draw", lambda views, rule, path: path.write_bytes(b"a picture"))
    monkeypatch.setattr(rates, "ensure", lambda data, parts: None)
    monkeypatch.setattr(rates, "contents", lambda model, data, shifts, longest, source: dict.fromkeys(shifts, "hash"))
    monkeypatch.setattr(rates, "ALL", [Series("base", "child", 96), Series("base", "child", 204)])
    assert rates.main(["--out", str(tmp_path), "--minutes", "1"]) == experiment.UNFINISHED
    assert "run the same command again" in capsys.readouterr().err
    assert {row["rank"] for row in rows_of(tmp_path / "cells.csv")} == {"96"}
    assert rates.main(["--out", str(tmp_path)]) == 0
    assert {row["rank"] for row in rows_of(tmp_path / "cells.csv")} == {"96", "204"}
    assert (
        "| base | child | 2 | 1.50 |" in (tmp_path / "table.md").read_text() and "2 | 1.50" in capsys.readouterr().out
    )


def test_the_best_rate_is_the_vertex_of_a_parabola():
    losses = {lr: bowl(lr, 3.3e-4, 0.7) for lr in (1e-4, 2e-4, 3e-4, 5e-4, 8e-4)}
    assert rates_report.best_rate(losses) == pytest.approx(3.3e-4)
    assert rates_report.best_rate({1e-4: 2.0, 2e-4: 1.0, 4e-4: math.inf}) == 2e-4


def test_the_exponent_is_recovered_with_its_interval():
    exact = {series: rates_report.best_rate(losses) for series, losses in tried(1.7).items()}
    p, half = rates_report.exponent(exact) or (0, 0)
    assert p == pytest.approx(1.7) and half == pytest.approx(0, abs=1e-6)
    noise = dict(zip(exact, (1.1, 0.9, 1.0, 0.9, 1.1, 1.05), strict=True))
    p, half = rates_report.exponent({s: lr * noise[s] for s, lr in exact.items()}) or (0, 0)
    assert 0 < abs(p - 1.7) < half < 0.5
    assert rates_report.exponent({Series("tiny.en", "child", 48): 1e-3}) is None
    two = {Series("tiny.en", "child", k): 3 / k**1.7 for k in (48, 96)}
    assert rates_report.exponent(two) == pytest.approx((1.7, math.inf))


def test_each_seed_has_a_constant_of_its_own_in_the_exponent():
    rates = {Series("tiny.en", "child", k, seed): 3.0**seed / k**1.7 for k in (48, 96, 242) for seed in (0, 1)}
    p, half = rates_report.exponent(rates) or (0, 0)
    assert p == pytest.approx(1.7) and half == pytest.approx(0, abs=1e-6)


def test_losses_between_and_beyond_the_rates_tried():
    losses = {1e-4: 3.0, 1e-3: 2.0, 1e-2: 4.0, 1e-1: math.inf}
    assert rates_report.loss_at(10**-3.5, losses) == pytest.approx(2.5)
    assert rates_report.loss_at(1e-5, losses) == pytest.approx(4.0)
    assert rates_report.lost(1e-1, losses) == pytest.approx(4.0)


def test_the_rule_with_the_right_exponent_loses_least():
    one = {series: losses for series, losses in tried(1.5).items() if series.shift == "child"}
    found = {p: rates_report.regret(p, one) for p in rates_report.EXPONENTS}
    assert min(found, key=lambda p: found[p][0]) == 1.5
    assert found[1.5][2] == pytest.approx(3.0, rel=0.1) and found[1.5][0] < 0.02 < found[2.0][0] < found[0.0][0]


def test_everything_is_written(tmp_path):
    losses = tried(2.0)
    spread = Series("tiny.en", "child", 96, by_spectrum=True)
    losses[spread] = {1e-4: 1.5, 2e-4: 1.2, 4e-4: math.inf}
    unfinished = Series("base", "child", 96)
    losses[unfinished] = {1e-4: 1.0, 2e-4: 2.0, 3e-4: 3.0}
    results = {
        series: {
            lr: result(loss, 2 * loss) if math.isfinite(loss) else {"diverged": True} for lr, loss in found.items()
        }
        for series, found in losses.items()
    }
    gradients = {("tiny.en", "child"): [k**1.25 for k in range(1, 243)]}
    text = rates_report.write(results, gradients, 3.0, tmp_path)
    assert text == (tmp_path / "table.md").read_text()
    assert text.count("| tiny.en | all | 6 | 2.00 ± 0.00 |") == 2
    assert (
        "| tiny.en | child, rates by spectrum | 96 | 0 | 3 | 2.00e-04 | 0.19 | 1.2000 |" in text and "base" not in text
    )
    rows = rows_of(tmp_path / "cells.csv")
    assert len(rows) == sum(map(len, losses.values()))
    last = [(row["validation loss"], row["training loss"]) for row in rows if row["by spectrum"] == "1"]
    assert last == [("1.50000", "3.00000"), ("1.20000", "2.40000"), ("inf", "inf")]
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    assert "| tiny.en | child | 1.25 | 1.25 | 1.25 | 1.25 | 1.25 |" in text
    assert [float(row["sum"]) for row in rows_of(tmp_path / "gradients.csv")][:2] == pytest.approx(
        [1, 2**1.25], rel=1e-5
    )
    assert "base" not in rates_report.write({}, {}, 3.0, tmp_path / "none")


def test_the_earlier_rates_are_read_with_what_they_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(rates_report, "draw", lambda views, rule, path: path.write_bytes(b"a picture"))
    text = rates_report.write({}, {}, 3.0, tmp_path)
    losses, chosen = rates_report.earlier()
    assert {s.rank for s in losses} == {83, 153, 242} and losses.keys() == chosen.keys()
    series = Series("tiny.en", "child", 153)
    assert losses[series][3e-4] == 0.2167 == min(losses[series].values()) and chosen[series] == 1e-4
    assert "| child | 153 | 1.0e-04 | 2.01e-04 | 0.0166 |" in text


def test_a_cell_of_one_rank_measures_the_loss_alone(tmp_path, monkeypatch):
    args = experiment.parse([*tiny_command(tmp_path, 16, 20, 0.8), "--data", str(tmp_path)])
    first = Cell(
        str(args.manifest), "ssvd", None, 0, 1e-2, 3, 2, 2.0, "loss", source=False, model=args.model, rank=5,
        window=0.8, amp=False,
    )  # fmt: skip
    heard, groups, fit = [], [], cell.train

    def trained(recognizer, speech, recipe, folder, watch, until, given):
        heard.append(recognizer.window)
        groups.append(given and [group["lr"] for group in given])  # the optimizer will change them
        assert watch is None and {layer.k for layer in sk.ssvd_layers(recognizer.model).values()} == {5}
        return fit(recognizer, speech, recipe, folder, watch, until, given)

    monkeypatch.setattr(cell, "train", trained)
    found = run_cell(first, tmp_path, tmp_path / "runs")
    spread = run_cell(replace(first, by_spectrum=True), tmp_path, tmp_path / "runs")
    assert math.isfinite(found["loss"]) and "scores" not in found and len(found["losses"]) == 3
    assert spread["loss"] != found["loss"] and heard == [2, 2] and groups[0] is None
    steps = torch.tensor(groups[1])
    assert steps.log().mean() == pytest.approx(math.log(1e-2), rel=1e-4) and steps.max() > 1.05 * steps.min()


def test_the_gradients_of_a_cell_are_those_of_each_rank(tmp_path):
    args = experiment.parse([*tiny_command(tmp_path, 16, 20, 0.8), "--data", str(tmp_path)])
    sums = {}
    for rank in (3, 5):
        one = Cell(
            str(args.manifest), "ssvd", None, 0, 0.0, 2, 2, 2.0, "gradient", source=False, model=args.model, rank=rank,
            amp=False,
        )  # fmt: skip
        sums[rank] = run_cell(one, tmp_path, tmp_path / "runs")["sums"]
    assert len(sums[5]) == 5 and sums[5][0] == 0 and sums[5] == sorted(sums[5]) and sums[5][4] > sums[5][3]
    assert sums[3] == pytest.approx(sums[5][:3], rel=1e-4)


def test_fields_that_came_later_leave_the_keys_of_earlier_cells():
    assert Cell("child", "ssvd", 0.02, 0, 1e-3, 40, 8, 5.0).key == "320984eeaa2e"
