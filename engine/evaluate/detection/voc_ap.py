"""PASCAL VOC's average precision, at any overlap.

As the devkit counts: a detection is right where its overlap with an object of its class is above the threshold, and it
is the most confident to claim that object; objects marked difficult are neither found nor missed. `voc07`: the mean of
the best precisions at recalls of 0, 0.1 ... 1. `area`: the area below precision that is made to fall (VOC since 2010).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Metric = Literal["voc07", "area"]
THRESHOLDS = tuple(threshold / 100 for threshold in range(50, 100, 5))


@dataclass
class Boxes:
    """Boxes of one class in many images."""

    images: np.ndarray
    """int64 [N]: which image each is in."""
    boxes: np.ndarray
    """float [N, 4]: left, top, right, bottom."""
    marks: np.ndarray
    """[N]: of detections float scores, of objects bool: difficult."""


@dataclass
class Precision:
    """Shares from 0 to 1, means over classes."""

    ap: float
    """Over the thresholds 0.5, 0.55 ... 0.95."""
    ap50: float
    ap75: float
    per_class: dict[str, float]
    """AP50."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"AP {100 * self.ap:.2f}, AP50 {100 * self.ap50:.2f}, AP75 {100 * self.ap75:.2f}"


def precision(found: list[Boxes], true: list[Boxes], names: tuple[str, ...], metric: Metric) -> Precision:
    """Return the scores of detections, by class. A class without objects has no part in the means."""
    table = {
        name: np.array([average_precision(one, other, at, metric) for at in THRESHOLDS])
        for name, one, other in zip(names, found, true, strict=True)
        if (~other.marks).any()
    }
    means = np.mean(list(table.values()), axis=0)
    per_class = {name: float(values[0]) for name, values in table.items()}
    return Precision(float(means.mean()), float(means[0]), float(means[THRESHOLDS.index(0.75)]), per_class)


def average_precision(found: Boxes, true: Boxes, threshold: float, metric: Metric) -> float:
    """Return the average precision of one class's detections; NaN where there are no objects but difficult ones."""
    objects = (~true.marks).sum()
    if not objects:
        return float("nan")
    order = np.argsort(-found.marks, kind="stable")
    overlap, which = _best(found.images[order], found.boxes[order], true)
    claims = overlap > threshold
    difficult = claims & true.marks[which]
    right = np.zeros(len(order), bool)
    _, first = np.unique(which[claims & ~difficult], return_index=True)
    right[np.flatnonzero(claims & ~difficult)[first]] = True
    counted = right[~difficult]
    hits = np.cumsum(counted)
    return _summary(hits / objects, hits / np.arange(1, len(hits) + 1), metric)


def _best(images: np.ndarray, boxes: np.ndarray, true: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Return each detection's largest overlap with an object of its image, and which object that is; 0 for none."""
    overlap, which = np.zeros(len(images)), np.zeros(len(images), np.int64)
    for image in np.unique(images):
        here, there = np.flatnonzero(images == image), np.flatnonzero(true.images == image)
        if len(there):
            ious = _ious(boxes[here], true.boxes[there])
            overlap[here], which[here] = ious.max(axis=1), there[ious.argmax(axis=1)]
    return overlap, which


def _ious(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return intersections over unions of boxes [N, 4] and [M, 4]: [N, M]."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (left, right)]
    return both / (areas[0][:, None] + areas[1][None, :] - both)


def _summary(recall: np.ndarray, precision: np.ndarray, metric: Metric) -> float:
    """Return the average of precisions, [N] each, in order of falling confidence."""
    if not len(recall):
        return 0.0
    falling = np.maximum.accumulate(precision[::-1])[::-1]  # the best at that recall or above
    if metric == "area":
        return float((np.diff(recall, prepend=0.0) * falling).sum())
    at = np.searchsorted(recall, np.linspace(0, 1, 11) - 1e-12)
    return float(np.append(falling, 0.0)[at].mean())
