"""Intervals of paired differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.common.intervals import paired_difference


@pytest.mark.parametrize("n", [*range(2, 22), 40])
def test_the_interval_is_students(n: int) -> None:
    generator = np.random.default_rng(n)
    base = generator.normal(size=n)
    values = base + generator.normal(0.5, 1, n)
    difference = paired_difference(values.tolist(), base.tolist())
    interval = stats.ttest_rel(values, base).confidence_interval(0.95)
    assert difference is not None
    assert difference.mean == pytest.approx((values - base).mean())
    assert difference.pairs == n
    assert difference.low is not None
    assert difference.high is not None
    if n <= 21:
        assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), rel=1e-3)
    else:
        assert difference.low < interval.low < interval.high < difference.high
        assert difference.high - difference.low < 1.04 * (interval.high - interval.low)


@pytest.mark.parametrize(
    ("values", "shown"),
    [([1.0, 1.2, 1.1], True), ([-1.0, -1.2, -1.1], True), ([1.0, -1.2, 0.1], False), ([1.0], False)],
)
def test_a_difference_is_shown_where_its_interval_leaves_out_zero(values: list[float], shown: bool) -> None:
    difference = paired_difference(values, [0.0] * len(values))
    assert difference is not None
    assert difference.shown is shown


def test_no_pairs_have_no_difference() -> None:
    assert paired_difference([], []) is None
