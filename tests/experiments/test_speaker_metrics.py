"""EER and minDCF against brute force over every threshold, and against values known by hand."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from experiments.speaker.metrics import eer, mean_and_spread, min_dcf, operating_points

FEW_ROUNDINGS = 8 * np.finfo(float).eps  # 16 of them, in formulas of fewer than 16 operations


def brute_force_points(scores: list[float], labels: list[int]) -> list[tuple[Fraction, Fraction]]:
    """(P_miss, P_fa) at each threshold, the highest first, by counting."""
    points = []
    for threshold in [np.inf, *sorted(set(scores), reverse=True)]:
        missed = sum(label == 1 and score < threshold for score, label in zip(scores, labels, strict=True))
        alarms = sum(label == 0 and score >= threshold for score, label in zip(scores, labels, strict=True))
        points.append((Fraction(missed, labels.count(1)), Fraction(alarms, labels.count(0))))
    return points


def brute_force_eer(points: list[tuple[Fraction, Fraction]]) -> Fraction:
    """The point with equal coordinates on the segments between neighbours, solved exactly."""
    for (miss0, alarm0), (miss1, alarm1) in pairwise(points):
        if miss0 >= alarm0 and miss1 <= alarm1:
            share = (miss0 - alarm0) / ((miss0 - alarm0) - (miss1 - alarm1))
            return miss0 + share * (miss1 - miss0)
    raise AssertionError("the rates never cross")


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force_with_ties(seed):
    random = np.random.default_rng(seed)
    labels = [0, 1, *random.integers(0, 2, 40).tolist()]
    scores = random.integers(0, (3, 10, 1000)[seed % 3], 42).astype(float).tolist()  # many ties, some, hardly any
    points = brute_force_points(scores, labels)
    miss, alarm = operating_points(scores, labels)
    np.testing.assert_allclose(np.stack([miss, alarm], 1), np.array(points, float), rtol=0, atol=FEW_ROUNDINGS)
    assert eer(scores, labels) == pytest.approx(float(brute_force_eer(points)), abs=FEW_ROUNDINGS)
    for p, c_miss, c_fa in ((0.01, 1.0, 1.0), (0.05, 1.0, 1.0), (0.3, 10.0, 1.0), (0.9, 1.0, 2.0)):
        costs = [c_miss * p * float(m) + c_fa * (1 - p) * float(a) for m, a in points]
        expected = min(costs) / min(c_miss * p, c_fa * (1 - p))
        assert min_dcf(scores, labels, p, c_miss, c_fa) == pytest.approx(expected, rel=FEW_ROUNDINGS)


def test_known_equal_error_rates():
    labels = [1, 1, 0, 0]
    assert eer([2, 3, 0, 1], labels) == 0.0  # separated
    assert eer([0, 1, 2, 3], labels) == 1.0  # the wrong way round
    assert eer([1, 1, 1, 1], labels) == 0.5  # no information: one tie
    assert eer([1, 3, 0, 2], labels) == 0.5  # a step from (1/2, 0) to (1/2, 1/2)
    assert eer([3, 1, 1, 0], labels) == 0.25  # a tie: one slanted segment from (1/2, 0) to (0, 1/2)


def test_known_costs():
    scores, labels = [4, 3, 2, 1, 0], [1, 0, 1, 0, 0]
    # accept the best one: misses half, no false alarm; any false alarm costs 99 / 3
    assert min_dcf(scores, labels, 0.01) == pytest.approx(0.5, rel=FEW_ROUNDINGS)
    assert min_dcf(scores, labels, 0.5) == pytest.approx(1 / 3, rel=FEW_ROUNDINGS)  # all targets for one alarm of three
    assert min_dcf([0, 1], [1, 0], 0.05) == pytest.approx(1.0, rel=FEW_ROUNDINGS)  # never worse than refusing everybody


def test_order_and_scale_do_not_matter():
    random = np.random.default_rng(0)
    labels, scores = random.integers(0, 2, 200), random.normal(size=200)
    order = random.permutation(200)
    assert eer(scores, labels) == eer(3 * scores[order] - 7, labels[order])
    assert min_dcf(scores, labels) == min_dcf(np.exp(scores)[order], labels[order])
    assert eer(-scores, 1 - labels) == pytest.approx(eer(scores, labels), abs=FEW_ROUNDINGS)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [1, 1], "2 target trials of 2"),
        ([1.0, 2.0], [0, 0], "0 target trials of 2"),
        ([], [], "0 target trials of 0"),
        ([1.0, float("nan")], [0, 1], "`scores` must be finite, got 1 of 2 that are NaN"),
        ([1.0, 2.0], [0, 2], "`labels` must be 0 or 1, got .*2"),
        ([1.0, 2.0, 3.0], [0, 1], r"`scores` and `labels` must be vectors of .*got shapes \(3,\) and \(2,\)"),
    ],
)
def test_degenerate_input_is_refused(scores, labels, message):
    for metric in (eer, min_dcf):
        with pytest.raises(ValueError, match=message):
            metric(scores, labels)


def test_impossible_costs_are_refused():
    for p in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"`p_target` must be a number in .*got {p}"):
            min_dcf([1, 0], [1, 0], p)
    for name, cost in (("c_fa", 0), ("c_miss", float("nan"))):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive number, got {cost}"):
            min_dcf([1, 0], [1, 0], **{name: cost})


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0]) == (2.0, 2**0.5)
    assert np.isnan(mean_and_spread([1.0])[1])
