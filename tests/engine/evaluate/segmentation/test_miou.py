"""Segmentation scores against scikit-learn, and their interval against a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.evaluate.segmentation.miou import count_pixels, score


def _masks(seed: int, images: int = 5, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return masks and predictions that partly agree: class 4 in no mask, class 5 in neither, some pixels 255."""
    random = np.random.default_rng(seed)
    masks = random.integers(0, classes - 2, (images, 9, 7))
    predicted = np.where(random.random(masks.shape) < 0.6, masks, random.integers(0, classes - 1, masks.shape))
    masks[random.random(masks.shape) < 0.2] = 255
    return masks, predicted


def test_scores_equal_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    masks, predicted = _masks(0)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(masks), 6).numpy()
    scores = score(counts, [*"abcdef"], 0)
    known = masks != 255
    ious = metrics.jaccard_score(masks[known], predicted[known], average=None, labels=range(5))
    assert list(scores.per_class) == [*"abcde"]  # f occurs nowhere
    assert list(scores.per_class.values()) == pytest.approx(ious)
    assert scores.per_class["e"] == 0
    assert scores.miou == pytest.approx(ious.mean())
    assert scores.pixel_accuracy == pytest.approx((masks == predicted)[known].mean())


def test_the_interval_is_the_bootstraps_over_images() -> None:
    masks, predicted = _masks(1, images=30)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(masks), 6).numpy()
    random, means = np.random.default_rng(7), []
    for _ in range(1500):
        rows = random.integers(30, size=30)
        ious = []
        for number in range(6):
            mine, other = (array[rows][masks[rows] != 255] == number for array in (masks, predicted))
            ious += [(mine & other).sum() / (mine | other).sum()] if (mine | other).any() else []
        means.append(np.mean(ious))
    low, high = score(counts, [*"abcdef"], 0).interval
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)
