"""Tests of preparing: what is stored for each kind of image, what is refused, and what stands on disk afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps

from pipeline.beton import Beton
from pipeline.native import libffcv
from pipeline.native.libffcv import JPEG, RAW, decode_jpeg
from pipeline.prepare import main, prepare
from pipeline.sources import synthetic
from pipeline.storage.decode import check_record, decode
from pipeline.storage.encode import Record, Settings, Unreadable, encode
from pipeline.storage.writer import PAGE_BYTES, BetonWriter
from pipeline.system.errors import InputError
from tests import ROOT
from tests.pipeline.conftest import pack, picture, run_command, saved

RAW_PIXELS = Settings(mode="raw", max_side=0)
ORIENTATION = 0x0112


def _pixels(record: Record) -> np.ndarray:
    """The record's pixels, read without the project's decoder."""
    if record.mode == RAW:
        return np.frombuffer(record.data, np.uint8).reshape(record.height, record.width, 3)
    return np.asarray(Image.open(io.BytesIO(record.data)).convert("RGB"))


def _raw(data: bytes) -> np.ndarray:
    return _pixels(encode(data, 0, RAW_PIXELS))


def _warns(data: bytes) -> bool:
    """Whether libjpeg-turbo errs or warns on a JPEG of the usual size."""
    pixels = np.empty(3 * 40 * 24, np.uint8)
    return bool(decode_jpeg(np.frombuffer(data, np.uint8), pixels, 24, 40))


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# What is stored


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
def test_a_large_image_is_shrunk_to_the_longest_side_with_its_aspect_kept(
    size: tuple[int, int], shrunk: tuple[int, int], mode: str
) -> None:
    image = picture(*size)
    record = encode(saved(image, quality=95), 0, Settings(max_side=200, mode=mode))
    assert (record.width, record.height) == shrunk
    expected = np.asarray(image.resize(shrunk, Image.Resampling.BOX), dtype=float)
    assert np.abs(_pixels(record) - expected).mean() < 6


def test_no_limit_on_the_longest_side_keeps_every_size() -> None:
    data = saved(picture(900, 700))
    assert encode(data, 0, Settings(max_side=0)).data == data


def test_jpegs_that_could_stay_are_encoded_anew_where_asked() -> None:
    image = picture(90, 70)
    data = saved(image, quality=100)
    record = encode(data, 0, Settings(encode_all=True))
    assert record.mode == JPEG
    assert len(record.data) < len(data) / 2
    assert np.abs(_pixels(record) - np.asarray(image, float)).mean() < 3


def test_quality_is_that_of_the_encoded_image() -> None:
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
def test_every_kind_of_pixel_comes_out_as_rgb(
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
def test_pixels_are_those_of_pillows_own_conversion(mode: str, kind: str) -> None:
    data = saved(picture().convert(mode), kind)
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_palette_with_transparency_drops_it() -> None:
    data = saved(picture().convert("P"), "png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., :3])


def test_sixteen_bit_shades_keep_their_order_and_distance() -> None:
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


def test_the_exif_orientation_is_ignored_when_asked() -> None:
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
def test_exif_that_cannot_be_read_at_all_is_ignored(kind: str, exif: bytes) -> None:
    data = saved(picture(), kind, exif=exif)
    np.testing.assert_array_equal(_raw(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert encode(data, 0, Settings()).width == 40


def test_raw_mode_stores_the_pixels_themselves() -> None:
    record = encode(saved(picture(), "png"), 0, Settings(mode="raw"))
    assert (record.mode, record.data) == (RAW, np.asarray(picture()).tobytes())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_proportion_mode_stores_that_share_as_jpeg_the_same_each_time(share: float) -> None:
    data, settings = saved(picture(16, 16)), Settings(mode="proportion", jpeg_share=share)
    modes = [encode(data, index, settings).mode for index in range(400)]
    assert abs(modes.count(JPEG) / 400 - share) <= (0.06 if 0 < share < 1 else 0)
    assert modes == [encode(data, index, settings).mode for index in range(400)]


# JPEGs that libjpeg-turbo warns of


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
def test_a_jpeg_decoded_only_with_a_warning_is_encoded_again(data: bytes) -> None:
    assert _warns(data)
    record = encode(data, 0, Settings(quality=95))
    assert record.data != data
    assert not _warns(record.data)
    expected = np.asarray(Image.open(io.BytesIO(data)), dtype=float)
    assert np.abs(_pixels(record) - expected).mean() < 6


@pytest.mark.parametrize("data", [SCANNED[:-2], SCANNED[:-50], SCANNED[:SCAN]], ids=["no end", "cut", "no scan"])
def test_a_jpeg_cut_short_is_refused(data: bytes) -> None:
    with pytest.raises(Unreadable, match="truncated"):
        encode(data, 0, Settings())


def test_a_damaged_scan_is_refused_or_encoded_again_never_stored() -> None:
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


# Unreadable images

BAD = {
    "empty": (b"", "the file is empty"),
    "text": (b"this is no image\n", "not an image"),
    "truncated JPEG": (saved(picture())[:700], "truncated"),
    "truncated header": (saved(picture())[:30], ""),
    "truncated PNG": (saved(picture(), "png")[:-60], ""),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unreadable_image_is_an_error_that_names_it_and_leaves_nothing(
    data: bytes, reason: str, workers: int, tmp_path: Path
) -> None:
    source = pack("folder", {"a/1.jpg": saved(picture()), "a/2.jpg": data, "b/3.jpg": saved(picture())}, tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=rf"image a/2\.jpg cannot be stored: .*{reason}.*--skip-bad 10"):
        prepare(str(source), tmp_path / "out" / "x.beton", workers=workers, quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": saved(picture())}, tmp_path)
    (source / "2.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match=r"image 2\.jpg cannot be stored: cannot be read: No such file"):
        prepare(str(source), tmp_path / "x.beton", workers=1, quiet=True)


def test_an_output_that_stood_there_stays_as_it_was_when_preparing_fails(small: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (small, small.with_name("small.beton.json"))}
    source = pack("folder", {"1.jpg": saved(picture()), "2.jpg": b"no image"}, tmp_path)
    with pytest.raises(InputError):
        prepare(str(source), small, workers=1, quiet=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_output_that_stood_there_is_replaced_with_its_manifest(small: Path) -> None:
    prepare("synthetic:5", small, workers=1, quiet=True)
    beton = Beton(small)
    assert len(beton) == 5
    assert beton.manifest is not None
    assert beton.manifest.count == 5


def test_bad_images_are_left_out_and_listed_when_allowed(tmp_path: Path) -> None:
    files = {f"c{i % 2}/{i}.jpg": saved(picture(seed=i)) for i in range(6)}
    files |= {"c0/2.jpg": b"", "c1/5.jpg": b"no image"}
    source = pack("tar", files, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", skip_bad=2, workers=1, quiet=True)
    assert manifest.skipped == [["c0/2.jpg", "the file is empty"], ["c1/5.jpg", "not an image"]]
    assert manifest.names == ["c0/0.jpg", "c0/4.jpg", "c1/1.jpg", "c1/3.jpg"]
    beton = Beton(tmp_path / "x.beton")
    assert beton.labels.tolist() == [0, 0, 1, 1]
    for index, name in enumerate(manifest.names):
        assert beton.record(index).tobytes() == files[name]


def test_pillows_warnings_are_not_shown(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = saved(picture().convert("P"), "png", transparency=bytes(range(256)))
    prepare(str(pack("tar", {"1.png": data}, tmp_path)), tmp_path / "x.beton", workers=1, quiet=True)
    assert not recwarn.list


def test_one_bad_image_more_than_allowed_is_an_error(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": b"", "2.jpg": b"", "3.jpg": saved(picture())}, tmp_path)
    with pytest.raises(
        InputError, match=r"image 2\.jpg cannot be stored: the file is empty \(1 before it were skipped"
    ):
        prepare(str(source), tmp_path / "x.beton", skip_bad=1, workers=1, quiet=True)


def test_nothing_but_bad_images_is_an_error_even_when_allowed(tmp_path: Path) -> None:
    source = pack("folder", {"1.jpg": b"", "2.jpg": b""}, tmp_path)
    with pytest.raises(InputError, match="none of its 2 images can be read"):
        prepare(str(source), tmp_path / "x.beton", skip_bad=9, workers=1, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# The file


def _parsed(path: Path) -> SimpleNamespace:
    """The beton's header and rows, read with struct from FFCV's description of the format alone."""
    data = path.read_bytes()
    version, fields, page, count, table = struct.unpack_from("<HHIQQ", data)
    start = 24 + 1041 * fields
    rows = [struct.unpack_from("<BHHQ3xq", data, start + 24 * i) for i in range(count)]
    places = list(struct.iter_unpack("<QQQ", data[table:]))
    return SimpleNamespace(
        data=data,
        version=version,
        page=page,
        count=count,
        table=table,
        rows=rows,
        places=places,
        end=start + 24 * count,
    )


def test_the_manifest_says_what_the_file_holds(tmp_path: Path) -> None:
    files = {f"{'ba'[i % 2]}/{i}.jpg": saved(picture(20 + i, 30, i)) for i in range(7)}
    source, out = pack("zip", files, tmp_path), tmp_path / "x.beton"
    settings = Settings(max_side=300, quality=80)
    returned = prepare(str(source), out, settings, workers=1, quiet=True)
    manifest, file = json.loads((tmp_path / "x.beton.json").read_text("utf-8")), _parsed(out)
    assert manifest == returned.__dict__
    assert (file.version, manifest["format"]) == (2, 1)
    assert manifest["count"] == file.count == 7
    assert manifest["file_size"] == len(file.data)
    assert manifest["classes"] == ["a", "b"]
    assert manifest["names"] == sorted(files)
    assert manifest["settings"] == {
        "source": str(source),
        "max_side": 300,
        "quality": 80,
        "mode": "jpg",
        "jpeg_share": 0.5,
        "ignore_exif": False,
        "encode_all": False,
    }
    assert {"python", "ffcv", "numpy", "pillow"} <= set(manifest["versions"])
    assert manifest["header_crc32"] == zlib.crc32(file.data[: file.end] + file.data[file.table :])
    for index, (name, (mode, width, height, pointer, label)) in enumerate(
        zip(manifest["names"], file.rows, strict=True)
    ):
        assert file.places[index] == (index, pointer, len(files[name]))
        stored = file.data[pointer : pointer + len(files[name])]
        assert stored == files[name]
        assert manifest["crc32"][index] == zlib.crc32(stored)
        assert (mode, (width, height)) == (0, Image.open(io.BytesIO(stored)).size)
        assert manifest["classes"][label] == name[0]


def test_names_that_are_not_utf_8_survive(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    source = pack("folder", {name: saved(picture())}, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    assert beton.manifest == manifest
    assert manifest.names == [name]
    assert beton.name(0) == "caf\\udce9.jpg"


def test_the_file_is_the_same_whatever_the_number_of_workers(tmp_path: Path) -> None:
    files = {f"{i}.png": saved(picture(50 + i, 60, i), "png") for i in range(80)}
    source = pack("tar", files, tmp_path)
    for workers in (1, 2):
        out, settings = tmp_path / f"{workers}.beton", Settings(mode="proportion", max_side=60)
        prepare(str(source), out, settings, workers=workers, quiet=True)
    for suffix in ("beton", "beton.json"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()


def test_a_limit_takes_images_spread_evenly_over_all_classes(tmp_path: Path) -> None:
    files = {f"{folder}/{i}.jpg": saved(picture(seed=i)) for folder in "abc" for i in range(8)}
    source = pack("tar", files, tmp_path)
    manifest = prepare(str(source), tmp_path / "x.beton", limit=6, workers=1, quiet=True)
    assert manifest.names == ["a/0.jpg", "a/4.jpg", "b/0.jpg", "b/4.jpg", "c/0.jpg", "c/4.jpg"]
    manifest = prepare(str(source), tmp_path / "x.beton", limit=99, workers=1, quiet=True)
    assert manifest.names == sorted(files)


def _written(path: Path, sizes: list[int]) -> SimpleNamespace:
    writer = BetonWriter(path, len(sizes))
    for size in sizes:
        writer.append(Record(b"\x01" * size, RAW, 1, 1, 0), 0)
    writer.close()
    return _parsed(path)


@pytest.mark.parametrize(
    ("sizes", "page"),
    [
        ([PAGE_BYTES // 3] * 7, PAGE_BYTES),
        ([PAGE_BYTES, 1, PAGE_BYTES, PAGE_BYTES - 1, 2], PAGE_BYTES),
        ([5, PAGE_BYTES + 1, 5, PAGE_BYTES // 2, PAGE_BYTES // 2 + 1, 2 * PAGE_BYTES], 2 * PAGE_BYTES),
        ([3 * PAGE_BYTES, PAGE_BYTES // 2, PAGE_BYTES], 4 * PAGE_BYTES),
    ],
)
def test_no_record_crosses_a_page_and_none_overlaps_another(sizes: list[int], page: int, tmp_path: Path) -> None:
    file = _written(tmp_path / "x.beton", sizes)
    assert file.page == page
    end = file.end
    for (_, pointer, size), expected in zip(file.places, sizes, strict=True):
        assert size == expected
        assert pointer >= end
        assert pointer // page == (pointer + size - 1) // page
        end = pointer + size
    assert file.table >= end


# FFCV's own reading of it


def test_ffcvs_reader_reads_it(small: Path) -> None:
    assert libffcv  # before ffcv itself: it keeps the number of threads
    from ffcv.reader import Reader

    reader, beton = Reader(str(small)), Beton(small)
    assert reader.field_names == ["image", "label"]
    assert (reader.num_samples, reader.page_size) == (8, PAGE_BYTES)
    assert reader.metadata["f1"].tolist() == beton.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for name, values in (("height", beton.heights), ("width", beton.widths), ("mode", beton.modes)):
        assert reader.metadata["f0"][name].tolist() == values.tolist()
    assert reader.alloc_table["size"].tolist() == beton.sizes.tolist()


# In a process of its own: FFCV's loader changes types that numba shares, after which no other code compiles.
FFCV_READS = """
import sys
import numpy as np
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption

