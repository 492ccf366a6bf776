"""Held-out images, and labels that only the test images have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.evaluate.splits import count_unseen_labels, held_out
from pipeline.system.errors import InputError


@pytest.mark.parametrize("labels", [np.arange(50), np.repeat(np.arange(10), 5), np.tile(np.arange(7), 9)])
def test_small_classes_keep_training_images(labels: np.ndarray) -> None:
    mask = held_out(labels)
    assert mask.sum() == -(-len(labels) // 10)
    assert max(np.bincount(labels[mask])) <= -(-max(np.bincount(labels)) // 10)


def test_unseen_labels_are_counted_and_refused_if_there_are_no_others() -> None:
    assert count_unseen_labels(np.array([0, 1, 1]), np.array([1, 2, 0, 3]), Path("x")) == 2
    assert count_unseen_labels(np.array([0, 1]), np.array([1, 0]), Path("x")) == 0
    with pytest.raises(InputError, match=r"x.beton: no test image has a class of the training images"):
        count_unseen_labels(np.arange(9), np.arange(9, 12), Path("x.beton"))
