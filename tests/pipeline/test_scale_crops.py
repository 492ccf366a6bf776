"""Crops for segmentation: pure draws, crops against PIL's own way round, the same batches on any number of ranks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from pipeline.augment import IMAGENET
from pipeline.errors import InputError
from pipeline.masks import Masked, open_masked
from pipeline.scale_crops import Draw, ScaleCrops, crop, draw_crops
from pipeline.scenes import scene, write

SHAPES = np.array([[60, 90], [333, 500], [20, 31], [513, 513]] * 50)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Masked:
    """Seven scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "voc"
    write(folder, 7, 1, size=64, quiet=True)
    return open_masked(folder)


def test_draws_depend_on_seed_epoch_and_id_alone() -> None:
    ids = np.arange(200)
    all_of_them = draw_crops(SHAPES, 65, seed=1, epoch=2, ids=ids)
    some = np.array([150, 3, 77])
    assert draw_crops(SHAPES[some], 65, seed=1, epoch=2, ids=some) == [all_of_them[i] for i in some]
    assert draw_crops(SHAPES, 65, seed=1, epoch=3, ids=ids) != all_of_them
    assert draw_crops(SHAPES, 65, seed=2, epoch=2, ids=ids) != all_of_them


def test_scales_places_and_flips_are_spread_evenly() -> None:
    shapes, size = np.full((4000, 2), 200), 100
    draws = draw_crops(shapes, size, seed=0, epoch=0, ids=np.arange(4000))
    scales = np.array([draw.height for draw in draws]) / 200
    assert (scales >= 0.5).all()
    assert (scales <= 2).all()
    assert np.quantile(scales, [0.25, 0.5, 0.75]) == pytest.approx([0.875, 1.25, 1.625], abs=0.05)
    assert np.mean([draw.flip for draw in draws]) == pytest.approx(0.5, abs=0.03)
    for first in ("top", "left"):
        places = np.array([getattr(draw, first) / max(draw.height - size, 1) for draw in draws])
        assert ((places >= 0) & (places <= 1)).all()
        assert np.quantile(places, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.05)
    assert abs(np.corrcoef([draw.top for draw in draws], [draw.left for draw in draws])[0, 1]) < 0.75  # but by scale


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
def test_crops_are_those_of_the_scaled_image(draw: Draw) -> None:
    """The whole image scaled by PIL, the mask by exact fractions, padded all round, cropped, mirrored."""
    drawn, size = scene(0, 3, 64), 65
    pixels, classes = crop((Image.fromarray(drawn.image), drawn.mask), draw, size)

    def expected(scaled: Image.Image, fill: int | tuple[int, ...]) -> np.ndarray:
        whole = ImageOps.expand(scaled, size, fill=fill)
        part = whole.crop((draw.left + size, draw.top + size, draw.left + 2 * size, draw.top + 2 * size))
        return np.asarray(ImageOps.mirror(part) if draw.flip else part)

    rows, columns = ([int(Fraction(2 * i + 1, 2) * 64 / n) for i in range(n)] for n in (draw.height, draw.width))
    assert (classes == expected(Image.fromarray(drawn.mask[rows][:, columns]), 255)).all()
    scaled = Image.fromarray(drawn.image).resize((draw.width, draw.height), Image.Resampling.BILINEAR)
    mean = tuple(round(255 * channel) for channel in IMAGENET.mean)
    different = np.abs(pixels.astype(int) - expected(scaled, mean))
    assert different[2:-2, 2:-2].max() <= 2  # the filter does not reach beyond the crop
    assert different.mean() < 0.3


def test_global_batches_are_the_same_on_any_number_of_ranks_and_after_a_resume(drawn: Masked) -> None:
    def crops(rank: int, world: int, first: int, last: int) -> list[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        loader = ScaleCrops(drawn, size=49, batch=2, seed=4, rank=rank, world=world, workers=2)
        try:
            return [(one.images, one.masks, one.ids) for one in loader.batches(first, last)]
        finally:
            loader.close()

    whole = crops(0, 1, 0, 8)
    assert len(whole) == 8
    assert whole[0][0].shape == (2, 3, 49, 49)
    assert sorted(np.concatenate([ids for _, _, ids in whole[:3]]).tolist()) != sorted(range(6))  # one is left out
    assert len(set(np.concatenate([ids for _, _, ids in whole[:3]]).tolist())) == 6
    first, second = crops(0, 2, 0, 8), crops(1, 2, 0, 8)
    for one, left, right in zip(whole, first, second, strict=True):
        for part in range(2):
            assert torch.equal(one[part], torch.cat([left[part], right[part]]))
        assert (one[2] == np.concatenate([left[2], right[2]])).all()
    for one, again in zip(whole[5:], crops(0, 1, 5, 8), strict=True):
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])


def test_a_damaged_image_is_named(drawn: Masked, tmp_path: Path) -> None:
    folder = tmp_path / "voc"
    write(folder, 2, 1, size=64, quiet=True)
    image = folder / "JPEGImages" / "000002.jpg"
    image.write_bytes(image.read_bytes()[:700])
    loader = ScaleCrops(open_masked(folder), size=49, batch=2, workers=1)
    with pytest.raises(InputError, match=r"000002.jpg: cannot be decoded"):
        next(loader.batches(0, 1))
    loader.close()
    with pytest.raises(InputError, match="a batch of 3 from 2 images"):
        ScaleCrops(open_masked(folder), size=49, batch=3)
