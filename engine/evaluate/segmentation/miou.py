"""Intersection over union by class, its mean, pixel accuracy, and how far chance alone could have moved the mean."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engine.evaluate.accuracy import bounds
from pipeline.dense.masks import IGNORED

_RESAMPLES = 1000


@dataclass
class Overlap:
    """Shares from 0 to 1."""

    miou: float
    interval: tuple[float, float]
    """95 % interval of the mean, by bootstrap over the test images."""
    pixel_accuracy: float
    per_class: dict[str, float]
    """By class name, or number, of the classes that occur, in masks or predictions."""
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = (f"{100 * bound:.2f}" for bound in self.interval)
        return f"mIoU {self.miou:.2%} ({low}-{high}), pixel accuracy {self.pixel_accuracy:.2%}"


def count(predicted: torch.Tensor, masks: torch.Tensor, classes: int) -> torch.Tensor:
    """Return, of each image and class, the pixels that are both, predicted so, and masked so: int64 [B, 3, C].

    predicted, masks: int64 [B, H, W]; where the mask is 255, nothing counts.
    """
    batch, known = len(masks), masks != IGNORED
    image = torch.arange(batch, device=masks.device).view(-1, 1, 1).expand_as(masks)
    cell = ((image * classes + masks) * classes + predicted)[known]
    confusion = torch.bincount(cell, minlength=batch * classes**2).view(batch, classes, classes)  # mask, prediction
    return torch.stack([confusion.diagonal(dim1=1, dim2=2), confusion.sum(dim=1), confusion.sum(dim=2)], dim=1)


def overlap(counts: np.ndarray, names: list[str] | None = None, seed: int = 0) -> Overlap:
    """Return the scores of all images together, from the counts of each: int64 [N, 3, C].

    A class that occurs nowhere has no part in the mean. names: of the classes, by number.
    """
    total = counts.sum(axis=0)
    ious = _ious(total)
    named = names or [str(number) for number in range(counts.shape[2])]
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), _RESAMPLES)  # [R, N]
    sums = (drawn.astype(np.float64) @ counts.reshape(len(counts), -1)).reshape(_RESAMPLES, *counts.shape[1:])
    return Overlap(
        miou=float(np.nanmean(ious)),
        interval=bounds(np.array([np.nanmean(_ious(one)) for one in sums])),
        pixel_accuracy=float(total[0].sum() / total[2].sum()),
        per_class={name: float(iou) for name, iou in zip(named, ious, strict=True) if not np.isnan(iou)},
        images=len(counts),
    )


def _ious(counts: np.ndarray) -> np.ndarray:
    """Return each class's intersection over union from its counts [3, C]; NaN where it occurs nowhere."""
    both, predicted, masked = counts
    union = predicted + masked - both
    return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)
