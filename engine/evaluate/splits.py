"""Images to train on and images to test on: which of one file, and what two files must have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.beton import Beton
from pipeline.system.errors import InputError

HELD_OUT = 10
"""Of one file, every tenth image is for testing."""


def refuse_unlabeled(*betons: Beton) -> None:
    """Raise InputError where an image has no label."""
    for beton in betons:
        if (beton.labels < 0).any():
            raise InputError(f"{beton.path}: has images without a label: prepare it from class folders")


def refuse_other_classes(train: Beton, test: Beton) -> None:
    """Raise InputError where two data sets name different classes: the same label would mean two things."""
    if train.classes and test.classes and train.classes != test.classes:
        raise InputError(
            f"{test.path}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.path}: prepare "
            "both from the same class folders"
        )


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return which images are for testing, bool [N]: every tenth, counted class by class."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::HELD_OUT]] = True
    return chosen


def unseen(train: np.ndarray, test: np.ndarray, path: Path) -> int:
    """Return how many of the labels to test on are none of those to train on, [N] each.

    Raises InputError where all are: whatever comes of it, the result would be 0. path: of the test images.
    """
    count = int((~np.isin(test, train)).sum())
    if count == len(test):
        raise InputError(
            f"{path}: no image to test on is of a class with images to train on: give data of several images a class"
        )
    return count
