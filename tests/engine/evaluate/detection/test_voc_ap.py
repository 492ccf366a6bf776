"""Average precision against a loop and scikit-learn, and its means by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.evaluate.detection.voc_ap import THRESHOLDS, Boxes, Metric, average_precision, score


def _problem(seed: int) -> tuple[Boxes, Boxes]:
    """Return detections, near objects (some twice) and elsewhere, and the objects (some difficult) in eight images."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (40, 2))
    boxes = np.concatenate([corner, corner + random.uniform(10, 40, (40, 2))], axis=1)
    images = random.integers(0, 8, 40)
    objects = Boxes(images, boxes, random.random(40) < 0.2)
    near = np.repeat(np.arange(40), random.integers(0, 3, 40))
    moved = boxes[near] + random.normal(0, 3, (len(near), 4))
    corner = random.uniform(0, 80, (25, 2))
    others = np.concatenate([corner, corner + 15], axis=1)
    detections = Boxes(
        np.concatenate([images[near], random.integers(0, 9, 25)]),
        np.concatenate([moved, others]),
        random.random(len(near) + 25),
    )
    return detections, objects


def _by_loop(detections: Boxes, objects: Boxes, threshold: float, metric: Metric) -> float:
    """Return the average precision by VOC's development kit, one detection at a time."""
    claimed, hits, misses, points = set(), 0, 0, []
    count = sum(not difficult for difficult in objects.marks)
    for d in sorted(range(len(detections.images)), key=lambda d: -detections.marks[d]):
        best, at = 0.0, -1
        for t in range(len(objects.images)):
            if objects.images[t] != detections.images[d]:
                continue
            a, b = detections.boxes[d], objects.boxes[t]
            wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            both = max(wide, 0) * max(high, 0)
            iou = both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)
            if iou > best:
                best, at = iou, t
        if best > threshold and objects.marks[at]:
            continue
        if best > threshold and at not in claimed:
            claimed.add(at)
            hits += 1
        else:
            misses += 1
        points.append((hits / count, hits / (hits + misses)))
    if metric == "voc07":
        return sum(max([p for r, p in points if r >= t / 10 - 1e-12], default=0.0) for t in range(11)) / 11
    area, before = 0.0, 0.0
    for number, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[number:])
        before = recall
    return area


@pytest.mark.parametrize("metric", ["voc07", "area"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_equals_the_development_kits(seed: int, metric: Metric) -> None:
    detections, objects = _problem(seed)
    values = [average_precision(detections, objects, threshold, metric) for threshold in THRESHOLDS]
    assert values == pytest.approx([_by_loop(detections, objects, threshold, metric) for threshold in THRESHOLDS])
    assert 0.1 < values[0] < 1
    assert values[-1] < values[0]


def test_the_area_equals_scikit_learns_where_precision_falls() -> None:
    """One object an image, with detections on it or far away; the gaps between hits grow."""
    metrics = pytest.importorskip("sklearn.metrics")
    hit = np.isin(np.arange(30), [0, 1, 3, 6, 10, 15, 21, 28])
    scores, box = np.linspace(1, 0, 30), np.array([[0.0, 0, 10, 10]])
    images = np.where(hit, np.cumsum(hit) - 1, 99)
    detections = Boxes(images, np.where(hit[:, None], box, box + 50), scores)
    objects = Boxes(np.arange(8), np.repeat(box, 8, axis=0), np.zeros(8, bool))
    expected = metrics.average_precision_score(hit, scores)
    assert expected < 0.7
    assert average_precision(detections, objects, 0.5, "area") == pytest.approx(expected)


def test_scores_are_means_over_classes_with_objects() -> None:
    one, none = _problem(0), (Boxes(np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)),) * 2
    missed = (none[0], _problem(1)[1])
    only_difficult = (_problem(2)[0], Boxes(np.zeros(1, int), np.array([[0.0, 0, 9, 9]]), np.ones(1, bool)))
    scores = score(*map(list, zip(one, missed, only_difficult, strict=True)), ("a", "b", "c"), "voc07")
    assert set(scores.per_class) == {"a", "b"}
    assert scores.per_class["b"] == 0
    assert scores.ap50 == pytest.approx(average_precision(*one, 0.5, "voc07") / 2)
    assert scores.ap75 == pytest.approx(average_precision(*one, 0.75, "voc07") / 2)
    assert scores.ap == pytest.approx(np.mean([average_precision(*one, at, "voc07") for at in THRESHOLDS]) / 2)
