"""Tests of encoding: the record of each kind of image, and images that are refused."""

from __future__ import annotations

import contextlib
import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.beton_format import JPEG, RAW
from pipeline.native.libffcv import decode_jpeg
from pipeline.storage.encode import Record, Settings, Unreadable, encode
from tests.pipeline.conftest import picture, saved

RAW_PIXELS = Settings(mode="raw", max_side=0)


ORIENTATION = 0x0112


def _pixels(record: Record) -> np.ndarray:
    """Return the record's pixels, decoded by Pillow."""
    if record.mode == RAW:
        return np.frombuffer(record.data, np.uint8).reshape(record.height, record.width, 3)
    return np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB"))


def _raw(data: bytes) -> np.ndarray:
    return _pixels(encode(data, 0, RAW_PIXELS))


def _warns(data: bytes) -> bool:
    """Return whether libjpeg-turbo errs or warns on a JPEG of 40 by 24 pixels."""
    pixels = np.empty(3 * 40 * 24, np.uint8)
    return bool(decode_jpeg(np.frombuffer(data, np.uint8), pixels, 24, 40))


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize(
    "data",
    [
        saved(picture()),
        saved(picture(), progressive=True, quality=60),
        saved(picture().convert("L")),
        saved(picture(500, 100)),
        saved(picture(), exif=_turned(1)),
        saved(picture()) + b"trailing bytes, as some cameras write",
    ],
    ids=["baseline", "progressive", "gray", "as long as allowed", "upright", "trailing bytes"],
)
def test_a_small_upright_jpeg_is_stored_byte_for_byte(data: bytes) -> None:
    record = encode(data, 0, Settings(max_side=500))
    assert (record.data, record.mode, record.crc32) == (data, JPEG, zlib.crc32(data))
    assert (record.width, record.height) == Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize(
    ("size", "shrunk"),
    [((600, 450), (200, 150)), ((450, 600), (150, 200)), ((2000, 3), (200, 1)), ((201, 201), (200,) * 2)],
)
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_a_large_image_is_shrunk_with_its_aspect_ratio(
    size: tuple[int, int], shrunk: tuple[int, int], mode: str
) -> None:
    image = picture(*size)
    record = encode(saved(image, quality=95), 0, Settings(max_side=200, mode=mode))
    assert (record.width, record.height) == shrunk
    expected = np.asarray(image.resize(shrunk, Image.Resampling.BOX), dtype=float)
    assert np.abs(_pixels(record) - expected).mean() < 6


def test_without_a_limit_every_size_is_stored() -> None:
    data = saved(picture(900, 700))
    assert encode(data, 0, Settings(max_side=0)).data == data


def test_encode_all_encodes_every_jpeg() -> None:
    image = picture(90, 70)
    data = saved(image, quality=100)
    record = encode(data, 0, Settings(encode_all=True))
    assert record.mode == JPEG
    assert len(record.data) < len(data) / 2
    assert np.abs(_pixels(record) - np.asarray(image, float)).mean() < 3


