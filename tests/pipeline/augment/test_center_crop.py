"""The crop of single images is that of evaluations, and Pillow's."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment.center_crop import CenterCrop
from pipeline.augment.color import IMAGENET
from pipeline.beton import Beton
from pipeline.loader import CenterLoader
from pipeline.prepare import Settings, prepare


@pytest.mark.parametrize(("size", "ratio"), [(32, 0.875), (48, 1.0)])
def test_single_images_are_cropped_as_evaluations_do(size: int, ratio: float, tmp_path: Path) -> None:
    """Of odd sides, wide and high, written as pixels: both read the same ones."""
    random, images = np.random.default_rng(0), []
    for number, shape in enumerate([(61, 90, 3), (90, 61, 3), (50, 50, 3)]):
        coarse = Image.fromarray(random.integers(0, 255, (7, 7, 3), np.uint8))
        images.append(np.asarray(coarse.resize(shape[1::-1], Image.Resampling.BICUBIC)))
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[-1]).save(tmp_path / "images" / "a" / f"{number}.png")
    prepare(str(tmp_path / "images"), tmp_path / "x.beton", Settings(mode="raw"), workers=1, quiet=True)
    with closing(CenterLoader(Beton(tmp_path / "x.beton"), size=size, batch=3, crop_ratio=ratio, workers=1)) as loader:
        (expected, _), *_ = loader
    crop = CenterCrop(size, ratio)
    rows = torch.stack([crop(image) for image in images])
    level = 1.01 / 255 / min(IMAGENET.std)
    assert rows.dtype == torch.float32
    assert (rows - expected).abs().max() < level


def test_gray_images_get_three_channels() -> None:
    gray = Image.new("L", (40, 30), 128)
    rows = CenterCrop(16)(gray)
    expected = (128 / 255 - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    assert torch.allclose(rows, expected.view(3, 1, 1).expand(3, 16, 16))
