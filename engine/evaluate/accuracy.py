"""Top-1, top-5, accuracy by class, and how far chance alone could have moved them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_RESAMPLES = 10000
_LEVEL = 0.95


@dataclass
class Scores:
    """Shares from 0 to 1."""

    top1: float
    top5: float
    interval: tuple[float, float]
    """95 % interval of top-1, by bootstrap over the test images."""
    mean_per_class: float
    per_class: dict[str, float]
    """Top-1 by class name, or number, of the classes that occur."""
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = (f"{100 * bound:.2f}" for bound in self.interval)
        return f"top-1 {self.top1:.2%} ({low}-{high}), top-5 {self.top5:.2%}"


def score(ranked: np.ndarray, labels: np.ndarray, names: list[str] | None = None) -> Scores:
    """Return the scores of classes `ranked` (int64 [N, 5], likeliest first) for images of class `labels` (int64 [N]).

    names: of the classes, by label.
    """
    hit = ranked == labels[:, None]
    right = hit[:, 0]
    by_class = {int(label): float(right[labels == label].mean()) for label in np.unique(labels)}
    named = {names[label] if names and label < len(names) else str(label): share for label, share in by_class.items()}
    return Scores(
        top1=float(right.mean()),
        top5=float(hit.any(axis=1).mean()),
        interval=interval(right),
        mean_per_class=float(np.mean(list(by_class.values()))),
        per_class=named,
        images=len(labels),
    )


def interval(right: np.ndarray) -> tuple[float, float]:
    """Return the percentile bootstrap's 95 % interval of the mean of `right`, bool [N].

    How many are right among N that are drawn from N with replacement is binomial: so it is drawn, exactly.
    """
    draws = np.random.default_rng(0).binomial(len(right), right.mean(), _RESAMPLES) / len(right)
    return bounds(draws)


def bounds(draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval that resampled values [R] span."""
    low, high = np.quantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
