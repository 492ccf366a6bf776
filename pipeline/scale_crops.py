"""Crops of images and their masks for training a segmentation: scaled, cropped or padded, flipped, normalised.

Scale, place and flip of a sample are a pure function of (seed, epoch, id), and so is the order: global batches are the
same on any number of processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.augment import IMAGENET, normalise
from pipeline.cores import available_cores
from pipeline.draws import between
from pipeline.errors import InputError, LoaderStalled
from pipeline.hashing import mix, uniforms
from pipeline.masks import IGNORED, Masked, Pair
from pipeline.order import epoch_order, rank_slice, steps_per_epoch
from pipeline.transfer import to_device
from pipeline.workers import Workers

SCALES = (0.5, 2.0)
"""Of 1911.05722, appendix A.5; drawn uniformly, which it leaves open."""
_SCALED = 0x7363616C6564  # keeps these random numbers apart from those of other modules
_FILL = tuple(round(255 * mean) for mean in IMAGENET.mean)  # nearly 0 once normalised
_STALLED = 60.0  # seconds
_order_of = lru_cache(maxsize=4)(epoch_order)


class Draw(NamedTuple):
    """Where a crop lies in its scaled image."""

    height: int
    """Of the scaled image, pixels, as is `width`."""
    width: int
    top: int
    """First row of the scaled image in the crop; below 0 where the crop is larger, and padded above it. `left` too."""
    left: int
    flip: bool


@dataclass(frozen=True)
class Crops:
    """A process's share of a global batch."""

    images: torch.Tensor
    """[B, 3, S, S], normalised, channels-last, on the device."""
    masks: torch.Tensor
    """int64 [B, S, S], class numbers; 255 where there is none."""
    ids: np.ndarray
    """int64 [B]."""


def draw_crops(shapes: np.ndarray, size: int, *, seed: int, epoch: int, ids: np.ndarray) -> list[Draw]:
    """Draw the crops, of `size` pixels a side, of samples `ids` (int64 [n]), images of `shapes` (int64 [n, 2])."""
    key = mix(mix(mix(np.uint64(_SCALED) ^ np.uint64(seed)) ^ np.uint64(epoch)) ^ ids.astype(np.uint64))
    u = uniforms(key, 4)  # [n, 4]
    scaled = np.maximum(np.rint(shapes * between(u[:, :1], *SCALES)), 1).astype(np.int64)
    free = scaled - size
    first = np.sign(free) * np.floor(u[:, 1:3] * (np.abs(free) + 1)).astype(np.int64)
    flips = u[:, 3] < 0.5
    rows = zip(scaled.tolist(), first.tolist(), flips.tolist(), strict=True)
    return [Draw(height, width, top, left, flip) for (height, width), (top, left), flip in rows]


def crop(pair: Pair, draw: Draw, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop of an image, uint8 [S, S, 3], antialiased bilinear, and of its mask, uint8 [S, S], nearest.

    Only what is in the crop is scaled. Where the image does not reach, it is of ImageNet's mean colour, the mask 255.
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
    """Return the rows or columns of an image, int64, that those of the scaled image have their centres in."""
    return (2 * np.asarray(span) + 1) * length // (2 * scaled)


class ScaleCrops:
    """Crops of every sample of `data` once an epoch; what is over from whole global batches is left out of it.

    batch: of all `world` processes. workers: threads, each of which decodes, scales and crops; 0 for one a core.
    Raises InputError where there are fewer images than a batch.
    """

    def __init__(
        self,
        data: Masked,
        *,
        size: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        ahead: int = 3,
    ) -> None:
        if not 0 < batch <= len(data):
            raise InputError(f"{data.path}: a batch of {batch} from {len(data)} images: choose 1 to {len(data)}")
        self.data, self.size, self.batch, self.seed = data, size, batch, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps = steps_per_epoch(len(data), batch)
        self._ahead = ahead * batch // world
        self._workers = Workers(workers or available_cores(), lambda: None)

    def batches(self, first: int, last: int) -> Iterator[Crops]:
        """Yield the batches of steps `first` to `last`, the last left out, counted over all epochs."""
        local = self.batch // self.world
        found = self._workers.in_order(self._crop, self._samples(first, last), self._ahead, _STALLED)
        for step in range(first, last):
            try:
                crops = list(islice(found, local))
            except futures.TimeoutError:
                raise LoaderStalled(
                    f"{self.data.path}: no image for {_STALLED:g} s (step {step}): check the disk or network it is on"
                ) from None
            pixels, masks = (np.stack(parts) for parts in zip(*crops, strict=True))
            images = normalise(to_device(pixels, self.device))
            yield Crops(images, to_device(masks, self.device).long(), self._ids(step))

    def _ids(self, step: int) -> np.ndarray:
        """Return the samples of this process at a step, int64 [B]."""
        epoch, step = divmod(step, self.steps)
        return rank_slice(_order_of(self.seed, epoch, len(self.data)), step, self.batch, self.rank, self.world)

    def _samples(self, first: int, last: int) -> Iterator[tuple[int, Draw]]:
        """Yield each sample of those steps and its draw."""
        for step in range(first, last):
            ids = self._ids(step)
            shapes, epoch = self.data.shapes[ids], step // self.steps
            draws = draw_crops(shapes, self.size, seed=self.seed, epoch=epoch, ids=ids)
            yield from zip(ids.tolist(), draws, strict=True)

    def _crop(self, _: None, sample: tuple[int, Draw]) -> tuple[np.ndarray, np.ndarray]:
        index, draw = sample
        return crop(self.data.read(index), draw, self.size)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()
