"""Intersection over union of each class, its mean with a bootstrap interval, and pixel accuracy."""

from dataclasses import dataclass

import numpy as np
import torch

from engine.evaluate.accuracy import Interval, Scores, percent, percentile_interval
from pipeline.dense.masks import IGNORED

_RESAMPLES = 1000


@dataclass
class SegmentationScores(Scores):
    """Scores of a segmentation."""

    MAIN = "miou"
    miou: float
    interval: Interval
    """95 % interval of the mean, by bootstrap over the test images."""
    pixel_accuracy: float
    per_class: dict[str, float]
    """IoU of each class that occurs in masks or predictions, by its name or number."""
    images: int

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2%} ({percent(self.interval)}), pixel accuracy {self.pixel_accuracy:.2%}"


def count_pixels(predicted: torch.Tensor, masks: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the pixels of each image and class in both, in the prediction, and in the mask: int64 [B, 3, C].

    predicted, masks: int64 [B, H, W]; pixels of mask 255 do not count.
    """
    batch, known = len(masks), masks != IGNORED
    image = torch.arange(batch, device=masks.device).view(-1, 1, 1).expand_as(masks)
    cell = ((image * classes + masks) * classes + predicted)[known]
    confusion = torch.bincount(cell, minlength=batch * classes**2).view(batch, classes, classes)  # mask, prediction
    return torch.stack([confusion.diagonal(dim1=1, dim2=2), confusion.sum(dim=1), confusion.sum(dim=2)], dim=1)


def score(counts: np.ndarray, names: list[str], seed: int) -> SegmentationScores:
    """Return the scores of all images together, from the counts of each, int64 [N, 3, C].

    names: of the classes, by number. The mean is over classes that occur. seed: of the bootstrap.
    """
    total = counts.sum(axis=0)
    ious = _ious(total)
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), _RESAMPLES)  # [R, N]
    sums = (weights.astype(np.float64) @ counts.reshape(len(counts), -1)).reshape(_RESAMPLES, *counts.shape[1:])
    return SegmentationScores(
        miou=float(np.nanmean(ious)),
        interval=percentile_interval(np.array([np.nanmean(_ious(resampled)) for resampled in sums])),
        pixel_accuracy=float(total[0].sum() / total[2].sum()),
        per_class={name: float(iou) for name, iou in zip(names, ious, strict=True) if not np.isnan(iou)},
        images=len(counts),
    )


def _ious(counts: np.ndarray) -> np.ndarray:
    """Return each class's intersection over union from its counts [3, C]; NaN for a class that does not occur."""
    both, predicted, masked = counts
    union = predicted + masked - both
    return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)
