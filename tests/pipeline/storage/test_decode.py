"""Tests of decoding records, and of the part of a JPEG that is decoded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.beton import Beton
from pipeline.beton_format import JPEG, RAW
from pipeline.prepare import prepare
from pipeline.storage.decode import check_record, decode, full_rectangles, records_of, rectangles
from pipeline.storage.encode import Settings
from tests.pipeline.conftest import pack, picture, saved
from tests.pipeline.native.test_libjpeg import BOXES, BUILT, KINDS, noisy, part, small_beton

PART = [5, 16, 37, 32]  # which contains BOXES


def test_every_record_decodes_to_its_image(tmp_path: Path) -> None:
    images = [picture(20 + i, 50 - i, i) for i in range(8)]
    files = {f"{i}.png": saved(image, "png") for i, image in enumerate(images)}
    prepare(str(pack("tar", files, tmp_path)), tmp_path / "x.beton", Settings(mode="proportion"), workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    assert set(beton.modes.tolist()) == {JPEG, RAW}
    for index, image in enumerate(images):
        assert check_record(beton, index) is None
        difference = np.abs(decode(beton, index) - np.asarray(image, dtype=float)).mean()
        assert difference == 0 if beton.modes[index] == RAW else difference < 6


@BUILT
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_all_boxes_are_in_the_exact_part_of_their_rectangle(options: dict[str, object], tmp_path: Path) -> None:
    """Boxes of any width and position, in images of one or two blocks of columns."""
    sides = [(width, 9) for width in range(1, 36)]
    source = pack("folder", {f"a/{w:02}.jpeg": saved(noisy(w, h, w), **options) for w, h in sides}, tmp_path)
    prepare(str(source), tmp_path / "x.beton", Settings(), workers=1, quiet=True)
    beton = Beton(tmp_path / "x.beton")
    rng, records = np.random.default_rng(0), records_of(beton, np.arange(len(beton)))
    for _ in range(30):
        left = rng.integers(0, beton.widths)
        boxes = np.stack([0 * left + 2, left, 0 * left + 5, rng.integers(1, beton.widths - left + 1)], 1).astype("i4")
        for index, (top, first, height, width) in enumerate(rectangles(records, boxes[None]).tolist()):
            data, (_, at, _, columns) = beton.record(index).tobytes(), boxes[index].tolist()
            _, pixels = part(data, (9, int(beton.widths[index])), (top, first, height, width))
            expected = np.asarray(Image.open(io.BytesIO(data)))[top : top + height, at : at + columns]
            np.testing.assert_array_equal(pixels[:, at - first :][:, :columns], expected)


@BUILT
def test_the_rectangle_contains_all_boxes_and_little_more(tmp_path: Path) -> None:
    records = records_of(small_beton(tmp_path, Settings()), np.arange(4))
    assert rectangles(records, BOXES).tolist() == [PART] * 4
    at_the_edges = np.array([[[0, 0, 61, 1]] * 4, [[0, 96, 61, 1]] * 4], np.int32)
    assert rectangles(records, at_the_edges).tolist() == full_rectangles(records).tolist()


@BUILT
def test_a_jpeg_without_crc32_is_decoded_in_full(tmp_path: Path) -> None:
    """Otherwise damage outside the crops would be an error in some epochs only."""
    records = records_of(small_beton(tmp_path, Settings()), np.arange(4))._replace(crc32=np.zeros(0, np.uint32))
    assert rectangles(records, BOXES).tolist() == full_rectangles(records).tolist() == [[0, 0, 61, 97]] * 4
    raw = records._replace(modes=np.full(4, RAW, np.uint8))
    assert rectangles(raw, BOXES).tolist() == [PART] * 4