def test_quality_applies_to_encoded_images() -> None:
    sizes = [len(encode(saved(picture(90, 90), "png"), 0, Settings(quality=quality)).data) for quality in (30, 90, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ("mode", "kind", "color", "expected"),
    [
        ("L", "png", 77, (77, 77, 77)),
        ("L", "jpeg", 77, (77, 77, 77)),
        ("1", "png", 1, (255, 255, 255)),
        ("1", "bmp", 0, (0, 0, 0)),
        ("RGBA", "png", (10, 20, 30, 0), (10, 20, 30)),
        ("LA", "png", (99, 3), (99, 99, 99)),
        ("RGB", "webp", (200, 10, 60), None),
        ("CMYK", "jpeg", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", "jpeg", (255, 0, 0, 0), (0, 255, 255)),
        ("I;16", "png", 65535, (255, 255, 255)),
        ("I;16", "png", 257 * 40, (40, 40, 40)),
        ("I;16", "png", 257 * 40 + 129, (41, 41, 41)),
        ("I;16", "png", 0, (0, 0, 0)),
        ("I;16", "tiff", 65535, (255, 255, 255)),
        ("F", "tiff", 128.0, (128, 128, 128)),
    ],
)
def test_every_pixel_mode_becomes_rgb(
    mode: str, kind: str, color: object, expected: tuple[int, int, int] | None
) -> None:
    data = saved(Image.new(mode, (9, 7), color), kind)  # type: ignore[arg-type]
    pixels = _raw(data).astype(int)
    assert pixels.shape == (7, 9, 3)
    assert np.abs(pixels - (expected or np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))).max() <= 2
    as_jpeg = _pixels(encode(data, 0, Settings())).astype(int)
    assert np.abs(as_jpeg - pixels).max() <= 4


@pytest.mark.parametrize(
    ("mode", "kind"), [("P", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpeg"), ("L", "jpeg")]
)
def test_pixels_equal_pillow_s_conversion(mode: str, kind: str) -> None:
    data = saved(picture().convert(mode), kind)
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_palette_with_transparency_drops_it() -> None:
    data = saved(picture().convert("P"), "png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3])


def test_sixteen_bit_shades_are_scaled_linearly() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = _raw(saved(Image.fromarray(ramp), "png"))
    np.testing.assert_array_equal(pixels[..., 0], np.rint(ramp / 257))
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_honored(kind: str, orientation: int) -> None:
    data = saved(picture(), kind, exif=_turned(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(_raw(data), expected)


def test_a_turned_jpeg_is_encoded_upright() -> None:
    data = saved(picture(40, 24), exif=_turned(6))
    record = encode(data, 0, Settings())
    assert (record.width, record.height) == (24, 40)
    assert Image.open(io.BytesIO(record.data)).getexif().get(ORIENTATION, 1) == 1
    assert np.abs(_pixels(record) - np.asarray(picture(40, 24).rotate(-90, expand=True), dtype=float)).mean() < 8


def test_ignore_exif() -> None:
    data = saved(picture(40, 24), exif=_turned(6))
    assert encode(data, 0, Settings(ignore_exif=True)).data == data


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_damaged_exif_does_not_make_an_image_unreadable(mode: str) -> None:
    exif = _turned(6)
    exif[0x010F] = "a maker's name"
    data = saved(picture(), exif=exif)
    start, stop = data.index(b"Exif") + 6, data.index(b"maker's")
    for at in range(start, stop):
        changed = bytearray(data)
        changed[at] = 0xFF
        assert {*encode(bytes(changed), 0, Settings(mode=mode)).data[:2]}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.parametrize("exif", [b"MM\x00", b"Exif\x00\x00MM\x00*", b"no EXIF at all", b"II*\x00\xff\xff\xff\xff"])
def test_unreadable_exif_is_ignored(kind: str, exif: bytes) -> None:
    data = saved(picture(), kind, exif=exif)
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert encode(data, 0, Settings()).width == 40


def test_raw_mode_stores_pixels() -> None:
    record = encode(saved(picture(), "png"), 0, Settings(mode="raw"))
    assert (record.mode, record.data) == (RAW, np.asarray(picture()).tobytes())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_proportion_mode_stores_a_fixed_share_as_jpeg(share: float) -> None:
    data, settings = saved(picture(16, 16)), Settings(mode="proportion", jpeg_share=share)
    modes = [encode(data, index, settings).mode for index in range(400)]
    assert abs(modes.count(JPEG) / 400 - share) <= (0.06 if 0 < share < 1 else 0)
    assert modes == [encode(data, index, settings).mode for index in range(400)]


SCANNED = saved(picture(), quality=95)


SCAN = SCANNED.index(b"\xff\xda") + 14


@pytest.mark.parametrize(
    "data",
    [
        SCANNED[:-2] + b"\x12\x34" * 40 + SCANNED[-2:],
        SCANNED[:-40] + SCANNED[-20:],
        SCANNED[: SCAN + 200] + b"\xff\xd3" + SCANNED[SCAN + 200 :],
    ],
    ids=["extra bytes before the end", "bytes missing", "a marker out of place"],
)
def test_a_jpeg_that_decodes_with_a_warning_is_encoded_again(data: bytes) -> None:
    assert _warns(data)
    record = encode(data, 0, Settings(quality=95))
    assert record.data != data
    assert not _warns(record.data)
    expected = np.asarray(Image.open(io.BytesIO(data)), dtype=float)
    assert np.abs(_pixels(record) - expected).mean() < 6


@pytest.mark.parametrize("data", [SCANNED[:-2], SCANNED[:-50], SCANNED[:SCAN]], ids=["no end", "cut", "no scan"])
def test_a_truncated_jpeg_is_refused(data: bytes) -> None:
    with pytest.raises(Unreadable, match="truncated"):
        encode(data, 0, Settings())


def test_a_damaged_scan_is_never_stored() -> None:
    rng, warned = np.random.default_rng(0), 0
    for _ in range(60):
        changed = bytearray(SCANNED)
        changed[rng.integers(SCAN, len(SCANNED) - 2)] ^= int(rng.integers(1, 256))
        if not _warns(bytes(changed)):
            continue
        warned += 1
        with contextlib.suppress(Unreadable):
            record = encode(bytes(changed), 0, Settings())
            assert record.data != bytes(changed)
            assert not _warns(record.data)
    assert warned > 10
