"""Records of a beton in compiled code: checked against their CRC32, decoded to RGB, faults named."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from pipeline.beton import Beton
from pipeline.errors import DamagedRecord
from pipeline.libffcv import JPEG, crc32, decode_jpeg

WHOLE, _CHANGED, _UNDECODABLE = range(3)
_FAULTS = {
    _CHANGED: "its bytes are not those that were written (CRC32 differs)",
    _UNDECODABLE: "its JPEG does not decode to the stored height and width",
}


class Records(NamedTuple):
    """A beton's records as compiled code takes them."""

    data: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    modes: np.ndarray
    crc32: np.ndarray
    """uint32 [n], or [0] where there is no manifest."""


@numba.njit(nogil=True, boundscheck=False)
def jpeg_side_lengths(data: Any) -> tuple[Any, Any]:
    """Return height and width from a JPEG's frame header, (0, 0) where it has none."""
    at = np.int64(2)
    while at + 9 < data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = (np.int64(data[at + 5]) << 8) | np.int64(data[at + 6])
            return height, (np.int64(data[at + 7]) << 8) | np.int64(data[at + 8])
        if marker == 0xFF:  # fill byte
            at += 1
        else:
            at += 2 + ((np.int64(data[at + 2]) << 8) | np.int64(data[at + 3]))
    return 0, 0


@numba.njit(nogil=True, boundscheck=False)
def decode_record(records: Any, sample: int, pixels: Any) -> tuple[int, Any]:
    """Return whether the sample is whole, and its pixels: uint8, flat, RGB."""
    start, size = np.int64(records.pointers[sample]), np.int64(records.sizes[sample])
    data = records.data[start : start + size]
    if (
        records.crc32.size > 0
        and np.uint32(crc32(np.uint64(0), data.ctypes.data, np.uint32(size))) != records.crc32[sample]
    ):
        return _CHANGED, pixels
    if records.modes[sample] != JPEG:
        return WHOLE, data
    height, width = records.heights[sample], records.widths[sample]
    if jpeg_side_lengths(data) != (height, width):
        return _UNDECODABLE, pixels
    status = decode_jpeg(
        data,
        pixels,
        np.uint32(height),
        np.uint32(width),
        np.uint32(height),
        np.uint32(width),
        0,
        0,
        1,
        1,
        False,
        False,
    )
    return (WHOLE if status == 0 else _UNDECODABLE), pixels


@numba.njit(nogil=True, boundscheck=False)
def decode_chunk(records: Any, ids: Any, starts: Any, start: int, stop: int, pixels: Any) -> tuple[int, int]:
    """Decode samples start..stop of `ids` to their places in `pixels`, sample i from starts[i] on.

    Returns the first fault and its place in `ids`, or (WHOLE, 0).
    """
    for i in range(start, stop):
        to = pixels[starts[i] : starts[i + 1]]
        fault, image = decode_record(records, ids[i], to)
        if fault != WHOLE:
            return fault, i
        if image.ctypes.data != to.ctypes.data:  # a raw record: not decoded, but read where it is
            to[:] = image
    return WHOLE, 0


def check_record(beton: Beton, index: int) -> str | None:
    """Return what is wrong with sample `index` of `beton`, or None: its CRC32, its JPEG header, its decoding."""
    height, width = int(beton.heights[index]), int(beton.widths[index])
    fault, _ = decode_record(_one(beton, index), 0, np.empty(3 * height * width, np.uint8))
    return _FAULTS.get(fault)


def decode(beton: Beton, index: int) -> np.ndarray:
    """Return the pixels of sample `index`: uint8 [H, W, 3]. Raises DamagedRecord."""
    height, width = int(beton.heights[index]), int(beton.widths[index])
    fault, pixels = decode_record(_one(beton, index), 0, np.empty(3 * height * width, np.uint8))
    if fault != WHOLE:
        raise damaged(beton, index, fault)
    return np.array(pixels).reshape(height, width, 3)


def _one(beton: Beton, index: int) -> Records:
    """Return sample `index` alone, wherever it stands."""
    data, one = beton.record(index), slice(index, index + 1)
    crcs = beton.crc32[one] if beton.crc32 is not None else np.zeros(0, np.uint32)
    sides = beton.heights[one], beton.widths[one]
    return Records(
        np.asarray(data), np.zeros(1, np.uint64), np.full(1, len(data), np.uint64), *sides, beton.modes[one], crcs
    )


def records_of(beton: Beton) -> Records:
    """Return the records of `beton` for compiled code."""
    crcs = beton.crc32 if beton.crc32 is not None else np.zeros(0, np.uint32)
    return Records(beton.data, beton.pointers, beton.sizes, beton.heights, beton.widths, beton.modes, crcs)


def damaged(beton: Beton, sample: int, fault: int | str, others: tuple[int, ...] = ()) -> DamagedRecord:
    """Return the error that names the sample and says what is wrong with it; it knows of `others` too."""
    reason = _FAULTS[fault] if isinstance(fault, int) else fault
    return DamagedRecord(
        f"{beton.path}: sample {sample} ({beton.name(sample)}) is damaged: {reason}: list all such samples with "
        f"python -m pipeline.inspect {beton.path} --verify, and write the file again, or pass over them with "
        "--data.on_bad skip",
        (sample, *others),
    )
