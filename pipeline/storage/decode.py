"""Decoding of a beton's records in compiled code, after a check of their CRC32."""

from typing import Any, NamedTuple

import numpy as np

from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.native import libjpeg
from pipeline.native.libz import crc32
from pipeline.native.numba_cache import compiled
from pipeline.system.errors import DamagedRecord, InputError
from pipeline.system.limits import MAX_SCANNED_PIXELS, MAX_SCANS

decode_rectangle_symbol: Any = libjpeg.decode_rectangle_symbol
decode_jpeg: Any = None
DECODER = "partial"
"""Decoder of JPEGs: partial (jpeg.c), full (FFCV's, where jpeg.c was not built), or pillow (with neither of them)."""
if decode_rectangle_symbol is None:  # only then: importing FFCV takes seconds
    from pipeline.native import libffcv

    decode_jpeg, DECODER = libffcv.decode_jpeg, "full"
    if decode_jpeg is None:
        from pipeline.native import pillow

        decode_rectangle_symbol, DECODER = pillow.decode_rectangle_symbol, "pillow"

INTACT, _CHANGED, UNDECODABLE = range(3)  # the state of a record; all but INTACT are faults
_FAULTS = {
    _CHANGED: "its bytes changed since they were written (CRC32 differs)",
    UNDECODABLE: "its JPEG does not decode, or not to the stored height and width",
}


class Records(NamedTuple):
    """Some records of a beton for compiled code: contiguous copies of their rows in its tables, and the file."""

    data: np.ndarray
    """uint8, the file."""
    pointers: np.ndarray
    """uint64 [n]."""
    sizes: np.ndarray
    """uint64 [n], bytes."""
    heights: np.ndarray
    """int32 [n], like widths."""
    widths: np.ndarray
    modes: np.ndarray
    """uint8 [n]."""
    crc32: np.ndarray
    """uint32 [n], or [0] where there is no manifest."""

    def take(self, rows: np.ndarray | slice) -> "Records":
        """Return the records of `rows`, int64 [k] or a slice."""
        crc32 = self.crc32[rows] if self.crc32.size else self.crc32
        return Records(self.data, *(column[rows] for column in self[1:-1]), crc32)  # type: ignore[call-arg]


@compiled(nogil=True, boundscheck=False)
def jpeg_frame(data: Any) -> tuple[Any, Any, Any]:
    """Return height, width and number of components from a JPEG's frame header; zeros without one."""
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
    """Return the number of scans of a JPEG, including those of a thumbnail."""
    count = 0
    for at in range(data.size - 1):
        count += data[at] == 0xFF and data[at + 1] == 0xDA
    return count


def _decode_full(data: Any, height: Any, width: Any, box: Any, pixels: Any) -> bool:
    """Decode a JPEG to `pixels`; return whether it succeeded. `box` is the full image."""
    scans = jpeg_scans(data)
    if jpeg_frame(data)[:2] != (height, width) or scans > MAX_SCANS or scans * height * width > MAX_SCANNED_PIXELS:
        return False
    return bool(decode_jpeg(data, pixels, height, width) == 0)


def _decode_box(data: Any, height: Any, width: Any, box: Any, pixels: Any) -> bool:
    """Decode the rectangle `box` of a JPEG to `pixels`; return whether it succeeded."""
    source, to = data.ctypes.data, pixels.ctypes.data
    return bool(decode_rectangle_symbol(source, data.size, height, width, box[0], box[1], box[2], box[3], to) == 0)


_BLOCK_COLUMNS = 16  # pixels of a block of a JPEG whose colors have half the resolution; else 8
_MIN_COLUMNS = 8  # columns of a rectangle; libjpeg does not interpolate colors of less than 5
_PARTIAL = DECODER != "full"
JIT: dict[str, Any] = {"variant": DECODER, "nogil": True, "boundscheck": False}
"""Options for compiling functions that decode."""
_decode = compiled(**JIT)(_decode_box if _PARTIAL else _decode_full)


