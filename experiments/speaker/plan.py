"""Which speakers are trained on, and which trials are measured."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from experiments.asr import DemoError
from experiments.speaker.trials import Trial, list_recordings, make_trials, read_trials, speaker_of

UNSEEN, NEAR, HELD_OUT = "unseen speakers", "unseen, one package", "held-out utterances"
VALIDATION = "validation"
EVERY = 4  # of a training speaker's recordings, the first of so many is held out
MOST = 1000  # trials of each kind in a list that is made


@dataclass(frozen=True)
class Plan:
    """Training recordings by speaker, and trial lists by name; all paths are relative to `folder`."""

    folder: Path
    training: dict[str, list[str]]
    lists: dict[str, list[Trial]]

    @property
    def measured(self) -> list[str]:
        """Every recording that a trial names."""
        return sorted({path for trials in self.lists.values() for trial in trials for path in _recordings(trial)})

    def only(self, name: str) -> Plan:
        """The plan with this list alone."""
        return Plan(self.folder, self.training, {name: self.lists[name]})

    def shortened(self, most: int) -> Plan:
        """The first `most` trials of each kind in each list, and recordings of each training speaker."""
        lists = {
            name: [trial for label in (1, 0) for trial in [t for t in trials if t.label == label][:most]]
            for name, trials in self.lists.items()
        }
        return Plan(self.folder, {speaker: paths[:most] for speaker, paths in self.training.items()}, lists)


def _recordings(trial: Trial) -> tuple[str, str]:
    return trial.first, trial.second


def hashed_roles(speakers: list[str], tested: Collection[str] = ()) -> dict[str, str]:
    """Speaker -> "test" (those given, or a quarter), "validation" (an eighth) or "train"; by a hash of the names."""
    order = sorted(speakers, key=lambda name: hashlib.sha256(name.encode()).digest())
    test = [name for name in order if name in tested] if tested else order[: max(2, len(order) // 4)]
    rest = [name for name in order if name not in test]
    validation = rest[: max(2, len(order) // 8)]
    if len(rest) - len(validation) < 2:
        raise DemoError(
            f"{len(order)} speakers, {len(test)} of them in the test: at least two more are needed for training and "
            "two for validation"
        )
    return {name: "test" if name in test else "validation" if name in validation else "train" for name in order}


def make_plan(
    folder: Path,
    roles: dict[str, str] | None = None,
    trials: Path | None = None,
    packages: dict[str, str] | None = None,
) -> Plan:
    """The plan for a folder of speakers.

    roles: speaker -> "train", "validation" or "test" (default: `hashed_roles`, where every speaker that `trials` names
    is for the test). trials: the list to be measured instead of one that is made. packages: speaker -> where its
    recordings come from; gives one more list, whose non-target trials stay within a package. One more is of held-out
    utterances of the training speakers, where they have more than EVERY recordings.
    Raises DemoError where speakers, recordings or trials don't suffice.
    """
    found = list_recordings(folder)
    listed = None if trials is None else read_trials(trials, folder)
    if roles is None:
        roles = hashed_roles(list(found), {speaker_of(path) for trial in listed or () for path in _recordings(trial)})
    of = {
        kind: {s: paths for s, paths in found.items() if roles[s] == kind} for kind in ("train", "validation", "test")
    }
    lists = {UNSEEN: listed or make_trials(of["test"], MOST)}
    if packages:
        lists[NEAR] = make_trials(of["test"], MOST, packages.__getitem__)
    held_out = {speaker: paths[::EVERY] for speaker, paths in of["train"].items()}
    if all(len(paths) < 2 for paths in held_out.values()):  # no target trial
        held_out = {speaker: [] for speaker in held_out}
    training = {s: [path for path in paths if path not in held_out[s]] for s, paths in of["train"].items()}
    if few := [speaker for speaker, paths in training.items() if not paths]:
        raise DemoError(f"{folder / few[0]}: at least two recordings of a training speaker are needed")
    if any(held_out.values()):
        lists[HELD_OUT] = make_trials(held_out, MOST)
    lists[VALIDATION] = make_trials(of["validation"], MOST)
    return Plan(folder, training, lists)
