"""Image files to the records stored for them."""

import contextlib
import io
import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.beton_format import JPEG, RAW
from pipeline.storage.decode import decodes, jpeg_frame
from pipeline.system.counter_rng import mix
from pipeline.system.errors import InputError, describe_error
from pipeline.system.limits import MAX_IMAGE_PIXELS, MAX_SCANNED_PIXELS, MAX_SCANS

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # not all of Pillow's: its EPS reader runs a program
_TILE_TAGS = (322, 323)  # TIFF: width and height of a tile, which is decoded in full even for a small image
_SCAN_MARKER = b"\xff\xda"
_LARGE_PIXELS = 1 << 24
_BAND_ROWS = 64
_MAX_METADATA_BYTES = 1 << 20  # bytes of metadata of a JPEG stored unchanged
_NO_LOCK: AbstractContextManager[Any] = contextlib.nullcontext()
_MAX_SIDE = 65500  # pixels, of the JPEG encoder; the format itself allows 65535
_TRANSPOSES = {  # keys: EXIF orientation
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
    """Longest side, pixels; larger images are shrunk to it. 0: no limit."""
    quality: int = 90
    """JPEG quality of encoded images."""
    mode: str = "jpg"
    """jpg; raw: pixels; proportion: a share of the images as JPEG, the others raw."""
    jpeg_share: float = 0.5
    """The share of JPEGs in mode proportion."""
    ignore_exif: bool = False
    """Ignore the EXIF orientation, as torchvision's loader does."""
    encode_all: bool = False
    """Encode all JPEG files again, even those that could be stored unchanged."""

    def __post_init__(self) -> None:
        if self.max_side < 0 or self.max_side > _MAX_SIDE:
            raise InputError(f"--max-side {self.max_side}: give 0 (no limit) to {_MAX_SIDE} pixels")
        if not 1 <= self.quality <= 100:
            raise InputError(f"--quality {self.quality}: give 1 to 100")
        if self.mode not in ("jpg", "raw", "proportion"):
            raise InputError(f"--mode {self.mode}: give jpg, raw or proportion")
        if not 0 <= self.jpeg_share <= 1:
            raise InputError(f"--jpeg-share {self.jpeg_share}: give 0 to 1")


@dataclass(frozen=True)
class Record:
    """One image as stored."""

    data: bytes
    mode: int
    height: int
    width: int
    crc32: int


class Unreadable(Exception):
    """An image that cannot be stored. The message is the reason."""


def encode(data: bytes, index: int, settings: Settings, lock: AbstractContextManager[Any] = _NO_LOCK) -> Record:
    """Return the record of image file `data`, sample `index`. Raises Unreadable.

    lock: held while an image of more than 16 million pixels is decoded, to bound the memory of several processes.
    """
    image = _open(data)
    as_jpeg = settings.mode == "jpg" or (
        settings.mode == "proportion" and float(mix(np.uint64(index))) < settings.jpeg_share * 2.0**64
    )
    with lock if image.width * image.height > _LARGE_PIXELS else _NO_LOCK:
        if not (as_jpeg and not settings.encode_all and _storable(data, image, settings)):
            image = _shrink(_to_rgb(image, settings), settings.max_side)
            data = _jpeg(image, settings.quality) if as_jpeg else image.tobytes()
    return Record(data, JPEG if as_jpeg else RAW, image.height, image.width, zlib.crc32(data))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "jpeg", quality=quality)
    return encoded.getvalue()


def _open(data: bytes) -> Image.Image:
    """Return the image, not yet decoded. Raises Unreadable, also where decoding would take too much memory or time."""
    if not data:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        tile = [int(tags.get(side, 0)) for side in _TILE_TAGS]
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except Exception as error:  # any kind: Pillow's decoders were not written for hostile bytes
        raise Unreadable(describe_error(error)) from None
    for width, height in (image.size, tile):
        if width * height > MAX_IMAGE_PIXELS:
            raise Unreadable(f"{width} by {height} pixels, more than {MAX_IMAGE_PIXELS}: shrink it first")
    scans = data.count(_SCAN_MARKER) if image.format == "JPEG" else 0
    if scans > MAX_SCANS or scans * image.width * image.height > MAX_SCANNED_PIXELS:
        raise Unreadable(f"a JPEG of {scans} scans: encode it again")
    return image


def _storable(data: bytes, image: Image.Image, settings: Settings) -> bool:
    """Return whether a file can be stored unchanged: an upright RGB or gray JPEG that the loader's decoder reads."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    if len(data) > _MAX_METADATA_BYTES + 6 * image.width * image.height:
        return False
    if settings.max_side and max(image.size) > settings.max_side:
        return False
    if not settings.ignore_exif and _upright(image) is not None:
        return False
    source, (width, height) = np.frombuffer(data, np.uint8), image.size
    return jpeg_frame(source)[:2] == (height, width) and decodes(source, height, width)


def _to_rgb(image: Image.Image, settings: Settings) -> Image.Image:
    """Return the image upright, in 8-bit RGB. Alpha is dropped, as by torchvision's loader."""
    try:
        image.load()
        transpose = None if settings.ignore_exif else _upright(image)
        if transpose is not None:
            image = image.transpose(transpose)
        if image.mode.startswith("I") or image.mode == "F":
            image = _sixteen_to_eight(image)
        return image.convert("RGB")
    except Exception as error:  # any kind, like in `_open`
        raise Unreadable(describe_error(error)) from None


def _upright(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that turns the image upright by its EXIF; None where it is upright or the EXIF damaged."""
    try:
        return _TRANSPOSES.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    """Return an image of integers or floats in 8 bits, converted in bands of rows to save memory."""
    bands = [(0, top, image.width, min(top + _BAND_ROWS, image.height)) for top in range(0, image.height, _BAND_ROWS)]
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
    if longest > _MAX_SIDE and not max_side:
        raise Unreadable(f"{longest} pixels a side, the format allows {_MAX_SIDE}: use --max-side")
    if not max_side or longest <= max_side:
        return image
    width, height = (max(1, round(side * max_side / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
