"""Scores by hand, and the interval against a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from engine.evaluate.accuracy import binomial_interval, score


def test_scores_by_hand() -> None:
    ranked = np.array([[0, 1, 2, 3, 4], [1, 4, 2, 3, 0], [5, 4, 3, 2, 1], [2, 0, 1, 3, 4]])
    scores = score(ranked, np.array([0, 0, 0, 2]), ["a", "b", "c"])
    assert (scores.top1, scores.top5) == (0.5, 0.75)
    assert scores.per_class == {"a": 1 / 3, "c": 1.0}
    assert scores.mean_per_class == pytest.approx(2 / 3)


def test_the_interval_is_the_bootstraps() -> None:
    random = np.random.default_rng(3)
    correct = random.random(400) < 0.7
    means = [random.choice(correct, len(correct)).mean() for _ in range(4000)]
    low, high = binomial_interval(correct)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.006)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.006)
