"""The results of an experiment's cells, put together by shift, method and budget; error rates with their intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.asr.methods import METHODS
from experiments.asr.shifts import SAME_VOICE, SHIFTS
from experiments.asr.speech import AS_RECORDED

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
        same = ("test", AS_RECORDED) if self.shift in SAME_VOICE else ("test",)
        return [name for name in self.results[0]["scores"] if name not in same]


def counts(result: dict[str, Any], sets: Iterable[str], rate: str = "wer") -> tuple[NDArray[Any], NDArray[Any]]:
    """(errors, words) of every utterance of the pooled sets, or (errors, characters)."""
    first = {"wer": 0, "cer": 2}[rate]
    rows = np.array([row for name in sets for row in result["scores"][name]["per_utterance"]], dtype=float)
    return rows[:, first], rows[:, first + 1]


def interval(results: Results, sets: Sequence[str], against: Results = ()) -> tuple[float, float]:
    """95 % bootstrap interval of the mean WER over seeds, seeds and utterances resampled; or of its difference.

    against: the results that are subtracted, utterance by utterance; of as many seeds, seed by seed, too.
    """
    rng = np.random.default_rng(0)
    words = counts(results[0], sets)[1]
    utterances = _draws(rng, len(words))
    seeds = _draws(rng, len(results))
    errors = _drawn_errors(results, sets, seeds, utterances)
    if against:
        others = seeds if len(against) == len(results) else _draws(rng, len(against))
        errors = errors - _drawn_errors(against, sets, others, utterances)
    low, high = np.quantile(errors / (utterances @ words), (0.025, 0.975))
    return float(low), float(high)


def with_interval(results: Results, sets: Sequence[str], against: Results = ()) -> str:
    """The mean WER over seeds, or its difference, and the 95 % interval, in per cent: "7.1 (3.9 to 10.6)"."""

    def mean(some: Results) -> float:
        rates = [errors.sum() / words.sum() for errors, words in (counts(result, sets) for result in some)]
        return 100 * float(np.mean(rates)) if rates else 0.0

    sign = "+" if against else ""
    low, high = (100 * bound for bound in interval(results, sets, against))
    return f"{mean(results) - mean(against):{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def _draws(rng: np.random.Generator, count: int) -> NDArray[Any]:
    """(RESAMPLES, count): how often each of `count` things is among as many drawn with replacement."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)


def _drawn_errors(results: Results, sets: Sequence[str], seeds: NDArray[Any], utterances: NDArray[Any]) -> NDArray[Any]:
    """(RESAMPLES,) errors in the drawn utterances, mean over the drawn seeds."""
    errors = np.stack([counts(result, sets)[0] for result in results])
    drawn: NDArray[Any] = ((seeds @ errors) * utterances).sum(1) / len(results)
    return drawn


def entries(results: Iterable[dict[str, Any]]) -> list[Entry]:
    """The error rates by shift, method and budget, in the order of METHODS, seeds together; no run that diverged."""
    groups: dict[tuple[str, str, float | None], list[dict[str, Any]]] = defaultdict(list)
    for result in sorted((r for r in results if "scores" in r), key=lambda r: r["cell"]["seed"]):
        cell = result["cell"]
        groups[cell["shift"], cell["method"], cell["budget"]].append(result)
    methods, shifts = list(METHODS), [*SHIFTS, *dict.fromkeys(shift for shift, _, _ in groups)]
    found = [Entry(*key, group) for key, group in groups.items()]
    return sorted(found, key=lambda e: (shifts.index(e.shift), methods.index(e.method), e.budget or 0))
