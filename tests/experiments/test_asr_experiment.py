"""The experiment's bookkeeping: cells, learning rates, intervals, tables; and one cell of each method on tiny.en."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asr_tiny import command as tiny_command
from asr_tiny import rows_of, tone, write_wav

from bench.records import of_each
from experiments.asr import DemoError, entries, experiment, figures, grid, summary, train
from experiments.asr.cell import Cell, run_cell
from experiments.asr.grid import GRIDS, Grid, candidates, read_rates, tuning_cell, write_rates
from experiments.asr.methods import METHODS
from experiments.asr.shifts import SHIFTS
from experiments.asr.speech import AS_RECORDED
from ssvd_kernels.model.parameter_groups import EXPONENT

SMALL = Grid("small", {"child": [("zero-shot", None), ("full", None), ("ssvd", 0.02)]}, 2, 4, 2, 3.0)
RATES = {("child", "full", None): 3e-5, ("child", "ssvd", 0.02): 1e-3}


def test_a_grid_has_every_choice_with_every_seed_but_zero_shot_once():
    cells = SMALL.cells(RATES, {"child": {"contents": "abc"}})
    assert {cell.contents for cell in cells} == {"abc"} and {cell.measure for cell in cells} == {"test"}
    assert [(c.method, c.seed) for c in cells] == [
        ("zero-shot", 0), ("full", 0), ("ssvd", 0), ("full", 1), ("ssvd", 1),
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[1].lr == 3e-5 and cells[2].lr == 1e-3


def test_the_key_is_the_configuration():
    cell = Cell("child", "ssvd", 0.02, 0, 1e-3, 40, 8, 5.0)
    assert cell.key == Cell(**{**vars(cell)}).key
    for change in (
        {"lr": 2e-3}, {"seed": 1}, {"longest": 6.0}, {"measure": "validation"}, {"model": "x"}, {"contents": "x"},
    ):  # fmt: skip
        assert Cell(**{**vars(cell), **change}).key != cell.key


@pytest.mark.parametrize("name", GRIDS)
def test_grids_name_known_things(name):
    found = GRIDS[name]
    assert set(found.choices) <= set(SHIFTS)
    for choices in found.choices.values():
        assert all(method in METHODS and (budget is None) != METHODS[method].budgeted for method, budget in choices)
        assert len(set(choices)) == len(choices)
    assert found.seeds == 3 or name not in ("reduced", "full")  # which are reported


def test_restricting_keeps_zero_shot_and_refuses_what_is_not_there():
    kept = SMALL.restricted([], ["ssvd"])
    assert kept.choices == {"child": [("zero-shot", None), ("ssvd", 0.02)]}
    with pytest.raises(DemoError, match="--methods lora: the small grid has no such cell"):
        SMALL.restricted([], ["lora"])


def test_tuning_goes_on_beyond_the_edge_and_stops_inside():
    only = SMALL.restricted([], ["ssvd"])
    start = METHODS["ssvd"].lr
    best = 9 * start  # beyond the first candidates
    tried: dict[grid.Trained, dict[float, float]] = {}
    for _ in range(10):
        for trained, lr in candidates(only, tried):
            tried.setdefault(trained, {})[lr] = abs(np.log(lr / best))
    known = tried["child", "ssvd", 0.02]
    assert sorted(known) == pytest.approx([start * 3.0**power for power in (-1, 0, 1, 2, 3)], rel=0.05)  # of two digits
    assert min(known) < min(known, key=lambda lr: known[lr]) < max(known)


def test_tuning_of_ssvd_begins_at_a_rate_for_its_rank():
    """Four times the parameters are twice the rank."""
    for method in ("ssvd", "ssvd-o", "ssvd-linear"):
        first = grid.starting_rate(method, 0.02)
        assert first == METHODS[method].lr
        assert grid.starting_rate(method, 0.08) == pytest.approx(first * 2**-EXPONENT)
    for method, budget in (("lora", 0.08), ("svft", 0.08), ("full", None), ("zero-shot", None)):
        assert grid.starting_rate(method, budget) == METHODS[method].lr


def test_tuning_measures_validation_speech_with_a_seed_of_its_own():
    cell = tuning_cell(SMALL, ("child", "ssvd", 0.02), 1e-3, {})
    assert cell.measure == "validation" and cell.seed not in range(SMALL.seeds)


def test_memory_is_measured_once_for_each_method_and_budget():
    child = SMALL.choices["child"]
    cells = replace(SMALL, choices={"child": child, "french": [*child, ("lora", 0.02)]}).memory_cells({})
    assert [(c.shift, c.method, c.budget) for c in cells] == [
        ("child", "full", None), ("child", "ssvd", 0.02), ("french", "lora", 0.02),
    ]  # fmt: skip
    assert {(c.measure, c.steps, c.seed) for c in cells} == {("memory", 2, 0)}


def test_rates_are_written_and_read_again(tmp_path):
    path = tmp_path / "tuned.csv"
    row = {"shift": "child", "chosen": "yes", "validation wer": 0.5, "validation loss": 1.5}
    full, ssvd = {**row, "method": "full", "lr": 3e-5}, {**row, "method": "ssvd", "budget": 0.02, "lr": 1e-3}
    write_rates([full, ssvd], SMALL, path)
    longer = replace(SMALL, steps=8)
    write_rates([{**ssvd, "lr": 5e-3}], longer, path)
    assert read_rates(SMALL, path) == RATES
    for other in (longer, replace(SMALL, model="another"), replace(SMALL, batch=3), replace(SMALL, longest=4.0)):
        with pytest.raises(DemoError, match=r"no learning rate of full on child for .*steps \d, batch \d, .*: --tune"):
            read_rates(other, path)
    assert read_rates(replace(longer, tuned=False), path) == {t: grid.starting_rate(*t[1:]) for t in SMALL.trained}


def test_committed_learning_rates_were_the_best_on_validation_speech():
    groups = of_each(rows_of(grid.TUNED), (*grid.RECIPE, "shift", "method", "budget"))
    assert groups
    for tried in groups.values():
        assert len({float(row["lr"]) for row in tried}) == len(tried) >= 3
        best = min(tried, key=lambda row: (float(row["validation wer"]), float(row["validation loss"])))
        assert [row for row in tried if row["chosen"]] == [best]


def _result(method: str, budget: float | None, seed: int, errors: list[int], trainable: int = 0) -> dict[str, Any]:
    utterances = [[e, 10, 2 * e, 50] for e in errors]
    total = sum(errors)
    score = {"errors": total, "words": 10 * len(errors), "wer": total / (10 * len(errors)), "cer": 0.1,
             "per_utterance": utterances}  # fmt: skip
    return {
        "cell": vars(Cell("child", method, budget, seed, 1e-3, 4, 2, 3.0)),
        "title": "child",
        "trainable": trainable, "total": 1000, "ranks": "3", "adapter_bytes": 1234, "seconds": [0.5, 0.7],
        "losses": [2.0, 1.0], "scores": {"test": score, AS_RECORDED: score, "others": score},
        "watched": [{"step": 4, "validation loss": 1.5, "orthogonality error": 1e-7}],
        "spectra": {}, "machine": "here", "finished": "today",
    }  # fmt: skip


def _memory(method: str, budget: float | None, peak: int | None) -> dict[str, Any]:
    cell = replace(Cell("child", method, budget, 0, 1e-6, 2, 2, 3.0), measure="memory")
    return {"cell": vars(cell), "peak_bytes": peak}


RESULTS = [
    _result("zero-shot", None, 0, [9, 9, 9, 9]),
    _result("full", None, 0, [2, 3, 2, 3], 1000),
    _result("full", None, 1, [4, 3, 4, 3], 1000),
    _result("lora", 0.02, 0, [3, 3, 3, 3], 20),
    _result("ssvd", 0.02, 0, [1, 1, 1, 2], 20),
]


def test_seeds_are_pooled_and_the_table_says_what_was_measured():
    found = entries.entries(reversed(RESULTS))
    assert [(e.method, len(e.results)) for e in found] == [("zero-shot", 1), ("full", 2), ("lora", 1), ("ssvd", 1)]
    full = found[1]
    assert full.rates(["test"]) == [0.25, 0.35] and full.rates(["test"], "cer") == [0.1, 0.14]
    assert full.others == ["others"]
    row = summary.table([full], {("full", None): 3 * 2**20}).splitlines()[-1]
    assert "| 1,000 | 100.00% | 2 | 30.0 (22.5 to 37.5) | 7.1 |" in row and "| 0.60 | 3 |" in row
    assert "| 0.60 |  |" in summary.table([full], {}).splitlines()[-1]
    lines = summary.comparisons(found)
    assert "LoRA (2.00%) 30.0 %; difference -17.5 points" in lines[0] and "ratio 0.42" in lines[1]


def test_intervals_cover_the_mean_and_shrink_with_more_utterances():
    rng = np.random.default_rng(1)
    widths = []
    for count in (20, 500):
        results = [_result("ssvd", 0.02, seed, list(rng.integers(0, 5, count))) for seed in range(3)]
        low, high = entries.interval(results, ["test"])
        assert low < np.mean([r["scores"]["test"]["wer"] for r in results]) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    same = entries.interval(results, ["test"], results)
    assert same == (0.0, 0.0)


def test_an_interval_holds_the_variation_of_seeds_and_of_utterances():
    """The bootstrap's variance is that of both means, each of them with replacement from what there is."""
    rng = np.random.default_rng(2)
    seeds, utterances = rng.normal(0, 3, 5), rng.normal(0, 9, 60)
    errors = np.round(100 + seeds[:, None] + utterances)
    results = [_result("ssvd", 0.02, seed, list(row)) for seed, row in enumerate(errors)]
    low, high = entries.interval(results, ["test"])
    spread = np.sqrt(errors.mean(1).var() / 5 + errors.mean(0).var() / 60) / 10
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)  # quantiles of a finite bootstrap