side, os_cache = int(sys.argv[2]), sys.argv[3] == "os"
decoders = {"image": [CenterCropRGBImageDecoder((side, side), 1.0)], "label": [IntDecoder()]}
order = OrderOption.SEQUENTIAL
loader = Loader(sys.argv[1], batch_size=3, num_workers=1, order=order, os_cache=os_cache, pipelines=decoders)
batches = [(images.copy(), labels.copy()) for images, labels in loader]
images, labels = (np.concatenate(parts) for parts in zip(*batches))
np.savez(sys.argv[1] + ".npz", images=images, labels=labels)
"""


@pytest.mark.parametrize(
    ("cache", "side"), [pytest.param("process", 1300, marks=pytest.mark.slow), ("os", 40)], ids=["pages", "whole"]
)
def test_ffcvs_loader_gives_the_same_pixels_and_labels(cache: str, side: int, tmp_path: Path) -> None:
    """Of 1300 pixels a side, raw images take 5 MB each, and the file several pages."""
    kinds = ("jpeg", "bmp")
    files = {f"{'ab'[i // 3]}/{i}.{kinds[i % 2]}": saved(picture(side, side, i), kinds[i % 2]) for i in range(6)}
    source, out = pack("folder", files, tmp_path), tmp_path / "x.beton"
    prepare(str(source), out, Settings(mode="proportion", max_side=0), workers=1, quiet=True)
    beton = Beton(out)
    assert set(beton.modes.tolist()) == {JPEG, RAW}
    assert side < 1300 or beton.pointers.max() > 2 * PAGE_BYTES
    subprocess.run([sys.executable, "-c", FFCV_READS, str(out), str(side), cache], check=True, timeout=120)
    theirs = np.load(f"{out}.npz")
    for index, image in enumerate(theirs["images"].astype(int)):
        gap = np.abs(image - decode(beton, index))  # of JPEGs FFCV takes libjpeg's fast, rough transform
        assert gap.max() == 0 if beton.modes[index] == RAW else gap.mean() < 2
    assert theirs["labels"].ravel().tolist() == beton.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_every_record_decodes_to_the_image_it_was_made_of(tmp_path: Path) -> None:
    images = [picture(20 + i, 50 - i, i) for i in range(8)]
    files = {f"{i}.png": saved(image, "png") for i, image in enumerate(images)}
    prepare(str(pack("tar", files, tmp_path)), tmp_path / "x.beton", Settings(mode="proportion"), workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    assert set(beton.modes.tolist()) == {JPEG, RAW}
    for index, image in enumerate(images):
        assert check_record(beton, index) is None
        difference = np.abs(decode(beton, index) - np.asarray(image, dtype=float)).mean()
        assert difference == 0 if beton.modes[index] == RAW else difference < 6


# Commands and signals


def test_the_command_writes_the_file_and_says_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.beton"
    options = ("--mode", "raw", "--workers", 1, "--limit", 10, "--max-side", 24)
    assert run_command(main, monkeypatch, "synthetic:40", out, *options) == 0
    assert capsys.readouterr().out == f"{out}: 10 images, 10 classes, 0.0 MiB\n"
    beton = Beton(out)
    assert set(beton.modes.tolist()) == {RAW}
    assert beton.longest_side == 24
    expected = Image.fromarray(synthetic.draw(0, 4)[0]).resize((24, 24), Image.Resampling.BOX)
    assert np.abs(decode(beton, 1) - np.asarray(expected, dtype=float)).mean() < 12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{}/nowhere", "{}/x.beton"], "no such file or folder"),
        (["{}/new\nline", "{}/x.beton"], "no such file or folder"),
        (["synthetic:none", "{}/x.beton"], "write synthetic:N"),
        (["synthetic:3", "{}/none/x.beton"], "its folder does not exist: make it with mkdir -p"),
        (["synthetic:3", "{}"], "is a folder: give the name of the file to write"),
        (["synthetic:3", "{}/" + "x" * 252], "cannot be written: File name too long"),
        (["synthetic:3", "{}/x.beton", "--max-side", "-1"], "--max-side -1: give 0"),
        (["synthetic:3", "{}/x.beton", "--max-side", "70000"], "--max-side 70000: give 0"),
        (["synthetic:3", "{}/x.beton", "--quality", "0"], "--quality 0: give 1 to 100"),
        (["synthetic:3", "{}/x.beton", "--jpeg-share", "1.5"], "--jpeg-share 1.5: give 0 to 1"),
        (["synthetic:3", "{}/x.beton", "--jpeg-share", "nan"], "--jpeg-share nan: give 0 to 1"),
        (["synthetic:3", "{}/x.beton", "--limit", "-1"], "must not be negative"),
    ],
)
def test_the_command_refuses_bad_input_with_one_line_and_status_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, monkeypatch, *(argument.replace("{}", str(tmp_path)) for argument in arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_image_longer_than_can_be_stored_is_refused_with_the_remedy(tmp_path: Path) -> None:
    source = pack("folder", {"1.png": saved(Image.new("L", (65501, 1)), "png")}, tmp_path)
    with pytest.raises(InputError, match="65501 pixels a side, the format holds 65500: use --max-side"):
        prepare(str(source), tmp_path / "x.beton", Settings(max_side=0), workers=1, quiet=True)


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    running = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


def _started(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Preparing, as a command, that has begun to write into `folder`; and its workers."""
    command = [sys.executable, "-m", "pipeline.prepare", "synthetic:20000", str(folder / "x.beton"), "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored below a shell's background job
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 500_000 for path in folder.iterdir()):  # the first images are written
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_signal_ends_all_processes_and_leaves_no_output(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process, workers = _started(tmp_path)
    assert len(workers) == 2
    try:
        if number == signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=20)  # the pipes' end: the workers hold them as well
        deadline = time.monotonic() + 10
        while _running(workers) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert _running(workers) == []
    finally:
        for worker in _running(workers):
            worker.kill()
    assert process.returncode == status
    assert "Traceback" not in errors
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGKILL:  # which nobody can tidy up after
        assert left == [f".x.beton.{process.pid}.writing"]
    else:
        assert left == []
