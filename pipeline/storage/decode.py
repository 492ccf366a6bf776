"""Records of a beton in compiled code: checked against their CRC32, decoded to RGB, faults named."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.beton import Beton
from pipeline.native.libffcv import JPEG, crc32, decode_jpeg
from pipeline.native.libjpeg import decode_rectangle_symbol
from pipeline.native.numba_cache import compiled
from pipeline.system.errors import DamagedRecord
from pipeline.system.limits import MOST_SCANNED, MOST_SCANS

WHOLE, _CHANGED, UNDECODABLE = range(3)
_FAULTS = {
    _CHANGED: "its bytes are not those that were written (CRC32 differs)",
    UNDECODABLE: "its JPEG does not decode, or not to the stored height and width",
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


@compiled(nogil=True, boundscheck=False)
def jpeg_frame(data: Any) -> tuple[Any, Any, Any]:
    """Return height, width and number of components from a JPEG's frame header, zeros where it has none."""
    at = np.int64(2)
    while at + 9 < data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = (np.int64(data[at + 5]) << 8) | np.int64(data[at + 6])
            return height, (np.int64(data[at + 7]) << 8) | np.int64(data[at + 8]), np.int64(data[at + 9])
        if marker == 0xFF:  # fill byte
            at += 1
        else:
            at += 2 + ((np.int64(data[at + 2]) << 8) | np.int64(data[at + 3]))
    return 0, 0, 0


@compiled(nogil=True, boundscheck=False)
def jpeg_scans(data: Any) -> int:
    """Return the number of scans of a JPEG, or more: those of a thumbnail are counted too."""
    count = 0
    for at in range(data.size - 1):
        count += data[at] == 0xFF and data[at + 1] == 0xDA
    return count


def _decode_whole(data: Any, height: Any, width: Any, box: Any, pixels: Any) -> bool:
    """Decode a JPEG to `pixels`, and return whether that went well; `box` is the whole image."""
    scans = jpeg_scans(data)
    if jpeg_frame(data)[:2] != (height, width) or scans > MOST_SCANS or scans * height * width > MOST_SCANNED:
        return False
    return bool(decode_jpeg(data, pixels, height, width) == 0)


def _decode_box(data: Any, height: Any, width: Any, box: Any, pixels: Any) -> bool:
    """Decode the rectangle `box` of a JPEG to `pixels`, and return whether that went well."""
    source, to = data.ctypes.data, pixels.ctypes.data
    return bool(decode_rectangle_symbol(source, data.size, height, width, box[0], box[1], box[2], box[3], to) == 0)


_BLOCK = 16  # columns, where colors have half the resolution; else 8
_NARROWEST = 8
_IN_PART = decode_rectangle_symbol is not None
JIT: dict[str, Any] = {"variant": "in part" if _IN_PART else "whole", "nogil": True, "boundscheck": False}
"""How functions are compiled that decode."""
_decode = compiled(**JIT)(_decode_box if _IN_PART else _decode_whole)


@compiled(**JIT)
def decode_record(records: Any, sample: int, box: Any, pixels: Any) -> tuple[int, Any, Any, Any, Any]:
    """Return whether the sample is whole, and pixels of it that hold `box`: their place, top, left and width.

    box: as of `rectangles`. A JPEG is decoded to `pixels`: uint8, flat, RGB, the box and no more. A raw record is
    returned where it stands, all of it.
    """
    start, size = np.int64(records.pointers[sample]), np.int64(records.sizes[sample])
    data = records.data[start : start + size]
    height, width = np.int64(records.heights[sample]), np.int64(records.widths[sample])
    if (
        records.crc32.size > 0
        and np.uint32(crc32(np.uint64(0), data.ctypes.data, np.uint32(size))) != records.crc32[sample]
    ):
        return _CHANGED, pixels, 0, 0, width
    if records.modes[sample] != JPEG:
        return WHOLE, data, 0, 0, width
    well = _decode(data, height, width, box, pixels)
    return (WHOLE if well else UNDECODABLE), pixels, np.int64(box[0]), np.int64(box[1]), np.int64(box[3])


@compiled(**JIT)
def decode_chunk(
    records: Any, ids: Any, boxes: Any, starts: Any, start: int, stop: int, pixels: Any
) -> tuple[int, int]:
    """Decode rectangles `boxes` of samples start..stop of `ids` to their places in `pixels`, from starts[i] on.

    Returns the first fault and its place in `ids`, or (WHOLE, 0).
    """
    for i in range(start, stop):
        box, to = boxes[i], pixels[starts[i] : starts[i + 1]]
        fault, image, _, _, width = decode_record(records, ids[i], box, to)
        if fault != WHOLE:
            return fault, i
        if image.ctypes.data != to.ctypes.data:  # a raw record: not decoded, but read where it is
            n = 3 * np.int64(box[3])
            for row in range(box[2]):
                at = 3 * ((box[0] + row) * width + box[1])
                for byte in range(n):  # as slices it would take seconds more to compile
                    to[row * n + byte] = image[at + byte]
    return WHOLE, 0


def rectangles(records: Records, ids: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the part of each sample to decode, which holds all its boxes: int32 [B, 4], top, left, height, width.

    boxes: int32 [V, B, 4]. As `decode_rectangle` needs it, there is a column more on either side, at least `_NARROWEST`
    in all, and the first is a multiple of `_BLOCK`. The whole image, where no CRC32 says that what lies outside the
    part is in order.
    """
    first, last = boxes[:, :, :2].min(0), (boxes[:, :, :2] + boxes[:, :, 2:]).max(0)
    widths = records.widths[ids].astype(np.int32)
    first[:, 1] = np.maximum(np.minimum(first[:, 1] - 1, widths - _NARROWEST), 0) // _BLOCK * _BLOCK
    last[:, 1] = np.minimum(np.maximum(last[:, 1] + 1, first[:, 1] + _NARROWEST), widths)
    found = np.concatenate([first, last - first], 1)
    if not (_IN_PART and records.crc32.size > 0):
        jpegs = records.modes[ids] == JPEG
        found[jpegs] = whole(records, ids)[jpegs]
    return found


def whole(records: Records, ids: np.ndarray) -> np.ndarray:
    """Return the rectangle that is all of each sample: int32 [B, 4]."""
    zero = np.zeros(len(ids), np.int32)
    return np.stack([zero, zero, records.heights[ids].astype(np.int32), records.widths[ids].astype(np.int32)], 1)


def check_record(beton: Beton, index: int) -> str | None:
    """Return what is wrong with sample `index` of `beton`, or None: its CRC32, its JPEG header, its decoding."""
    return _FAULTS.get(_decoded(beton, index)[0])


def decode(beton: Beton, index: int) -> np.ndarray:
    """Return the pixels of sample `index`: uint8 [H, W, 3]. Raises DamagedRecord."""
    fault, pixels = _decoded(beton, index)
    if fault != WHOLE:
        raise damaged(beton, index, fault)
    return np.array(pixels).reshape(int(beton.heights[index]), int(beton.widths[index]), 3)


def _decoded(beton: Beton, index: int) -> tuple[int, np.ndarray]:
    record, pixels = _one(beton, index), np.empty(3 * int(beton.heights[index]) * int(beton.widths[index]), np.uint8)
    return decode_record(record, 0, whole(record, np.zeros(1, np.int64))[0], pixels)[:2]


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
