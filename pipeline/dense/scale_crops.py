"""Crops of images and masks for training a segmentation: scaled, cropped or padded, flipped, normalized.

Scale, position and flip of a sample are a pure function of (seed, epoch, id), and so is the order: global batches are
the same with any number of ranks, and after a resume.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.augment.color import IMAGENET, Statistics, normalize
from pipeline.dense.masks import IGNORED, Masked, Pair
from pipeline.dense.sample_loader import Samples
from pipeline.system.counter_rng import keyed, uniforms
from pipeline.system.device import to_device

SCALES = (0.5, 2.0)
"""Range of scales, from 1911.05722, appendix A.5. Drawn uniformly, which the paper does not specify."""
_SCALED = 0x7363616C6564  # separates these random numbers from those of other modules


class Draw(NamedTuple):
    """A crop's position in its scaled image."""

    height: int
    """Height of the scaled image, pixels; `width`: the same."""
    width: int
    top: int
    """Row of the scaled image at the crop's top. Below 0 the crop is padded there. `left`: the same for columns."""
    left: int
    flip: bool


def draw_crop(shape: tuple[int, int], size: int, *, seed: int, epoch: int, index: int) -> Draw:
    """Draw the crop, `size` pixels a side, of sample `index`, an image of `shape` (height, width)."""
    scale, *places, flip = uniforms(keyed(_SCALED ^ seed, epoch, index), 4).tolist()
    scaled = [max(round(side * (SCALES[0] + scale * (SCALES[1] - SCALES[0]))), 1) for side in shape]
    first = [_within(length - size, u) for length, u in zip(scaled, places, strict=True)]
    return Draw(scaled[0], scaled[1], first[0], first[1], flip < 0.5)


def _within(free: int, u: float) -> int:
    """Map u of U[0, 1) evenly to an integer from 0 to `free`, or from `free` to 0 where it is negative."""
    return int(u * (free + 1)) if free >= 0 else -int(u * (1 - free))


def crop(pair: Pair, draw: Draw, size: int, statistics: Statistics = IMAGENET) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop of an image, uint8 [S, S, 3], antialiased bilinear, and of its mask, uint8 [S, S], nearest.

    Only the cropped part is scaled. Padding has the mean color, nearly 0 once normalized, and 255 in the mask.
    """
    image, mask = pair
    rows, columns = _span(draw.top, draw.height, size), _span(draw.left, draw.width, size)
    left, right = (edge * image.width / draw.width for edge in (columns.start, columns.stop))
    top, bottom = (edge * image.height / draw.height for edge in (rows.start, rows.stop))
    part = image.resize((len(columns), len(rows)), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    fill = [round(255 * mean) for mean in statistics.mean]
    pixels, classes = np.full((size, size, 3), fill, np.uint8), np.full((size, size), IGNORED, np.uint8)
    at = np.s_[rows.start - draw.top : rows.stop - draw.top, columns.start - draw.left : columns.stop - draw.left]
    pixels[at] = np.asarray(part)
    classes[at] = mask[np.ix_(_nearest(rows, image.height, draw.height), _nearest(columns, image.width, draw.width))]
    return (pixels[:, ::-1], classes[:, ::-1]) if draw.flip else (pixels, classes)


def _span(first: int, length: int, size: int) -> range:
    """Return the rows or columns of a scaled image in a crop that starts at `first`."""
    return range(max(first, 0), min(first + size, length))


def _nearest(span: range, length: int, scaled: int) -> np.ndarray:
    """Return the rows or columns of an image, int64, that contain the centers of those of the scaled image."""
    return (2 * np.asarray(span) + 1) * length // (2 * scaled)


class ScaleCrops(Samples[tuple[np.ndarray, np.ndarray]]):
    """Crops of images and masks, `size` pixels a side. options: those of `Samples`."""

    def __init__(
        self, data: Masked, *, size: int, seed: int = 0, statistics: Statistics = IMAGENET, **options: Any
    ) -> None:
        self._statistics = statistics

        def read(epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
            height, width = data.shapes[index].tolist()
            draw = draw_crop((height, width), size, seed=seed, epoch=epoch, index=index)
            return crop(data.read(index), draw, size, statistics)

        super().__init__(data.path, len(data), read, seed=seed, **options)

    def crops(self, first: int, last: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield images [B, 3, S, S], normalized and channels-last, and masks int64 [B, S, S], 255 for padding.

        For each step from `first` to before `last`, counted over all epochs; on the device.
        """
        for samples in self.batches(first, last):
            images, masks = (to_device(np.stack(parts), device) for parts in zip(*samples, strict=True))
            yield normalize(images, self._statistics), masks.long()
