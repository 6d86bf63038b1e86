"""Measured tile choices: taken, kept in a file, read again, and never trusted blindly."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ssvd_kernels.ops.kernels import tuning
from ssvd_kernels.ops.kernels.tile_sizes import TileConfig

SLOW, FAST = TileConfig(16, 16, 16, 4, 2), TileConfig(32, 32, 32, 4, 2)
TABLE = (SLOW, FAST)


class FakeDevice:
    """Stands for a tensor on a GPU: only where it is matters here."""

    is_cuda, device = True, "cuda:0"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A GPU by name only, whose clock says that FAST is faster; the file of choices, and what was timed."""
    path, timed = tmp_path / "choices.json", []
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def clock(run) -> float:
        run()
        return {SLOW: 2.0, FAST: 1.0}[timed[-1]]

    monkeypatch.setattr(tuning, "_milliseconds", clock)
    tuning._choices.cache_clear()
    yield path, timed
    tuning._choices.cache_clear()


def choose(timed: list, tokens: int = 100, default: TileConfig = SLOW) -> TileConfig:
    return tuning.tuned("linear half", (tokens, 64, 32), TABLE, default, FakeDevice(), timed.append)  # type: ignore[arg-type]


def test_without_the_variable_nothing_is_measured(machine, monkeypatch):
    path, timed = machine
    monkeypatch.delenv(tuning.VARIABLE)
    assert choose(timed) == SLOW
    assert not timed and not path.exists()


def test_on_the_cpu_nothing_is_measured(machine):
    path, timed = machine
    assert tuning.tuned("linear half", (4, 4), TABLE, SLOW, torch.zeros(1), timed.append) == SLOW
    assert not timed and not path.exists()


def test_the_fastest_is_kept_for_like_shapes_and_for_the_next_process(machine):
    path, timed = machine
    assert choose(timed) == FAST and timed == [SLOW, FAST]
    assert choose(timed, tokens=128) == FAST and len(timed) == 2  # 100 and 128 tokens share a choice
    tuning._choices.cache_clear()  # as a new process
    assert choose(timed) == FAST and len(timed) == 2
    assert choose(timed, tokens=129) == FAST and len(timed) == 4
    assert len(json.loads(path.read_text())) == 2


def test_nothing_is_measured_while_a_graph_is_captured(machine, monkeypatch):
    path, timed = machine
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(timed) == SLOW
    assert not timed and not path.exists()


def test_a_choice_that_the_table_no_longer_has_is_measured_again(machine):
    path, timed = machine
    choose(timed)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: [1, 2, 3, 4, 5, 6]}))
    tuning._choices.cache_clear()
    assert choose(timed) == FAST and len(timed) == 4
    assert json.loads(path.read_text())[key] == list(FAST)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_damaged_file_is_replaced_and_said_so(machine, content, caplog):
    path, timed = machine
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert choose(timed) == FAST
    assert str(path) in caplog.text
    assert len(json.loads(path.read_text())) == 1


def test_choices_of_other_processes_are_kept(machine):
    path, timed = machine
    choose(timed)
    path.write_text(json.dumps({**json.loads(path.read_text()), "another": [1]}))
    choose(timed, tokens=5)
    assert set(json.loads(path.read_text())) >= {"another"} and len(json.loads(path.read_text())) == 3


def test_a_folder_that_cannot_be_written_costs_the_file_only(machine, monkeypatch, tmp_path, caplog):
    _, timed = machine
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "missing" / "choices.json"))
    with caplog.at_level(logging.WARNING):
        assert choose(timed) == FAST and choose(timed) == FAST
    assert len(timed) == 2 and "cannot write" in caplog.text
