"""PASCAL VOC's average precision, at any overlap.

As in the development kit: a detection is a hit if its overlap with an object of its class is above the threshold and no
more confident detection has claimed that object; objects marked difficult count neither as hits nor as misses.
`voc07`: the mean of the best precisions at recalls of 0, 0.1 ... 1. `area`: the area below the precision, made
monotonic (VOC since 2010).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.evaluate.accuracy import Scores

Metric = Literal["voc07", "area"]
THRESHOLDS = tuple(threshold / 100 for threshold in range(50, 100, 5))


@dataclass
class Boxes:
    """Boxes of one class in many images."""

    images: np.ndarray
    """int64 [N]: the image of each."""
    boxes: np.ndarray
    """float [N, 4]: left, top, right, bottom."""
    marks: np.ndarray
    """[N]: of detections their scores, float; of objects whether they are difficult, bool."""


@dataclass
class DetectionScores(Scores):
    """Scores of a detector, means over classes."""

    MAIN = "ap"
    ap: float
    """Mean over the thresholds 0.5, 0.55 ... 0.95."""
    ap50: float
    ap75: float
    per_class: dict[str, float]
    """AP50."""

    def __str__(self) -> str:
        return f"AP {100 * self.ap:.2f}, AP50 {100 * self.ap50:.2f}, AP75 {100 * self.ap75:.2f}"


def score(detections: list[Boxes], objects: list[Boxes], names: tuple[str, ...], metric: Metric) -> DetectionScores:
    """Return the scores of detections, given by class. The means are over classes with objects."""
    table = {
        name: np.array([average_precision(boxes, truth, threshold, metric) for threshold in THRESHOLDS])
        for name, boxes, truth in zip(names, detections, objects, strict=True)
        if (~truth.marks).any()
    }
    means = np.mean(list(table.values()), axis=0)
    per_class = {name: float(values[0]) for name, values in table.items()}
    return DetectionScores(float(means.mean()), float(means[0]), float(means[THRESHOLDS.index(0.75)]), per_class)


def average_precision(detections: Boxes, objects: Boxes, threshold: float, metric: Metric) -> float:
    """Return the average precision of one class's detections; NaN without objects that are not difficult."""
    count = (~objects.marks).sum()
    if not count:
        return float("nan")
    order = np.argsort(-detections.marks, kind="stable")
    overlap, target = _best_overlaps(detections.images[order], detections.boxes[order], objects)
    claims = overlap > threshold
    difficult = claims & objects.marks[target]
    hits = np.zeros(len(order), bool)
    _, first = np.unique(target[claims & ~difficult], return_index=True)
    hits[np.flatnonzero(claims & ~difficult)[first]] = True
    total = np.cumsum(hits[~difficult])
    return _average(total / count, total / np.arange(1, len(total) + 1), metric)


def _best_overlaps(images: np.ndarray, boxes: np.ndarray, objects: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's largest overlap with an object of its image, and that object; 0 and 0 for none."""
    overlap, target = np.zeros(len(images)), np.zeros(len(images), np.int64)
    for image in np.unique(images):
        rows, columns = np.flatnonzero(images == image), np.flatnonzero(objects.images == image)
        if len(columns):
            ious = _ious(boxes[rows], objects.boxes[columns])
            overlap[rows], target[rows] = ious.max(axis=1), columns[ious.argmax(axis=1)]
    return overlap, target


def _ious(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return intersections over unions of boxes [N, 4] and [M, 4]: [N, M]."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (left, right)]
    return both / (areas[0][:, None] + areas[1][None, :] - both)


def _average(recall: np.ndarray, precision: np.ndarray, metric: Metric) -> float:
    """Return the average of precisions, [N] each, in order of falling confidence."""
    if not len(recall):
        return 0.0
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at that recall or above
    if metric == "area":
        return float((np.diff(recall, prepend=0.0) * best).sum())
    at = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-12)
    return float(np.append(best, 0.0)[at].mean())
