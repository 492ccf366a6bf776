"""Tests of the synthetic images: pure, balanced, and with classes that color and raw pixels do not reveal."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.sources import synthetic

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _many(start: int, count: int) -> tuple[Images, npt.NDArray[np.int64]]:
    pairs = [synthetic.draw(0, index) for index in range(start, start + count)]
    return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])


@pytest.fixture(scope="module")
def train() -> tuple[Images, npt.NDArray[np.int64]]:
    return _many(0, 2000)


@pytest.fixture(scope="module")
def test() -> tuple[Images, npt.NDArray[np.int64]]:
    return _many(100_000, 500)


def _neighbor_accuracy(
    train: Floats,
    train_labels: npt.NDArray[np.int64],
    test: Floats,
    test_labels: npt.NDArray[np.int64],
    k: int = 20,
) -> float:
    """Return the share of test rows whose k most similar training rows (cosine) vote for the right label."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    near = np.argpartition(-(test @ train.T), k, axis=1)[:, :k]
    votes = (train_labels[near][..., None] == np.arange(10)).sum(axis=1)
    return float((votes.argmax(axis=1) == test_labels).mean())


def test_draw_returns_rgb_and_label() -> None:
    for size in (16, 33, 48, 96):
        image, label = synthetic.draw(5, 27, size)
        assert image.dtype == np.uint8
        assert image.shape == (size, size, 3)
        assert label == 7


def test_same_arguments_give_same_bytes_in_any_order() -> None:
    indices = list(range(40))
    forward = [synthetic.jpeg(3, index) for index in indices]
    backward = [synthetic.jpeg(3, index) for index in reversed(indices)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda index: synthetic.jpeg(3, index), indices))
    assert forward == backward[::-1] == threaded


def test_same_bytes_in_another_process() -> None:
    code = "import zlib; from pipeline.sources.synthetic import draw; print(zlib.crc32(draw(9, 123)[0].tobytes()))"
    root = Path(synthetic.__file__).resolve().parents[2]
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=root) for _ in range(2)]
    assert runs[0] == runs[1]


def test_another_index_or_seed_gives_another_image() -> None:
    images = {synthetic.draw(seed, index)[0].tobytes() for seed in range(4) for index in range(0, 500, 10)}
    assert len(images) == 200
    assert not np.array_equal(synthetic.draw(0, 10)[0], synthetic.draw(10, 0)[0])


def test_all_bits_of_seed_and_index_count() -> None:
    base = synthetic.draw(0, 0)[0]
    for seed, index in ((2**32, 0), (2**63, 0), (0, 10 * 2**40), (2**64 - 1, 2**64 - 1)):
        assert not np.array_equal(base, synthetic.draw(seed, index)[0])


def test_images_are_the_same_in_every_version() -> None:
    """Mean lightness of nine parts of an image: a change means that every data set changes."""
    parts = synthetic.draw(1, 2)[0].reshape(3, 16, 3, 16, 3).mean(axis=(1, 3, 4))
    np.testing.assert_allclose(parts, [[135.9, 119.2, 130.9], [126.8, 135.4, 119.0], [114.9, 120.4, 110.0]], atol=0.2)


def test_labels_are_balanced(train: tuple[Images, npt.NDArray[np.int64]]) -> None:
    assert len(synthetic.CLASSES) == len(set(synthetic.CLASSES)) == 10
    assert np.bincount(train[1], minlength=10).tolist() == [200] * 10


@pytest.mark.parametrize("label", range(10), ids=synthetic.CLASSES)
@pytest.mark.parametrize("size", [16, 48])
def test_every_class_draws_two_tones(label: int, size: int) -> None:
    for index in range(label, 200, 10):
        image, drawn = synthetic.draw(1, index, size)
        assert drawn == label
        assert np.ptp(np.percentile(image.mean(axis=2), [10, 90])) > 25


def test_fields_differ_between_classes() -> None:
    line = np.linspace(-2.0, 2.0, 64, dtype=np.float32)
    masks = []
    for field in synthetic._FIELDS.values():
        values = field(line[None, :] + 0 * line[:, None], line[:, None] + 0 * line[None, :])
        masks.append(values < np.median(values))
    for first in range(10):
        for second in range(first):
            assert (masks[first] != masks[second]).mean() > 0.1, (first, second)


def test_jpeg_decodes_to_the_drawn_image() -> None:
    drawn, label = synthetic.draw(2, 14)
    with Image.open(io.BytesIO(synthetic.jpeg(2, 14))) as picture:
        assert picture.format == "JPEG"
        decoded = np.asarray(picture.convert("RGB"))
    assert label == 4
    assert np.abs(decoded.astype(int) - drawn.astype(int)).mean() < 12


def test_mean_color_does_not_reveal_the_class(train: tuple[Images, npt.NDArray[np.int64]]) -> None:
    """Class means and spreads of the mean color lie within 4.5 standard errors of the common ones."""
    images, labels = train
    color = images.mean(axis=(1, 2))
    center, spread = color.mean(axis=0), color.std(axis=0)
    for label in range(10):
        of_class = color[labels == label]
        assert np.all(np.abs(of_class.mean(axis=0) - center) < 4.5 * spread / np.sqrt(len(of_class)))
        assert np.all(np.abs(of_class.std(axis=0) / spread - 1.0) < 4.5 / np.sqrt(2 * len(of_class)))


def test_color_histogram_neighbors_are_near_chance(
    train: tuple[Images, npt.NDArray[np.int64]], test: tuple[Images, npt.NDArray[np.int64]]
) -> None:
    def histogram(images: Images) -> Floats:
        cell = (images >> 5).reshape(len(images), -1, 3).astype(np.int64) @ np.array([64, 8, 1])
        return np.sqrt(np.stack([np.bincount(row, minlength=512) for row in cell])).astype(np.float32)

    assert _neighbor_accuracy(histogram(train[0]), train[1], histogram(test[0]), test[1]) < 0.16


def test_raw_pixel_neighbors_stay_below_three_in_ten(
    train: tuple[Images, npt.NDArray[np.int64]], test: tuple[Images, npt.NDArray[np.int64]]
) -> None:
    def pixels(images: Images) -> Floats:
        halved: Floats = images.reshape(len(images), 24, 2, 24, 2, 3).mean(axis=(2, 4), dtype=np.float32)
        return halved.reshape(len(images), -1)

    center = pixels(train[0]).mean(axis=0)
    assert _neighbor_accuracy(pixels(train[0]) - center, train[1], pixels(test[0]) - center, test[1]) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 15}, "size is 15 pixels: choose 16 or more"),
        ({"index": -1}, "index is -1: choose a whole number from 0"),
        ({"seed": -3}, "seed is -3: choose a whole number from 0"),
        ({"index": 2**64}, "index is 18446744073709551616: choose"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        synthetic.draw(**{"seed": 0, "index": 0, **arguments})
    assert "\n" not in str(caught.value)
