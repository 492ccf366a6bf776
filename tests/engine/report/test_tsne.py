"""Maps of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.report import tsne
from engine.report.sample import draw_sample
from pipeline.beton import Beton


@pytest.mark.usefixtures("rendered")
def test_maps_show_frequent_classes_and_preserve_neighbors(drawn: Path) -> None:
    beton = Beton(drawn)
    beton.labels[:] = np.minimum(np.arange(200) % 40, 20)  # the last of 21 has half of all
    sample = draw_sample(beton, 1000, 1.0, 0)
    assert tsne.frequent_labels(sample) == [20, *range(14)]
    assert len(tsne.choose_points(sample)) == 100 + 14 * 5
    centers = 10 * torch.eye(4)[torch.arange(80) % 4]
    points = tsne.project(
        F.normalize(centers + torch.randn(80, 4, generator=torch.Generator().manual_seed(0)), dim=1), 0
    )
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(80)
    assert (distances.argmin(axis=1) % 4 == np.arange(80) % 4).all()
