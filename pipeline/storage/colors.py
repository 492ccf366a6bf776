"""Mean and standard deviation of the colors of a data set."""

import math

import numpy as np

from pipeline.beton import Beton
from pipeline.sampling.order import evenly
from pipeline.storage.decode import decode

_IMAGES, _PIXELS = 1000, 1 << 16  # images at most, and about as many pixels of each
_MIN_STD = 1e-4  # of images of one color


def measure_colors(beton: Beton) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of red, green and blue, for values of 0 to 1, over a sample of the images.

    Each image counts the same, whatever its size: views all have one size.
    """
    levels = np.arange(256) / 255
    moments = np.zeros((3, 2))
    sample = evenly(len(beton), _IMAGES)
    for index in sample:
        pixels = decode(beton, int(index))
        step = max(math.isqrt(pixels.size // (3 * _PIXELS)), 1)
        channels = pixels[::step, ::step].reshape(-1, 3).T
        counts = np.stack([np.bincount(channel, minlength=256) for channel in channels])  # [3, 256]
        moments += counts @ np.stack([levels, levels**2], axis=1) / (channels.shape[1] * len(sample))
    mean, squares = moments.T
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return [round(float(value), 4) for value in mean], [round(max(float(value), _MIN_STD), 4) for value in std]
