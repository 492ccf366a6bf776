"""Top-1, top-5 and accuracy of each class, with bootstrap intervals."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

_RESAMPLES = 10000
Interval = tuple[float, float]


@dataclass
class Scores:
    """Base of an evaluation's scores, fractions from 0 to 1."""

    MAIN: ClassVar[str]
    """Name of the score for a table."""


@dataclass
class Accuracy(Scores):
    """Scores of a classifier."""

    MAIN = "top1"
    top1: float
    top5: float
    interval: Interval
    """95 % interval of top-1, by bootstrap over the test images."""
    mean_per_class: float
    per_class: dict[str, float]
    """Top-1 of each class that occurs, by its name or number."""
    images: int

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} ({percent(self.interval)}), top-5 {self.top5:.2%}"


def score(predicted: np.ndarray, labels: np.ndarray, names: list[str]) -> Accuracy:
    """Return the scores of predicted classes int64 [N, 5], likeliest first, for images of `labels`, int64 [N].

    names: of the classes, by label; empty if unknown.
    """
    hits = predicted == labels[:, None]
    correct = hits[:, 0]
    by_class = {int(label): float(correct[labels == label].mean()) for label in np.unique(labels)}
    return Accuracy(
        top1=float(correct.mean()),
        top5=float(hits.any(axis=1).mean()),
        interval=binomial_interval(correct),
        mean_per_class=float(np.mean(list(by_class.values()))),
        per_class={names[label] if label < len(names) else str(label): value for label, value in by_class.items()},
        images=len(labels),
    )


def binomial_interval(correct: np.ndarray) -> Interval:
    """Return the percentile bootstrap's 95 % interval of the mean of `correct`, bool [N].

    The number of hits among N images drawn from N with replacement is binomial, so it is drawn directly.
    """
    draws = np.random.default_rng(0).binomial(len(correct), correct.mean(), _RESAMPLES) / len(correct)
    return percentile_interval(draws)


def percentile_interval(values: np.ndarray) -> Interval:
    """Return the central 95 % interval of resampled values [R]."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def percent(interval: Interval) -> str:
    """Return an interval as text, in percent."""
    return "-".join(f"{100 * bound:.2f}" for bound in interval)
