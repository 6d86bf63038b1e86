"""The experiment's bookkeeping: cells, learning rates, intervals, tables; and one cell of each method on tiny.en."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asr_tiny import manifest, tone, write_ct2_folder, write_wav

from bench.asr import DemoError, entries, experiment, grid, summary, train
from bench.asr.cell import Cell, run_cell
from bench.asr.grid import GRIDS, Grid, candidates, read_rates, tuning_cell, write_rates
from bench.asr.methods import METHODS
from bench.asr.shifts import SHIFTS
from bench.asr.speech import AS_RECORDED

SMALL = Grid("small", {"child": [("zero-shot", None), ("full", None), ("ssvd", 0.02)]}, 2, 4, 2, 3.0, "small")
RATES = {("child", "full", None): 3e-5, ("child", "ssvd", 0.02): 1e-3}


def test_a_grid_has_every_choice_with_every_seed_but_zero_shot_once() -> None:
    cells = SMALL.cells(RATES)
    assert [(c.method, c.seed) for c in cells] == [
        ("zero-shot", 0), ("full", 0), ("ssvd", 0), ("full", 1), ("ssvd", 1),
    ]  # fmt: skip
    assert len({cell.key for cell in cells}) == len(cells)
    assert cells[1].lr == 3e-5 and cells[2].lr == 1e-3


def test_the_key_is_the_configuration() -> None:
    cell = Cell("child", "ssvd", 0.02, 0, 1e-3, 40, 8, 5.0)
    assert cell.key == Cell(**{**vars(cell)}).key
    for change in ({"lr": 2e-3}, {"seed": 1}, {"longest": 6.0}, {"measure": "validation"}, {"model": "x"}):
        assert Cell(**{**vars(cell), **change}).key != cell.key


@pytest.mark.parametrize("name", GRIDS)
def test_grids_name_known_things(name: str) -> None:
    found = GRIDS[name]
    assert set(found.choices) <= set(SHIFTS)
    for choices in found.choices.values():
        assert all(method in METHODS and (budget is None) != METHODS[method].budgeted for method, budget in choices)
        assert len(set(choices)) == len(choices)


def test_reported_grids_have_three_seeds() -> None:
    assert GRIDS["reduced"].seeds == GRIDS["full"].seeds == 3


def test_restricting_keeps_zero_shot_and_refuses_what_is_not_there() -> None:
    kept = SMALL.restricted([], ["ssvd"])
    assert kept.choices == {"child": [("zero-shot", None), ("ssvd", 0.02)]}
    with pytest.raises(DemoError, match="--methods lora: the small grid has no such cell"):
        SMALL.restricted([], ["lora"])


def test_tuning_goes_on_beyond_the_edge_and_stops_inside(tmp_path: Any) -> None:
    only = SMALL.restricted([], ["ssvd"])
    best = 9e-3  # twice times three above the start, so beyond the first candidates
    tried: dict[grid.Trained, dict[float, float]] = {}
    for _ in range(10):
        wanted = candidates(only, tried)
        for trained, lr in wanted:
            tried.setdefault(trained, {})[lr] = abs(np.log(lr / best))
        if not wanted:
            break
    known = tried["child", "ssvd", 0.02]
    assert sorted(known) == pytest.approx([3.3e-4, 1e-3, 3e-3, 9e-3, 2.7e-2])
    assert min(known) < min(known, key=lambda lr: known[lr]) < max(known)


def test_tuning_measures_validation_speech_with_a_seed_of_its_own() -> None:
    cell = tuning_cell(SMALL, ("child", "ssvd", 0.02), 1e-3)
    assert cell.measure == "validation" and cell.seed not in range(SMALL.seeds)
    assert all(c.measure == "test" for c in SMALL.cells(RATES))


def test_rates_are_written_and_read_again(tmp_path: Any) -> None:
    path = tmp_path / "tuned.csv"
    row = dict.fromkeys(grid.COLUMNS, "") | {"grid": "small", "shift": "child", "chosen": "yes"}
    write_rates(
        [{**row, "method": "full", "lr": 3e-5}, {**row, "method": "ssvd", "budget": 0.02, "lr": 1e-3}], SMALL, path
    )
    other = replace(SMALL, name="other", tuned_as="other")
    write_rates([{**row, "grid": "other", "method": "ssvd", "budget": 0.02, "lr": 5e-3}], other, path)
    assert read_rates(SMALL, path) == RATES
    with pytest.raises(DemoError, match="no learning rate of full on child for the other grid: --tune"):
        read_rates(other, path)


def test_committed_learning_rates_were_the_best_on_validation_speech() -> None:
    with grid.TUNED.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("grid", "shift", "method", "budget")), []).append(row)
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
        "peak_bytes": 2**30, "losses": [2.0, 1.0], "scores": {"test": score, AS_RECORDED: score, "others": score},
        "watched": [{"step": 4, "validation loss": 1.5, "orthogonality error": 1e-7}],
        "spectra": {}, "machine": "here", "finished": "today",
    }  # fmt: skip


RESULTS = [
    _result("zero-shot", None, 0, [9, 9, 9, 9]),
    _result("full", None, 0, [2, 3, 2, 3], 1000),
    _result("full", None, 1, [4, 3, 4, 3], 1000),
    _result("lora", 0.02, 0, [3, 3, 3, 3], 20),
    _result("ssvd", 0.02, 0, [1, 1, 1, 2], 20),
]


def test_seeds_are_pooled_and_the_table_says_what_was_measured() -> None:
    found = entries.entries(reversed(RESULTS))
    assert [(e.method, len(e.results)) for e in found] == [("zero-shot", 1), ("full", 2), ("lora", 1), ("ssvd", 1)]
    full = found[1]
    assert full.rates(["test"]) == [0.25, 0.35] and full.rates(["test"], "cer") == [0.1, 0.14]
    assert full.others == ["others"]
    row = summary.table([full]).splitlines()[-1]
    assert "| 1,000 | 100.00% | 2 | 30.0 (30.0 to 30.0) | 7.1 |" in row
    lines = summary.comparisons(found)
    assert "LoRA (2.00%) 30.0 %; difference -17.5 points" in lines[0] and "ratio 0.42" in lines[1]


def test_intervals_cover_the_mean_and_shrink_with_more_utterances() -> None:
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


def test_everything_is_written(tmp_path: Any) -> None:
    text = summary.write(RESULTS, tmp_path)
    assert (tmp_path / "tables.md").read_text() == text
    with (tmp_path / "cells.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["zero-shot", "full", "full", "lora", "ssvd"]
    assert float(rows[4]["test wer"]) == 0.125
    drawn = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert drawn == ["curves", "learning-forgetting", "orthogonality"]


# -- whole runs, of a tiny random model on tones ----------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    texts = [f"text number {i}" for i in range(16)]
    for i in range(len(texts)):
        write_wav(tmp_path / f"{i}.wav", tone(150 + 20 * i, 0.8))
    lines = manifest(tmp_path, *({"audio": f"{i}.wav", "text": text} for i, text in enumerate(texts)))
    folder = write_ct2_folder(tmp_path)
    chosen = ["--methods", "full", "ssvd", "lora", "--budgets", "0.15", "--steps", "2", "--seeds", "2"]
    places = {name: str(tmp_path / name) for name in ("data", "runs", "out", "tuned.csv")}
    own = ["--manifest", str(lines), "--no-source", "--model", str(folder.path), "--longest", "2", "--device", "cpu"]
    keeping = ["--data", places["data"], "--runs", places["runs"], "--out", places["out"]]
    return [*own, *chosen, *keeping, "--tuned", places["tuned.csv"], "--workers", "1"]


def test_an_own_manifest_is_tuned_and_compared_and_nothing_is_done_twice(
    command, tmp_path, monkeypatch, capsys
) -> None:
    assert experiment.main(command) == 2
    assert "has no learning rate of full on" in capsys.readouterr().err
    assert experiment.main([*command, "--tune"]) == 0
    with (tmp_path / "tuned.csv").open(newline="") as stream:
        assert {row["method"] for row in csv.DictReader(stream) if row["chosen"]} == {"full", "ssvd", "lora"}
    assert experiment.main(command) == 0
    with (tmp_path / "out" / "cells.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("zero-shot", "0"), ("full", "0"), ("full", "1"), ("lora", "0"), ("lora", "1"), ("ssvd", "0"), ("ssvd", "1"),
    ]  # fmt: skip
    assert all(
        0 < int(row["trainable"]) <= 0.15 * int(row["total"]) for row in rows if row["method"] in ("lora", "ssvd")
    )
    monkeypatch.setattr(experiment, "run_cell", None)  # nothing is left to compute
    assert experiment.main(command) == 0


def test_a_run_out_of_time_says_so_and_the_next_one_goes_on(command, tmp_path, capsys) -> None:
    assert experiment.main([*command, "--tune"]) == 0
    before = set((tmp_path / "runs").glob("*/result.json"))
    assert experiment.main([*command, "--minutes", "1e-9"]) == experiment.UNFINISHED
    assert "7 cells are missing: the same command goes on" in capsys.readouterr().err
    assert set((tmp_path / "runs").glob("*/result.json")) == before


def test_a_cell_goes_on_from_where_its_time_was_up(command, tmp_path, monkeypatch) -> None:
    args = experiment.parse(command)
    shift = Cell(str(args.manifest), "ssvd", 0.15, 0, 1e-3, 4, 2, 2.0, model=args.model, source=False)
    whole = run_cell(shift, args.data, tmp_path / "whole")
    with pytest.raises(train.Interrupted, match="time is up: stopped after step 1 of 4"):
        run_cell(shift, args.data, tmp_path / "cut", until=0.0)
    cut = run_cell(shift, args.data, tmp_path / "cut")
    assert cut["losses"] == whole["losses"] and cut["scores"] == whole["scores"] and len(cut["seconds"]) == 4
    assert cut["watched"][0].keys() == {"step", "validation loss", "orthogonality error"}
    assert 0 <= cut["watched"][-1]["orthogonality error"] < 1e-6
    assert not (tmp_path / "cut" / shift.key / "checkpoint.pt").exists()
