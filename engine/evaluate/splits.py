"""Training and test images: the split of one file, and checks of two."""

from pathlib import Path

import numpy as np

from pipeline.beton import Beton
from pipeline.system.errors import InputError

HELD_OUT = 10
"""Every tenth image of a single file is a test image."""


def refuse_unlabeled(*betons: Beton) -> None:
    """Raise InputError for a data set in which an image has no label."""
    for beton in betons:
        if beton.labels.min() < 0:
            raise InputError(f"{beton.path}: has images without a label: prepare it from class folders")


def refuse_other_classes(train: Beton, test: Beton) -> None:
    """Raise InputError for data sets of different class names, in which one label means two classes."""
    if train.classes and test.classes and train.classes != test.classes:
        raise InputError(
            f"{test.path}: its {len(test.classes)} classes are not the {len(train.classes)} of {train.path}: prepare "
            "both from the same class folders"
        )


def held_out(labels: np.ndarray) -> np.ndarray:
    """Return a mask of the test images, bool [N]: every tenth, counted class by class."""
    mask = np.zeros(len(labels), bool)
    mask[np.argsort(labels, kind="stable")[::HELD_OUT]] = True
    return mask


def count_unseen_labels(train: np.ndarray, test: np.ndarray, path: Path) -> int:
    """Return the number of test labels that are not among the training labels, [N] each.

    path: of the test images. Raises InputError if all are: top-1 would be 0 for any encoder.
    """
    count = int((~np.isin(test, train)).sum())
    if count == len(test):
        raise InputError(f"{path}: no test image has a class of the training images: give several images of each class")
    return count
