"""The color operations of one view, packed for compiled code."""

from typing import NamedTuple

import numpy as np
import torch

RADIUS = 6
"""Radius of the blur's kernel, pixels: three times the largest standard deviation, 2.0."""


class PackedColor(NamedTuple):
    """The color operations of one view, its normalization and type, as `cpu_kernels` takes them."""

    rows: np.ndarray
    """float32 [B, 20], as `color.pack` returns."""
    kernels: np.ndarray
    """float32 [B, RADIUS + 1], as `color.blur_kernels` returns."""
    gray_first: bool
    levels: np.ndarray
    """The results for levels 0..255 of each channel, without and with solarization: bits of `dtype`, [2, 3, 256]."""
    dtype: torch.dtype


def bits(x: torch.Tensor) -> np.ndarray:
    """Return the memory of x as integers of the size of its type; NumPy has no bfloat16."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]).numpy()
