"""Tests of crops for segmentation: pure draws, equality with PIL, the same batches with any number of ranks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.augment.color import IMAGENET, Statistics
from pipeline.dense.masks import Masked, open_masked
from pipeline.dense.scale_crops import Draw, ScaleCrops, crop, draw_crop
from pipeline.dense.scenes import scene, write
from pipeline.system.errors import InputError
from tests.pipeline.loading import LEVELS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Masked:
    """Seven scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "voc"
    write(folder, 7, 1, size=64)
    return open_masked(folder)


def test_draws_depend_on_seed_epoch_and_id_alone() -> None:
    first = draw_crop((90, 60), 65, seed=1, epoch=2, index=3)
    assert draw_crop((90, 60), 65, seed=1, epoch=2, index=3) == first
    for other in ({"seed": 2}, {"epoch": 3}, {"index": 4}):
        assert draw_crop((90, 60), 65, **({"seed": 1, "epoch": 2, "index": 3} | other)) != first


def test_scales_positions_and_flips_are_uniform() -> None:
    size = 100
    draws = [draw_crop((200, 200), size, seed=0, epoch=0, index=index) for index in range(4000)]
    scales = np.array([draw.height for draw in draws]) / 200
    assert (scales >= 0.5).all()
    assert (scales <= 2).all()
    assert np.quantile(scales, [0.25, 0.5, 0.75]) == pytest.approx([0.875, 1.25, 1.625], abs=0.05)
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.03)
    places = np.array([[draw.top, draw.left] for draw in draws]) / np.maximum(
        [[draw.height - size] for draw in draws], 1
    )
    assert ((places >= 0) & (places <= 1)).all()
    assert np.quantile(places, [0.25, 0.5, 0.75], axis=0) == pytest.approx(
        np.array([[0.25] * 2, [0.5] * 2, [0.75] * 2]), abs=0.05
    )
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.05
    small = [draw_crop((40, 30), size, seed=0, epoch=0, index=index) for index in range(1000)]
    assert all(draw.height - size <= draw.top <= 0 and draw.width - size <= draw.left <= 0 for draw in small)
    assert np.mean([draw.top / (draw.height - size) for draw in small]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "draw",
    [
        Draw(128, 128, 20, 31, False),
        Draw(96, 96, 31, 0, True),
        Draw(40, 40, -11, -25, True),
        Draw(64, 64, -1, 0, False),
        Draw(70, 60, 5, -5, False),
    ],
)
def test_crops_equal_those_of_the_scaled_image(draw: Draw) -> None:
    """Return the full image scaled by PIL, the mask by exact fractions, padded all round, cropped, mirrored."""
    drawn, size = scene(0, 3, 64), 65
    pixels, classes = crop((Image.fromarray(drawn.image), drawn.mask), draw, size)

    def expected(scaled: Image.Image, fill: int | tuple[int, ...]) -> np.ndarray:
        padded = ImageOps.expand(scaled, size, fill=fill)
        part = padded.crop((draw.left + size, draw.top + size, draw.left + 2 * size, draw.top + 2 * size))
        return np.asarray(ImageOps.mirror(part) if draw.flip else part)

    rows, columns = ([int(Fraction(2 * i + 1, 2) * 64 / n) for i in range(n)] for n in (draw.height, draw.width))
    assert (classes == expected(Image.fromarray(drawn.mask[rows][:, columns]), 255)).all()
    scaled = Image.fromarray(drawn.image).resize((draw.width, draw.height), Image.Resampling.BILINEAR)
    mean = tuple(round(255 * channel) for channel in IMAGENET.mean)
    different = np.abs(pixels.astype(int) - expected(scaled, mean))
    assert different[2:-2, 2:-2].max() <= 2  # the filter does not reach beyond the crop
    assert different.mean() < 0.3


def test_global_batches_do_not_depend_on_ranks_or_resuming(drawn: Masked) -> None:
    def crops(rank: int, world: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = ScaleCrops(drawn, size=49, batch=2, seed=4, rank=rank, world=world, workers=2)
        try:
            return list(loader.crops(first, last, torch.device("cpu")))
        finally:
            loader.close()

    single = crops(0, 1, 0, 8)
    assert len(single) == 8
    assert single[0][0].shape == (2, 3, 49, 49)
    assert single[0][0].is_contiguous(memory_format=torch.channels_last)
    for one, *parts in zip(single, crops(0, 2, 0, 8), crops(1, 2, 0, 8), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, map(torch.cat, zip(*parts, strict=True)), strict=True))
    for one, again in zip(single[5:], crops(0, 1, 5, 8), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, again, strict=True))


def test_crops_are_padded_and_normalized_by_the_given_mean(drawn: Masked) -> None:
    image = Image.fromarray(scene(0, 3, 64).image)
    statistics = Statistics((0.2, 0.4, 0.6), (1.0, 1.0, 1.0))
    pixels, _ = crop((image, np.zeros((64, 64), np.uint8)), Draw(40, 40, -11, -25, False), 65, statistics)
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [51, 102, 153]
    batches = []
    for chosen in (IMAGENET, LEVELS):
        crops = ScaleCrops(drawn, size=150, batch=6, seed=4, workers=1, statistics=chosen)
        (images, _), *_ = crops.crops(0, 1, torch.device("cpu"))
        crops.close()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in chosen)
        batches.append((images * std + mean) * 255)
    by_imagenet, levels = batches
    assert (levels - levels.round()).abs().max() < 1e-3
    assert ((by_imagenet - levels).abs() < 0.01)[levels > 0.5].all()
    assert by_imagenet[levels < 0.5].mean() > 100  # padded


def test_an_epoch_has_full_batches_of_distinct_images(drawn: Masked) -> None:
    loader = ScaleCrops(drawn, size=49, batch=2, seed=4, workers=1)
    epochs = [np.concatenate([loader.ids(step) for step in range(at, at + 3)]).tolist() for at in (0, 3)]
    loader.close()
    assert loader.steps == 3
    assert all(len(set(ids)) == 6 for ids in epochs)
    assert epochs[0] != epochs[1]


def test_a_damaged_image_is_named(drawn: Masked, tmp_path: Path) -> None:
    folder = tmp_path / "voc"
    write(folder, 2, 1, size=64)
    image = folder / "JPEGImages" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:700])
    loader = ScaleCrops(open_masked(folder), size=49, batch=2, workers=1)
    with pytest.raises(InputError, match=r"000002.jpg: cannot be decoded"):
        next(loader.batches(0, 1))
    loader.close()
    with pytest.raises(InputError, match="a batch of 3 from 2 images"):
        ScaleCrops(open_masked(folder), size=49, batch=3)
