"""Crops of decoded images from one buffer: antialiased bilinear, equal to PIL's to 1/255.

On a GPU, one Triton kernel for each view reads the pixels in place; on the CPU, compiled code does, and augments them.
"""

from typing import NamedTuple

import numpy as np
import torch

from pipeline.augment.cpu_kernels import augment_crops
from pipeline.augment.plan import Plan
from pipeline.augment.resize import crop_resize, scratch
from pipeline.system.device import to_device


class Ragged(NamedTuple):
    """Images of different sizes in one buffer."""

    pixels: torch.Tensor
    """uint8, flat: RGB, each image row by row."""
    starts: np.ndarray
    """int64 [B]: first byte of each image."""
    widths: np.ndarray
    """int64 [B], pixels."""


def crop_views(images: Ragged, plan: Plan) -> tuple[torch.Tensor, ...]:
    """Return the crops or views of `plan`, whose samples are these images, as `Backend.receive` does."""
    views = list(zip(plan.boxes, plan.flips, plan.sizes, strict=True))
    if images.pixels.device.type == "cpu":
        crops = [_compiled(images, *view) for view in views]
        return (
            tuple(map(torch.from_numpy, crops))
            if plan.colors is None
            else tuple(map(augment_crops, crops, plan.colors))
        )
    from pipeline.augment.triton_kernels import crop_view

    device = images.pixels.device
    starts, widths = to_device(images.starts, device), to_device(images.widths, device)
    return tuple(
        crop_view(images.pixels, starts, widths, to_device(boxes, device), to_device(flips, device), size)
        for boxes, flips, size in views
    )


def _compiled(images: Ragged, boxes: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    pixels, out = images.pixels.numpy(), np.empty((len(boxes), size, size, 3), np.uint8)
    buffers = scratch((size,), int(max(boxes[:, 2:].max(), images.widths.max())))
    for i, (start, width) in enumerate(zip(images.starts, images.widths, strict=True)):
        crop_resize(pixels[start:], width, boxes[i], flips[i], out[i], buffers)
    return out