@compiled(**JIT)
def decode_record(records: Any, sample: int, box: Any, pixels: Any) -> tuple[int, Any, Any, Any, Any]:
    """Return the sample's state (INTACT or a fault), and pixels that contain `box`, with their top, left and width.

    box: as `rectangles` returns. A JPEG's box is decoded to `pixels`: uint8, flat, RGB. Of a raw record the pixels are
    the record itself, the full image.
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
        return INTACT, data, 0, 0, width
    success = _decode(data, height, width, box, pixels)
    return (INTACT if success else UNDECODABLE), pixels, np.int64(box[0]), np.int64(box[1]), np.int64(box[3])


@compiled(**JIT)
def decode_chunk(records: Any, boxes: Any, starts: Any, start: int, stop: int, pixels: Any) -> tuple[int, int]:
    """Decode rectangles `boxes` of records start..stop to `pixels`, record i from byte starts[i] on.

    Returns the first fault and the number of its record, or (INTACT, 0).
    """
    for i in range(start, stop):
        box, to = boxes[i], pixels[starts[i] : starts[i + 1]]
        fault, image, _, _, width = decode_record(records, i, box, to)
        if fault != INTACT:
            return fault, i
        if image.ctypes.data != to.ctypes.data:  # a raw record, which was not copied
            n = 3 * np.int64(box[3])
            for row in range(box[2]):
                at = 3 * ((box[0] + row) * width + box[1])
                for byte in range(n):  # a slice would take seconds more to compile
                    to[row * n + byte] = image[at + byte]
    return INTACT, 0


def rectangles(records: Records, boxes: np.ndarray) -> np.ndarray:
    """Return the part of each record to decode, which contains all its boxes: int32 [B, 4], top, left, height, width.

    boxes: int32 [V, B, 4], inside the images; raises ValueError for others. For `decode_rectangle` the part has one
    column more on either side and at least `_MIN_COLUMNS`, and starts at a multiple of `_BLOCK_COLUMNS`. A JPEG without
    a CRC32 is decoded in full: damage outside the crops would otherwise be an error in some epochs only.
    """
    first, last = boxes[:, :, :2].min(0), (boxes[:, :, :2] + boxes[:, :, 2:]).max(0)
    widths = records.widths
    if (last[:, 0] > records.heights).any() or (last[:, 1] > widths).any() or first.min(initial=0) < 0:
        raise ValueError("a box is not inside its image")  # compiled code trusts them
    left = np.maximum(np.minimum(first[:, 1] - 1, widths - _MIN_COLUMNS), 0)
    first[:, 1] = left // _BLOCK_COLUMNS * _BLOCK_COLUMNS
    last[:, 1] = np.minimum(np.maximum(last[:, 1] + 1, first[:, 1] + _MIN_COLUMNS), widths)
    parts = np.concatenate([first, last - first], 1)
    if not (_PARTIAL and records.crc32.size > 0):
        jpegs = records.modes == JPEG
        parts[jpegs] = full_rectangles(records)[jpegs]
    return parts


def full_rectangles(records: Records) -> np.ndarray:
    """Return the rectangle of each full image: int32 [B, 4]."""
    zero = np.zeros(len(records.heights), np.int32)
    return np.stack([zero, zero, records.heights, records.widths], 1)


def decodes(data: np.ndarray, height: int, width: int) -> bool:
    """Return whether JPEG `data`, uint8 [size], decodes to that size without error."""
    pixels, full = np.empty(3 * height * width, np.uint8), np.array([0, 0, height, width], np.int32)
    return bool(_decode(data, height, width, full, pixels))


def check_record(beton: Beton, index: int) -> str | None:
    """Check CRC32, JPEG header and decoding of sample `index`; return the fault, or None."""
    return _FAULTS.get(_decoded(beton, index)[0])


def decode(beton: Beton, index: int) -> np.ndarray:
    """Return the pixels of sample `index`: uint8 [H, W, 3]. Raises DamagedRecord."""
    fault, pixels = _decoded(beton, index)
    if fault != INTACT:
        raise damaged(beton, index, fault)
    return np.array(pixels).reshape(int(beton.heights[index]), int(beton.widths[index]), 3)


def _decoded(beton: Beton, index: int) -> tuple[int, np.ndarray]:
    data = np.asarray(beton.record(index))  # images read in place have no common `beton.data`
    place = {"data": data, "pointers": np.zeros(1, np.uint64), "sizes": np.full(1, len(data), np.uint64)}
    record = _gather(beton, np.array([index]))._replace(**place)
    pixels = np.empty(3 * int(record.heights[0]) * int(record.widths[0]), np.uint8)
    return decode_record(record, 0, full_rectangles(record)[0], pixels)[:2]


def _gather(beton: Beton, ids: np.ndarray) -> Records:
    crcs = beton.crc32[ids] if beton.crc32 is not None else np.zeros(0, np.uint32)
    sides = beton.heights[ids].astype(np.int32), beton.widths[ids].astype(np.int32)
    return Records(beton.data, beton.pointers[ids], beton.sizes[ids], *sides, beton.modes[ids], crcs)


def records_of(beton: Beton, ids: np.ndarray) -> Records:
    """Return the records of samples `ids`, int64 [n], for compiled code.

    The beton's tables are mapped, not copied. Raises InputError where the file was overwritten since they were checked:
    compiled code trusts them.
    """
    records = _gather(beton, ids)
    end, pixels = np.uint64(len(beton.data)), records.heights.astype(np.uint64) * records.widths.astype(np.uint64)
    longest = max(records.heights.max(initial=0), records.widths.max(initial=0))
    if (
        longest > beton.longest_side
        or pixels.max(initial=0) > beton.most_pixels
        or (records.sizes > end).any()
        or (records.pointers > end - records.sizes).any()
        or (records.sizes < 3 * pixels)[records.modes == RAW].any()
    ):
        raise InputError(f"{beton.path}: was overwritten while it was read: start again, and replace it by a rename")
    return records


def damaged(beton: Beton, sample: int, fault: int | str, others: tuple[int, ...] = ()) -> DamagedRecord:
    """Return the error for a damaged sample, whose message names it and its fault; `others` are damaged too."""
    reason = _FAULTS[fault] if isinstance(fault, int) else fault
    path, number = beton.place(sample)
    return DamagedRecord(
        f"{path}: sample {number} ({beton.name(sample)}) is damaged: {reason}: list all such samples with "
        f"python -m pipeline.inspect {path} --verify, and write the file again, or skip them with "
        "--data.on-bad skip",
        (sample, *others),
    )
