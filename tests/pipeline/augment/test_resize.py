"""Tests of the compiled crop and resize against Pillow, for every number of filter taps, and of its memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.augment.resize import Scratch, crop_resize, scratch

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, left, height, width."""

_SIZES = [8, 32, 96, 224]
_HEIGHT, _WIDTH = 400, 500


def _noise() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8)


def _waves() -> Pixels:
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    planes = [127.5 + 127.5 * np.sin(x / (20 + 9 * channel) + y / 31 + channel) for channel in range(3)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def _black_and_white() -> Pixels:
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    return np.repeat((255 * ((x // 3 + y // 3) % 2)).astype(np.uint8)[..., None], 3, axis=-1)


_IMAGES: dict[str, Callable[[], Pixels]] = {"noise": _noise, "waves": _waves, "black and white": _black_and_white}


def _resize(image: Pixels, box: Box, size: int, flips: int = 0, buffers: Scratch | None = None) -> Pixels:
    out = np.zeros((size, size, 3), np.uint8)
    flat = np.ascontiguousarray(image).reshape(-1)
    buffers = buffers or scratch((size,), max(image.shape))
    crop_resize(flat, image.shape[1], np.array(box, np.int32), np.uint8(flips), out, buffers)
    return out


def _pillow(image: Pixels, box: Box, size: int) -> Pixels:
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


def _off(a: Pixels, b: Pixels) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def _boxes(count: int, seed: int) -> list[Box]:
    """Boxes of 1x1 to 400x500 pixels, sides drawn log-uniformly."""
    rng = np.random.default_rng(seed)
    boxes = []
    for _ in range(count):
        height, width = (int(np.exp(rng.uniform(0, np.log(side + 0.99)))) for side in (_HEIGHT, _WIDTH))
        top, left = int(rng.integers(0, _HEIGHT - height + 1)), int(rng.integers(0, _WIDTH - width + 1))
        boxes.append((top, left, height, width))
    return boxes


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("name", _IMAGES)
def test_random_boxes_equal_pillow_to_one_level(name: str, size: int) -> None:
    image, buffers = _IMAGES[name](), scratch((size,), _WIDTH)
    for number, box in enumerate(_boxes(40, seed=size)):
        assert _off(_resize(image, box, size, buffers=buffers), _pillow(image, box, size)) <= 1, (number, box)


@pytest.mark.parametrize("side", range(1, 17))
def test_every_number_of_taps_equals_pillow_to_one_level(side: int) -> None:
    """Ratios of 1 to 16 in steps of a half, along either axis: 1 to 33 taps, so that every pass is used."""
    size = 24
    image = _noise()
    for length in (side * size, side * size + size // 2):
        for box in ((3, 5, 30, min(length, 495)), (1, 0, min(length, 399), 50)):
            assert _off(_resize(image, box, size), _pillow(image, box, size)) <= 1, box


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 224])
@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (399, 499, 1, 1), (0, 0, 1, 500), (0, 499, 400, 1), (398, 498, 2, 2), (0, 0, 400, 500)]
)
def test_extreme_boxes_equal_pillow_to_one_level(box: Box, size: int) -> None:
    image = _noise()
    assert _off(_resize(image, box, size), _pillow(image, box, size)) <= 1


@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("name", _IMAGES)
def test_flipped_crops_equal_pillow(name: str, size: int) -> None:
    """1: horizontally, 2: vertically, 3: both."""
    image, buffers = _IMAGES[name](), scratch((size,), _WIDTH)
    for box in _boxes(20, seed=1000 + size):
        for flips, turned in ((1, np.s_[:, ::-1]), (2, np.s_[::-1]), (3, np.s_[::-1, ::-1])):
            flipped = _resize(image, box, size, flips, buffers)
            assert _off(flipped, _pillow(image, box, size)[turned]) <= 1, box
            assert np.array_equal(flipped, _resize(image, box, size, buffers=buffers)[turned]), box


@pytest.mark.parametrize("name", _IMAGES)
def test_differences_from_pillow_have_no_bias(name: str) -> None:
    image = _IMAGES[name]()
    gaps = [_resize(image, box, 96).astype(int) - _pillow(image, box, 96).astype(int) for box in _boxes(20, seed=3)]
    assert abs(np.mean(gaps)) < 0.02


@pytest.mark.parametrize("side", [1, 8, 96, 131])
def test_an_image_at_its_size_is_unchanged(side: int) -> None:
    image = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    assert np.array_equal(_resize(image, (0, 0, side, side), side), image)
    assert np.array_equal(_resize(image, (0, 0, side, side), side, flips=1), image[:, ::-1])


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_uniform_image_remains_uniform(level: int) -> None:
    image = np.full((_HEIGHT, _WIDTH, 3), level, np.uint8)
    for size in _SIZES:
        for box in _boxes(10, seed=level):
            assert set(np.unique(_resize(image, box, size)).tolist()) == {level}


@pytest.mark.parametrize("flips", range(4))
def test_only_the_crop_is_read(flips: int) -> None:
    image = _noise()
    for box in _boxes(30, seed=9):
        top, left, height, width = box
        other = np.full_like(image, 255)
        other[top : top + height, left : left + width] = image[top : top + height, left : left + width]
        assert np.array_equal(_resize(image, box, 32, flips), _resize(other, box, 32, flips))


@pytest.mark.parametrize("size", _SIZES)
def test_only_the_output_is_written(size: int) -> None:
    image, buffers, guard = _noise().reshape(-1), scratch((size,), _WIDTH), 4096
    for number, box in enumerate(_boxes(20, seed=size + 7)):
        buffer = np.full(3 * size * size + 2 * guard, 0xA5, np.uint8)
        out = buffer[guard:-guard].reshape(size, size, 3)
        crop_resize(image, _WIDTH, np.array(box, np.int32), np.uint8(number % 4), out, buffers)
        assert (buffer[:guard] == 0xA5).all()
        assert (buffer[-guard:] == 0xA5).all()


@pytest.mark.parametrize("size", _SIZES)
def test_buffers_are_never_overrun(size: int) -> None:
    """Each buffer is between guards; the widest crop has the most taps."""
    guarded, memory = [], []
    for part in scratch((size,), _WIDTH):
        rows = np.full((part.shape[0] + 8, *part.shape[1:]), 77, part.dtype)
        rows[4:-4] = part
        memory.append(rows)
        guarded.append(rows[4:-4])
    for box in [(0, 0, _HEIGHT, _WIDTH), (0, 0, 1, _WIDTH), (0, 0, _HEIGHT, 1), *_boxes(10, seed=2)]:
        _resize(_noise(), box, size, buffers=Scratch(*guarded))
    for rows in memory:
        assert (rows[:4] == 77).all()
        assert (rows[-4:] == 77).all()


def test_used_buffers_do_not_change_the_result() -> None:
    image, size = _noise(), 32
    buffers = scratch((size,), _WIDTH)
    boxes = _boxes(30, seed=4)
    for box in boxes + boxes[::-1]:
        assert np.array_equal(_resize(image, box, size, buffers=buffers), _resize(image, box, size))


def test_rows_of_an_odd_width_are_addressed_right() -> None:
    image = np.random.default_rng(2).integers(0, 256, (37, 41, 3), np.uint8)
    for box in ((0, 0, 37, 41), (36, 0, 1, 41), (5, 7, 11, 13), (0, 40, 37, 1)):
        assert _off(_resize(image, box, 16), _pillow(image, box, 16)) <= 1