def test_english_prompts_are_of_another_speaker_where_the_target_is_not_theirs():
    for shift, recorded in (("spanish", []), ("french", [AS_RECORDED]), ("own.jsonl", [AS_RECORDED])):
        result = _result("ssvd", 0.02, 0, [1])
        result["cell"]["shift"] = shift
        assert entries.entries([result])[0].others == [*recorded, "others"]


def test_everything_is_written(tmp_path):
    lost = {"cell": vars(Cell("child", "lora", 0.02, 1, 1e-3, 4, 2, 3.0)), "diverged": True}
    text = summary.write([*RESULTS, lost, _memory("lora", 0.02, 5 * 2**20), _memory("full", None, None)], tmp_path)
    assert text.endswith("- diverged: LoRA, budget 0.02, on child, seed 1")
    assert (tmp_path / "tables.md").read_text() == text
    rows = rows_of(tmp_path / "cells.csv")
    assert [row["method"] for row in rows] == ["zero-shot", "full", "full", "lora", "ssvd"]
    assert float(rows[4]["test wer"]) == 0.125
    assert [row["peak_bytes"] for row in rows] == ["", "", "", str(5 * 2**20), ""]
    assert {path.stem for path in tmp_path.glob("*.png")} == {"curves", "learning-forgetting"}


