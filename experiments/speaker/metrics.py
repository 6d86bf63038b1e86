"""Error rates of speaker verification, exact: every threshold that separates two scores is looked at, and no other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rates = NDArray[np.float64]


def operating_points(scores: ArrayLike, labels: ArrayLike) -> tuple[Rates, Rates]:
    """(P_miss, P_fa), each (n + 1,) for n distinct scores: from accepting no trial to accepting all of them.

    scores (N,): higher for "the same speaker"; labels (N,): 1 for a target trial, 0 for a non-target trial. A trial is
    accepted if its score is at least the threshold, so that trials with equal scores are accepted together.
    Raises ValueError for shapes that differ, NaN or infinite scores, other labels, or a list without both kinds.
    """
    score, label = np.asarray(scores, np.float64), np.asarray(labels)
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError(
            f"`scores` and `labels` must be vectors of the same length, got shapes {score.shape} and {label.shape}"
        )
    if not np.isfinite(score).all():
        raise ValueError(
            f"`scores` must be finite, got {int((~np.isfinite(score)).sum())} of {len(score)} that are NaN or infinite"
        )
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"`labels` must be 0 or 1, got {np.setdiff1d(label, (0, 1))[0]!r}")
    targets = int((label == 1).sum())
    if not 0 < targets < len(label):
        raise ValueError(
            f"`labels` must contain at least one trial of each kind, got {targets} target trials of {len(label)}"
        )
    distinct, place = np.unique(-score, return_inverse=True)  # descending
    hits = np.bincount(place, label == 1, len(distinct)).cumsum()
    alarms = np.bincount(place, label == 0, len(distinct)).cumsum()
    start = [0.0]
    return 1 - np.concatenate([start, hits]) / targets, np.concatenate([start, alarms]) / (len(label) - targets)


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate in [0, 1]: where P_miss = P_fa, on the straight lines between neighbouring operating points.

    (Few trials leave a gap around that point; some tools take the mean of both rates at its nearer end instead.)
    Raises ValueError as `operating_points` does.
    """
    miss, alarm = operating_points(scores, labels)
    gap = miss - alarm  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    return float(miss[before] + share * (miss[after] - miss[before]))


def min_dcf(
    scores: ArrayLike, labels: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Smallest normalised detection cost over all thresholds (NIST SRE); 1 is what deciding without listening costs.

        min over thresholds of (c_miss p_target P_miss + c_fa (1 - p_target) P_fa) / smaller of the two factors,
        which are c_miss p_target and c_fa (1 - p_target)

    Raises ValueError as `operating_points` does, and for a p_target outside (0, 1) or a cost that is not positive.
    """
    if not 0 < p_target < 1:
        raise ValueError(f"`p_target` must be a number in (0, 1), got {p_target}")
    for name, cost in (("c_miss", c_miss), ("c_fa", c_fa)):
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"`{name}` must be a positive number, got {cost}")
    miss, alarm = operating_points(scores, labels)
    rejected, accepted = c_miss * p_target, c_fa * (1 - p_target)
    return float((rejected * miss + accepted * alarm).min() / min(rejected, accepted))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN of a single value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread
