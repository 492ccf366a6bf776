"""An image file to the record that is stored for it."""

from __future__ import annotations

import contextlib
import io
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.native.libffcv import JPEG, RAW, decode_jpeg
from pipeline.storage.decode import jpeg_frame
from pipeline.system.counter_rng import mix
from pipeline.system.errors import InputError, describe_error
from pipeline.system.limits import LARGEST_IMAGE, MOST_SCANNED, MOST_SCANS

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # Pillow has others, one of which runs a program
_TILE = (322, 323)  # TIFF's tags of a tile's width and height: it is decoded whole, however small the image
_SCAN = b"\xff\xda"
_LARGE = 1 << 24  # pixels
_BAND = 64  # rows
_BESIDES = 1 << 20  # bytes of a JPEG that are no pixels
_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
_LONGEST_SIDE = 65500  # the JPEG encoder's; the format itself holds 65535
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Settings:
    """How images are stored."""

    max_side: int = 500
    """Longest side, pixels; larger images are shrunk to it. 0: never."""
    quality: int = 90
    """JPEG quality of those that are encoded."""
    mode: str = "jpg"
    """jpg; raw: pixels; proportion: a share of them as JPEG and the others raw."""
    jpeg_share: float = 0.5
    """That share."""
    ignore_exif: bool = False
    """Leave images as stored, whatever their EXIF orientation says (torchvision's loader does)."""

    encode_all: bool = False
    """Encode JPEG files anew too, also those that could be stored as they are."""

    def __post_init__(self) -> None:
        if self.max_side < 0 or self.max_side > _LONGEST_SIDE:
            raise InputError(f"--max-side {self.max_side}: give 0 (no limit) to {_LONGEST_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: give 1 to 100")
        if self.mode not in ("jpg", "raw", "proportion"):
            raise InputError(f"--mode {self.mode}: give jpg, raw or proportion")
        if not 0 <= self.jpeg_share <= 1:
            raise InputError(f"--jpeg-share {self.jpeg_share}: give 0 to 1")


@dataclass(frozen=True)
class Record:
    """One image as it will be stored."""

    data: bytes
    mode: int
    height: int
    width: int
    crc32: int


class Unreadable(Exception):
    """An image that cannot be stored; the message is the reason."""


def encode(data: bytes, index: int, settings: Settings, large: AbstractContextManager[Any] = _NOTHING) -> Record:
    """Return the record for image file `data`, sample `index`. Raises Unreadable.

    large: held while an image of more than 16 million pixels is decoded.
    """
    image = _open(data)
    with large if image.width * image.height > _LARGE else _NOTHING:
        return _encoded(data, image, index, settings)


def _encoded(data: bytes, image: Image.Image, index: int, settings: Settings) -> Record:
    as_jpeg = settings.mode == "jpg" or (
        settings.mode == "proportion" and float(mix(np.uint64(index))) < settings.jpeg_share * 2.0**64
    )
    if as_jpeg and not settings.encode_all and _storable(data, image, settings):
        return _record(data, JPEG, image.height, image.width)
    image = _to_rgb(image, settings)
    image = _shrink(image, settings.max_side)
    if not as_jpeg:
        return _record(image.tobytes(), RAW, image.height, image.width)
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=settings.quality)
    return _record(encoded.getvalue(), JPEG, image.height, image.width)


def _record(data: bytes, mode: int, height: int, width: int) -> Record:
    return Record(data, mode, height, width, zlib.crc32(data))


def _open(data: bytes) -> Image.Image:
    """Return the image, not decoded yet, and never to be where that would take too much memory or time."""
    if not data:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        tile = [int(tags.get(side, 0)) for side in _TILE]
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # of any kind: Pillow's decoders meet bytes they were not written for
        raise Unreadable(describe_error(error)) from None
    for width, height in (image.size, tile):
        if width * height > LARGEST_IMAGE:
            raise Unreadable(f"{width} by {height} pixels, more than {LARGEST_IMAGE}: shrink it first")
    scans = data.count(_SCAN) if image.format == "JPEG" else 0
    if scans > MOST_SCANS or scans * image.width * image.height > MOST_SCANNED:
        raise Unreadable(f"a JPEG of {scans} scans: encode it again")
    return image


def _storable(data: bytes, image: Image.Image, settings: Settings) -> bool:
    """Whether a file can stand in the beton as it is: an upright RGB or gray JPEG that the loader's decoder reads."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    if len(data) > _BESIDES + 6 * image.width * image.height:
        return False
    if settings.max_side and max(image.size) > settings.max_side:
        return False
    if not settings.ignore_exif and _turn(image) is not None:
        return False
    source, (width, height) = np.frombuffer(data, np.uint8), image.size
    if jpeg_frame(source)[:2] != (height, width):
        return False
    pixels = np.empty(3 * height * width, np.uint8)
    return bool(decode_jpeg(source, pixels, height, width) == 0)


def _to_rgb(image: Image.Image, settings: Settings) -> Image.Image:
    """Return the image upright, in 8-bit RGB; alpha is dropped as by torchvision's loader."""
    try:
        image.load()
        turn = None if settings.ignore_exif else _turn(image)
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I") or image.mode == "F":
            image = _sixteen_to_eight(image)
        return image.convert("RGB")
    except Exception as error:  # of any kind, as in `_open`
        raise Unreadable(describe_error(error)) from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright, as its EXIF orientation says; None where it is, or the EXIF is damaged."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    bands = [(0, top, image.width, min(top + _BAND, image.height)) for top in range(0, image.height, _BAND)]
    wide = image.mode != "F" or max(np.asarray(image.crop(band)).max() for band in bands) > 255
    eight = Image.new("L", image.size)
    for band in bands:
        values = np.asarray(image.crop(band)).astype(np.float64)
        if wide:
            values = values / 257  # 65535 is white
        eight.paste(Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)), band)
    return eight


def _shrink(image: Image.Image, max_side: int) -> Image.Image:
    longest = max(image.size)
    if longest > _LONGEST_SIDE and not max_side:
        raise Unreadable(f"{longest} pixels a side, the format holds {_LONGEST_SIDE}: use --max-side")
    if not max_side or longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
