"""Crops of images and their masks for training a segmentation: scaled, cropped or padded, flipped, normalized.

Scale, place and flip of a sample are a pure function of (seed, epoch, id), and so is the order: global batches are the
same on any number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.augment.color import IMAGENET, normalize
from pipeline.dense.masks import IGNORED, Masked, Pair
from pipeline.dense.sample_loader import Samples
from pipeline.system.counter_rng import keyed, uniforms
from pipeline.system.device import to_device

SCALES = (0.5, 2.0)
"""Of 1911.05722, appendix A.5; drawn uniformly, which it leaves open."""
_SCALED = 0x7363616C6564  # keeps these random numbers apart from those of other modules
_FILL = tuple(round(255 * mean) for mean in IMAGENET.mean)  # nearly 0 once normalized


class Draw(NamedTuple):
    """Where a crop lies in its scaled image."""

    height: int
    """Of the scaled image, pixels, as is `width`."""
    width: int
    top: int
    """First row of the scaled image in the crop; below 0 where the crop is larger, and padded above it. `left` too."""
    left: int
    flip: bool


def draw_crop(shape: tuple[int, int], size: int, *, seed: int, epoch: int, index: int) -> Draw:
    """Draw the crop, of `size` pixels a side, of sample `index`, an image of `shape` (height, width)."""
    scale, *places, flip = uniforms(keyed(_SCALED ^ seed, epoch, index), 4).tolist()
    scaled = [max(round(side * (SCALES[0] + scale * (SCALES[1] - SCALES[0]))), 1) for side in shape]
    first = [_within(length - size, u) for length, u in zip(scaled, places, strict=True)]
    return Draw(scaled[0], scaled[1], first[0], first[1], flip < 0.5)


def _within(free: int, u: float) -> int:
    """Return a whole number from 0 to `free`, which may be below 0, evenly, from u of U[0, 1)."""
    return int(u * (free + 1)) if free >= 0 else -int(u * (1 - free))


def crop(pair: Pair, draw: Draw, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop of an image, uint8 [S, S, 3], antialiased bilinear, and of its mask, uint8 [S, S], nearest.

    Only what is in the crop is scaled. Where the image does not reach, it is of ImageNet's mean color, the mask 255.
    """
    image, mask = pair
    rows, columns = _span(draw.top, draw.height, size), _span(draw.left, draw.width, size)
    left, right = (edge * image.width / draw.width for edge in (columns.start, columns.stop))
    top, bottom = (edge * image.height / draw.height for edge in (rows.start, rows.stop))
    part = image.resize((len(columns), len(rows)), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    pixels, classes = np.full((size, size, 3), _FILL, np.uint8), np.full((size, size), IGNORED, np.uint8)
    at = np.s_[rows.start - draw.top : rows.stop - draw.top, columns.start - draw.left : columns.stop - draw.left]
    pixels[at] = np.asarray(part)
    classes[at] = mask[np.ix_(_nearest(rows, image.height, draw.height), _nearest(columns, image.width, draw.width))]
    return (pixels[:, ::-1], classes[:, ::-1]) if draw.flip else (pixels, classes)


def _span(first: int, length: int, size: int) -> range:
    """Return the rows or columns of a scaled image that are in a crop from `first` on."""
    return range(max(first, 0), min(first + size, length))


def _nearest(span: range, length: int, scaled: int) -> np.ndarray:
    """Return the rows or columns of an image, int64, that those of the scaled image have their centers in."""
    return (2 * np.asarray(span) + 1) * length // (2 * scaled)


class ScaleCrops(Samples[tuple[np.ndarray, np.ndarray]]):
    """Crops of images and masks, `size` pixels a side, as `Samples` has them: its other options are `more`."""

    def __init__(self, data: Masked, *, size: int, seed: int = 0, **more: Any) -> None:
        def read(epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
            height, width = data.shapes[index].tolist()
            return crop(data.read(index), draw_crop((height, width), size, seed=seed, epoch=epoch, index=index), size)

        super().__init__(data.path, len(data), read, seed=seed, **more)

    def crops(self, first: int, last: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images [B, 3, S, S], normalized and channels-last, and masks int64 [B, S, S], 255 where there is none.

        Of the steps from `first` to before `last`, counted over all epochs; on the device.
        """
        for samples in self.batches(first, last):
            images, masks = (to_device(np.stack(parts), device) for parts in zip(*samples, strict=True))
            yield normalize(images), masks.long()
