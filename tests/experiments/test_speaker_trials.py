"""Trial lists and plans: VoxCeleb's format, deterministic, balanced; and refusals that name the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("av", reason="the speech experiment needs the extra `demo`")

from experiments.asr import DemoError
from experiments.speaker.plan import HELD_OUT, NEAR, UNSEEN, VALIDATION, hashed_roles, make_plan
from experiments.speaker.trials import Trial, list_recordings, make_trials, read_trials, speaker_of, write_trials


def speakers(folder: Path, count: int, each: int = 5) -> Path:
    """Empty recordings folder/sN/session/N.wav: nothing in here listens to them."""
    for speaker in range(count):
        session = folder / f"s{speaker}" / "session"
        session.mkdir(parents=True)
        for number in range(each):
            (session / f"{number}.wav").touch()
    return folder


def test_lists_are_written_and_read_back(tmp_path):
    trials = [Trial(1, "a/x/1.wav", "a/y/2.wav"), Trial(0, "a/x/1.wav", "b/1.flac")]
    write_trials(tmp_path / "t.txt", trials)
    assert (tmp_path / "t.txt").read_text() == "1 a/x/1.wav a/y/2.wav\n0 a/x/1.wav b/1.flac\n"
    assert read_trials(tmp_path / "t.txt") == trials


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a/1.wav a/2.wav\n2 a/1.wav b/1.wav\n", "line 2: '2 a/1.wav b/1.wav' is not of the form"),
        ("1 a/1.wav\n", "line 1: '1 a/1.wav' is not of the form"),
        ("1 a/1.wav a/2.wav\n\n0 b/1.wav b/1.wav\n", "line 3: compares b/1.wav with itself"),
        ("1 a/1.wav a/2.wav\n", "must contain at least one target .*, got 1 trials"),
        ("", "got 0 trials"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DemoError, match=message) as raised:
        read_trials(tmp_path / "t.txt")
    assert str(tmp_path / "t.txt") in str(raised.value)


def test_missing_files_are_refused(tmp_path):
    folder = speakers(tmp_path, 2)
    (tmp_path / "t.txt").write_text("1 s0/session/0.wav s0/session/1.wav\n0 s0/session/0.wav s9/0.wav\n")
    with pytest.raises(DemoError, match=r"t.txt, line 2: .*s9/0.wav is not there"):
        read_trials(tmp_path / "t.txt", folder)
    with pytest.raises(DemoError, match="cannot be read as a trial list"):
        read_trials(tmp_path / "none.txt")
    with pytest.raises(DemoError, match="white space"):
        write_trials(tmp_path / "t.txt", [Trial(1, "a b/1.wav", "a b/2.wav")])


def test_recordings_are_found_by_speaker(tmp_path):
    speakers(tmp_path, 2, each=2)
    for name in ("s1/other/voice.G722", "s1/notes.txt", "loose.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = list_recordings(tmp_path)
    assert found["s0"] == ["s0/session/0.wav", "s0/session/1.wav"]
    assert found["s1"] == ["s1/other/voice.G722", "s1/session/0.wav", "s1/session/1.wav"]
    assert len(found) == 2 and speaker_of(found["s1"][0]) == "s1"
    with pytest.raises(DemoError, match="no such folder"):
        list_recordings(tmp_path / "none")
    with pytest.raises(DemoError, match="contains no recording"):
        list_recordings(tmp_path / "s0" / "session")


def test_made_lists_are_balanced_and_deterministic(tmp_path):
    found = list_recordings(speakers(tmp_path, 4))
    trials = make_trials(found, 30)
    assert [trial.label for trial in trials] == [1] * 30 + [0] * 30
    assert all((speaker_of(t.first) == speaker_of(t.second)) == bool(t.label) for t in trials)
    assert len({frozenset(trial[1:]) for trial in trials}) == 60  # no self-trial, no pair twice, in neither direction
    turned = {speaker: paths[::-1] for speaker, paths in reversed(found.items())}
    assert make_trials(turned, 30) == trials
    assert make_trials(found, 10) == trials[:10] + trials[30:40]
    assert len(make_trials(found)) == 2 * 4 * 10  # all target pairs, and as many others


def test_non_target_trials_can_stay_within_a_group(tmp_path):
    found = list_recordings(speakers(tmp_path, 4))
    groups = {"s0": "a", "s1": "a", "s2": "b", "s3": "b"}
    others = [t for t in make_trials(found, group=groups.__getitem__) if t.label == 0]
    assert {tuple(sorted({speaker_of(t.first), speaker_of(t.second)})) for t in others} == {("s0", "s1"), ("s2", "s3")}


def test_lists_that_cannot_be_made_are_refused():
    with pytest.raises(DemoError, match="1 speakers give 1 target and 0 non-target"):
        make_trials({"a": ["a/1.wav", "a/2.wav"]})
    with pytest.raises(DemoError, match="2 speakers give 0 target and 1 non-target"):
        make_trials({"a": ["a/1.wav"], "b": ["b/1.wav"]})
    with pytest.raises(DemoError, match="`most` must allow at least one trial of each kind, got 0"):
        make_trials({}, 0)


def test_a_plan_keeps_speakers_and_utterances_apart(tmp_path):
    plan = make_plan(speakers(tmp_path, 9))
    measured = {name: {path for t in trials for path in t[1:]} for name, trials in plan.lists.items()}
    of = {name: {speaker_of(path) for path in paths} for name, paths in measured.items()}
    training = {path for paths in plan.training.values() for path in paths}
    assert not of[UNSEEN] & of[VALIDATION] and not (of[UNSEEN] | of[VALIDATION]) & set(plan.training)
    assert of[HELD_OUT] == set(plan.training) and not measured[HELD_OUT] & training
    assert set(plan.measured) == set().union(*measured.values())
    assert list(plan.only(VALIDATION).lists) == [VALIDATION]
    assert all(sorted(t.label for t in trials) == [0, 0, 1, 1] for trials in plan.shortened(2).lists.values())


def test_few_recordings_of_a_speaker_are_all_trained_on(tmp_path):
    plan = make_plan(speakers(tmp_path, 9, each=3))
    assert set(plan.lists) == {UNSEEN, VALIDATION} and {len(paths) for paths in plan.training.values()} == {3}


def test_speakers_of_a_given_list_are_not_trained_on(tmp_path):
    folder = speakers(tmp_path / "all", 8)
    file = tmp_path / "t.txt"
    file.write_text("1 s3/session/0.wav s3/session/1.wav\n0 s3/session/0.wav s5/session/1.wav\n")
    plan = make_plan(folder, trials=file)
    assert plan.lists[UNSEEN] == read_trials(file) and NEAR not in plan.lists
    assert not {"s3", "s5"} & ({speaker_of(p) for t in plan.lists[VALIDATION] for p in t[1:]} | set(plan.training))


def test_too_few_speakers_are_refused(tmp_path):
    with pytest.raises(DemoError, match="5 speakers, 2 of them in the test"):
        hashed_roles([f"s{i}" for i in range(5)])
    roles = hashed_roles([f"s{i}" for i in range(6)])
    assert sorted(roles.values()) == ["test"] * 2 + ["train"] * 2 + ["validation"] * 2
    with pytest.raises(DemoError, match="target"):
        make_plan(speakers(tmp_path, 6, each=1))