def _everything() -> list[dict[str, Any]]:
    """Made-up results of every method at two budgets, with spectra, on a shift of the reduced and one of a user's."""
    found = []
    for shift in ("child", "own.jsonl"):
        for place, (method, how) in enumerate(METHODS.items()):
            for budget in (0.006, 0.02) if how.budgeted else (None,):
                result = _result(method, budget, 0, [place % 4, 1, 0, 2], int(1000 * (budget or 1)))
                result["cell"]["shift"] = shift
                trained = method != "zero-shot"
                result["spectra"] = {"layer": {"before": [3.0, 2.0], "after": [3.1, 1.9]}} if trained else {}
                result["watched"] = result["watched"] if trained else []
                found.append(result)
    return found


def _where(key: str, *values: object) -> list[dict[str, Any]]:
    return [result for result in _everything() if result["cell"][key] in values]


ALL = set(figures.FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("results", "drawn"),
    [
        (_everything(), ALL),
        ([{**r, "scores": {"test": r["scores"]["test"]}} for r in _everything()], ALL - {"learning-forgetting"}),
        (_where("method", "ssvd-o-25", "lora"), {"wer-parameters", "curves", "spectra"}),
        (_where("budget", None, 0.02), ALL - {"wer-parameters"}),
        (_where("method", "zero-shot"), set()),
    ],
    ids=["everything", "target alone", "two methods", "one budget", "nothing trained"],
)
def test_figures_of_parts_of_a_grid(results, drawn, tmp_path):
    summary.write(results, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == drawn


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    own = tiny_command(tmp_path, 16, 20, 0.8)
    chosen = ["--methods", "full", "ssvd", "lora", "--budgets", "0.15", "--steps", "2", "--seeds", "2"]
    places = {"data": "data", "runs": "runs", "out": "out", "tuned": "tuned.csv"}
    keeping = [part for name, place in places.items() for part in (f"--{name}", str(tmp_path / place))]
    return [*own, *chosen, *keeping, "--longest", "2", "--workers", "1"]


@pytest.mark.slow
def test_an_own_manifest_is_tuned_and_compared_and_nothing_is_done_twice(command, tmp_path, monkeypatch, capsys):
    assert experiment.main(command) == 2
    assert "has no learning rate of full on" in capsys.readouterr().err
    assert experiment.main([*command, "--tune"]) == 0
    assert {row["method"] for row in rows_of(tmp_path / "tuned.csv") if row["chosen"]} == {"full", "ssvd", "lora"}
    assert experiment.main(command) == 0
    rows = rows_of(tmp_path / "out" / "cells.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("zero-shot", "0"), ("full", "0"), ("full", "1"), ("lora", "0"), ("lora", "1"), ("ssvd", "0"), ("ssvd", "1"),
    ]  # fmt: skip
    budgeted = [row for row in rows if row["method"] in ("lora", "ssvd")]
    assert all(0 < int(row["trainable"]) <= 0.15 * int(row["total"]) for row in budgeted)
    assert all(int(row["peak_bytes"]) > 2**26 for row in rows if row["seed"] == "0" and row["method"] != "zero-shot")
    monkeypatch.setattr(experiment, "run_cell", None)  # nothing is left to compute
    assert experiment.main(command) == 0


@pytest.mark.slow
def test_a_run_out_of_time_says_so_and_the_next_one_goes_on(command, tmp_path, capsys):
    assert experiment.main([*command, "--tune"]) == 0
    before = set((tmp_path / "runs").glob("*/result.json"))
    assert experiment.main([*command, "--minutes", "1e-9"]) == experiment.UNFINISHED
    captured = capsys.readouterr()
    assert "0 of 10 cells" in captured.out and "not finished: run the same command again to continue" in captured.err
    assert set((tmp_path / "runs").glob("*/result.json")) == before


def test_a_cell_goes_on_from_where_its_time_was_up(command, tmp_path):
    args = experiment.parse(command)
    cell = Cell(str(args.manifest), "ssvd", 0.15, 0, 1e-3, 4, 2, 2.0, model=args.model, source=False)
    whole = run_cell(cell, args.data, tmp_path / "whole")
    with pytest.raises(train.Interrupted, match="time is up: stopped after step 1 of 4"):
        run_cell(cell, args.data, tmp_path / "cut", until=0.0)
    cut = run_cell(cell, args.data, tmp_path / "cut")
    assert cut["losses"] == whole["losses"] and cut["scores"] == whole["scores"] and len(cut["seconds"]) == 4
    assert cut["watched"][0].keys() == {"step", "validation loss", "orthogonality error"}
    assert 0 <= cut["watched"][-1]["orthogonality error"] < 1e-6  # float32's, of the 2e-5 that is promised
    assert not (tmp_path / "cut" / cell.key / "checkpoint.pt").exists()


@pytest.mark.slow
def test_other_speech_under_the_same_name_is_not_the_same_cell(command, tmp_path, capsys):
    own = [*command, "--methods", "ssvd"]
    assert experiment.main([*own, "--tune"]) == 0
    before = {path.name for path in (tmp_path / "runs").iterdir()}
    write_wav(tmp_path / "3.wav", tone(99, 0.8))
    assert experiment.main([*own, "--tune"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} > before
    write_wav(tmp_path / "4.wav", tone(99, 3))
    assert experiment.main([*own, "--tune"]) == 0
    assert "1 clips of more than 2 s are left out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_failing_cell_does_not_stop_the_others(command, tmp_path, capsys, workers):
    """A folder that holds something else where a cell is to be kept."""
    command = [*command, "--methods", "ssvd", "--workers", workers]
    assert experiment.main([*command, "--tune"]) == 0
    assert experiment.main(command) == 0
    kept = {path: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")}
    broken = next(path for path, result in kept.items() if result["cell"]["seed"] == 1 and "scores" in result)
    (tmp_path / "out" / "cells.csv").unlink()
    broken.unlink()
    (broken.parent / "settings.json").write_text("{}")
    capsys.readouterr()
    assert experiment.main(command) == 1
    assert "failed: " in (err := capsys.readouterr().err) and "seed 1" in err and "other settings" in err
    rows = rows_of(tmp_path / "out" / "cells.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [("zero-shot", "0"), ("ssvd", "0")]


def test_training_that_diverges_is_a_result(command, tmp_path):
    args = experiment.parse(command)
    cell = Cell(str(args.manifest), "full", None, 0, 1e30, 4, 2, 2.0, model=args.model, source=False)
    result = run_cell(cell, args.data, tmp_path)
    assert result["diverged"] and json.loads((tmp_path / cell.key / "result.json").read_text()) == result
    assert entries.entries([result]) == []
