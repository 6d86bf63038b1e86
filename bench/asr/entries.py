"""The results of an experiment's cells, put together by shift, method and budget; error rates with their intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .methods import METHODS
from .shifts import SHIFTS
from .speech import AS_RECORDED

RESAMPLES = 2000
Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One method at one budget on one shift, over its seeds."""

    shift: str
    method: str
    budget: float | None
    results: Results

    @property
    def title(self) -> str:
        return METHODS[self.method].title

    @property
    def domain(self) -> str:
        """The shift's title."""
        return str(self.results[0]["title"])

    @property
    def share(self) -> float:
        """Trainable share of the model's parameters."""
        return float(self.results[0]["trainable"] / self.results[0]["total"])

    def values(self, name: str) -> list[float]:
        return [float(result[name]) for result in self.results]

    def rates(self, sets: Iterable[str], rate: str = "wer") -> list[float]:
        """Word (or character) error rate of each seed, over the pooled sets."""
        found = [counts(result, sets, rate) for result in self.results]
        return [float(errors.sum() / sizes.sum()) for errors, sizes in found]

    @cached_property
    def others(self) -> list[str]:
        """The sets of the source domain that other speakers recorded."""
        return [name for name in self.results[0]["scores"] if name not in ("test", "validation", AS_RECORDED)]


def counts(result: dict[str, Any], sets: Iterable[str], rate: str = "wer") -> tuple[NDArray[Any], NDArray[Any]]:
    """(errors, words) of every utterance of the pooled sets, or (errors, characters)."""
    first = {"wer": 0, "cer": 2}[rate]
    rows = np.array([row for name in sets for row in result["scores"][name]["per_utterance"]], dtype=float)
    return rows[:, first], rows[:, first + 1]


def interval(results: Results, sets: Sequence[str], against: Results = ()) -> tuple[float, float]:
    """95 % bootstrap interval of the mean WER over seeds, utterances resampled; or of its difference to `against`."""
    errors, words = _mean_errors(results, sets)
    if against:
        errors = errors - _mean_errors(against, sets)[0]
    chosen = np.random.default_rng(0).integers(len(words), size=(RESAMPLES, len(words)))
    low, high = np.quantile(errors[chosen].sum(1) / words[chosen].sum(1), (0.025, 0.975))
    return float(low), float(high)


def _mean_errors(results: Results, sets: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    found = [counts(result, sets) for result in results]
    return np.mean([errors for errors, _ in found], axis=0), found[0][1]


def entries(results: Iterable[dict[str, Any]]) -> list[Entry]:
    """The results by shift, method and budget, in the order of METHODS, seeds together."""
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda r: r["cell"]["seed"]):
        cell = result["cell"]
        groups[cell["shift"], cell["method"], cell["budget"]].append(result)
    methods, shifts = list(METHODS), [*SHIFTS, *dict.fromkeys(shift for shift, _, _ in groups)]
    found = [Entry(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda e: (shifts.index(e.shift), methods.index(e.method), e.budget or 0))
