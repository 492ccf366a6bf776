"""Selection of the backend, with the reason."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pipeline.backends import resident
from pipeline.beton import Beton
from pipeline.beton_format import JPEG
from pipeline.storage.decode import DECODER
from pipeline.system.chunks import chunks
from pipeline.system.errors import InputError
from pipeline.system.packages import installed
from pipeline.system.text import binary

PACE = 5000
"""Samples a second that a GPU may train on: an H200 trains a ResNet-50 on somewhat fewer, at 224 pixels."""
_JPEG_BYTE, _JPEG_PIXEL, _RAW_PIXEL = 9e-9, 1.7e-9, 2.7e-9  # seconds of one core at 2.6 GHz, copies included
_PILLOW_FACTOR = 1.8  # Pillow's time for a JPEG, as a multiple of libjpeg's in jpeg.c
_PILLOW_CORES = 3  # more decode no faster: Pillow holds the GIL for about a third of its time
_BY_DEMAND = ("ffcv", "ffcv_gpu", "dali", "resident")  # the least demanding of the machine first


class Choice(NamedTuple):
    """Name of a backend of `BACKENDS`, and the reason for it in one line."""

    name: str
    why: str


def decoding_rate(beton: Beton, cores: int, decoder: str = DECODER) -> float:
    """Return an estimate of the samples that `cores` cores decode in a second, from the sizes of the records.

    decoder: of JPEGs, as `pipeline.storage.decode.DECODER`.
    """
    factor, seconds, jpeg_count = _PILLOW_FACTOR if decoder == "pillow" else 1.0, 0.0, 0
    for rows, pixels in zip(chunks(len(beton)), beton.pixels(), strict=True):
        jpegs = beton.modes[rows] == JPEG
        jpeg_seconds = factor * (_JPEG_BYTE * beton.sizes[rows] + _JPEG_PIXEL * pixels)
        seconds += float(np.where(jpegs, jpeg_seconds, _RAW_PIXEL * pixels).sum())
        jpeg_count += int(jpegs.sum())
    if decoder == "pillow" and jpeg_count:
        cores = min(cores, _PILLOW_CORES)
    return cores * len(beton) / seconds


def choose(backend: str, beton: Beton, device: torch.device, *, local_world: int = 1, cores: int = 1) -> Choice:
    """Return the backend for this data on this device: the requested one, or, for `auto`, the fastest.

    local_world: ranks that share the machine's memory. cores: those of this rank.
    Raises InputError for crops on a GPU if there is none.
    """
    if backend == "ffcv_gpu" and device.type != "cuda":
        raise InputError("data.backend 'ffcv_gpu': this machine has no GPU that torch can use: choose auto or ffcv")
    if backend != "auto":
        return Choice(backend, "requested")
    if not beton.in_one_file:
        return Choice("dali", "the images are not in one file, and only dali reads those")
    size = f"the decoded images take {binary(resident.needed(beton))}"
    share = resident.SHARE if device.type == "cuda" else resident.SHARE / local_world
    room = f"{share:.0%} of the {binary(resident.free(device))} free on {device.type}"
    if resident.needed(beton) <= share * resident.free(device):
        return Choice("resident", f"{size}, at most {room}")
    why = f"{size}, more than {room}"
    if device.type != "cuda":
        return Choice("ffcv", why)
    rate = decoding_rate(beton, cores)
    why += f"; {cores} cores decode about {rate:.0f} images/s{' with Pillow' if DECODER == 'pillow' else ''}"
    if rate < PACE and (beton.modes == JPEG).any() and installed("nvidia.dali"):
        return Choice("dali", f"{why}, less than the {PACE} a GPU may train on")
    return Choice("ffcv_gpu", why)


def least_demanding(choices: Sequence[Choice]) -> Choice:
    """Return the least demanding of the ranks' choices, with the reason of the first rank that made it.

    All ranks use it, because pixels differ slightly between backends.
    """
    return min(choices, key=lambda choice: _BY_DEMAND.index(choice.name))
