"""Several runs of the demo put together."""

from __future__ import annotations

import json

from asr_tiny import rows_of  # noqa: F401  (skips the file on a machine without the extra `demo`)

from experiments.asr import report, seeds
from experiments.asr.recognizer import Score


def run(folder, chosen: float, errors: int, name: str = "target") -> str:
    def score(each: int) -> Score:
        return Score([(each, 20, 0, 90)] * 3)

    after = {1.0: score(4), chosen: score(errors)}
    facts = dict.fromkeys(("Trained parameters", "Time per step", "Adapter file"), "")
    made = report.Report("title", [report.Row(name, score(10), after)], facts, {}, [1.0], {"strength": chosen})
    report.write(made, folder)
    return str(folder)


def test_runs_are_pooled(tmp_path, capsys):
    folders = [run(tmp_path / "0", 0.5, 2), run(tmp_path / "1", 1.0, 4)]
    assert seeds.main(folders) == 0
    out = capsys.readouterr().out
    assert "chosen strength (0.5, 1)" in out
    assert (
        "| target | 60 | 50.0 (50.0 to 50.0) | 20.0 (20.0 to 20.0) | 15.0 (10.0 to 20.0) | -5.0 (-10.0 to +0.0) |"
        in out
    )
    assert "per_utterance" in json.loads((tmp_path / "0/report.json").read_text())["rows"][0]["scores"]["before"]


def test_what_cannot_be_pooled_is_named(tmp_path, capsys):
    folders = [run(tmp_path / "0", 0.5, 2), run(tmp_path / "1", 0.5, 2, "another")]
    assert seeds.main(folders) == 2
    assert "the runs must have measured the same sets, got [['target'], ['another']]" in capsys.readouterr().err
    assert seeds.main([str(tmp_path / "none")]) == 2
    assert "no report.json of a finished run" in capsys.readouterr().err
