"""Tests of the compiled augmentation: equal in every bit to the batched operations."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment.color import IMAGENET, Statistics, compiled, normalize, packed, stepwise
from pipeline.augment.cpu_kernels import augment_into, color_scratch
from pipeline.augment.draws import Color, draw_view
from pipeline.views import View
from tests.pipeline.augment.test_color import _color
from tests.pipeline.loading import LEVELS

pytestmark = pytest.mark.usefixtures("one_torch_thread")
STRONG = {"jitter_p": 0.9, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.5}
LIKELY: dict[str, Any] = {"gray_p": 0.3, "blur_p": 0.6, "solarize_p": 0.4}
N = 24


def _noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(shape[0]).integers(0, 256, (*shape, 3), np.uint8))


def _drawn(n: int, **chosen: Any) -> Color:
    sides = np.full(n, 64)
    return draw_view(View(**chosen), 0, seed=7, epoch=0, ids=np.arange(n), heights=sides, widths=sides).color


def _assert_equal(
    crops: torch.Tensor, color: Color, statistics: Statistics = LEVELS, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    views, expected = (f(crops, color, statistics, dtype) for f in (compiled, stepwise))
    assert torch.equal(views, expected)
    assert views.dtype == dtype
    assert views.stride() == expected.stride()
    return views


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("n", [1, 12])
def test_each_jitter_operation(operation: int, n: int) -> None:
    """Applied four times, so that it meets its own results; also to images of one level, of 0 and of 255."""
    images = torch.cat(
        [_noise(n, 9, 9), *(torch.full((1, 9, 9, 3), level, dtype=torch.uint8) for level in (0, 9, 255))]
    )
    color = _drawn(n + 3, **STRONG | {"jitter_p": 1.0})
    only = np.full((n + 3, 4), operation)
    views = _assert_equal(
        images, Color(**{**vars(color), "order": only, "gray": color.gray & False, "blur": color.blur & False})
    )
    assert not torch.equal(views[:n], images[:n].permute(0, 3, 1, 2).float())


def test_every_order_of_the_jitter() -> None:
    orders = np.array(list(itertools.permutations(range(4))))
    color = _drawn(24, **STRONG | {"jitter_p": 1.0, "gray_p": 0.0, "blur_p": 0.0})
    _assert_equal(_noise(24, 8, 8), Color(**{**vars(color), "order": orders}))


@pytest.mark.parametrize("operation", ["gray", "blur", "solarize"])
def test_each_other_operation(operation: str) -> None:
    on, sigma = np.ones(N, bool), np.linspace(0.1, 2.0, N, dtype=np.float32)
    images = _noise(N, 17, 17)
    views = _assert_equal(images, _color(N, sigma=sigma, **{operation: on}))
    assert not torch.equal(views, images.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gray_first", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 15, 33, 64])
def test_all_operations_together(size: int, gray_first: bool, dtype: torch.dtype) -> None:
    color = _drawn(N, **STRONG, **LIKELY, gray_first=gray_first)
    assert _assert_equal(_noise(N, size, size), color, IMAGENET, dtype).isfinite().all()


def test_the_mean_of_a_million_pixels_is_exact() -> None:
    """Half of the pixels but one are lighter by one level: a float32 mean rounds up."""
    images = torch.full((1, 1000 * 1000, 3), 200, dtype=torch.uint8)
    images[:, : 500_000 - 1] = 201
    on, only = np.ones(1, bool), np.ones((1, 4), np.int64)
    color = _color(1, jitter=on, order=only, contrast=np.full(1, 0.5, np.float32))
    assert _assert_equal(images.view(1, 1000, 1000, 3), color).max() == 200


@pytest.mark.parametrize("shift", [-0.5, 0.25, pytest.param(0.1, marks=pytest.mark.slow)])
def test_hue_of_the_color_cube(shift: float) -> None:
    """All 2^24 colors where slow, else an eighth of them."""
    levels = np.arange(0, 256, 1 if shift == 0.1 else 2, dtype=np.uint8)
    on, only = np.ones(1, bool), np.full((1, 4), 3)
    for red in levels:
        plane = np.stack(np.broadcast_arrays(red, levels[:, None], levels[None]), axis=-1)
        turns = np.full(1, shift / 4, np.float32)  # applied four times
        _assert_equal(torch.from_numpy(plane[None]), _color(1, jitter=on, order=only, hue=turns))


def test_normalized_images_need_not_be_squares() -> None:
    images = _noise(3, 5, 11)
    expected = stepwise(images, Color.unchanged(3), IMAGENET, torch.bfloat16)
    assert torch.equal(normalize(images, IMAGENET, torch.bfloat16), expected)


def test_views_do_not_depend_on_the_batch_or_the_memory_layout() -> None:
    images, color = _noise(N, 16, 16), _drawn(N, **STRONG, **LIKELY)
    together = _assert_equal(images, color)
    for i in range(N):
        alone = Color(**{name: value[i : i + 1] for name, value in vars(color).items() if np.ndim(value)})
        assert torch.equal(compiled(images[i : i + 1], alone, LEVELS, torch.float32)[0], together[i])
    planes = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(compiled(planes, color, LEVELS, torch.float32), together)
    assert compiled(images[:0], Color.unchanged(0), LEVELS, torch.float32).shape == (0, 3, 16, 16)


def test_two_threads_fill_one_batch() -> None:
    n, size = 64, 48
    images, color = _noise(n, size, size), _drawn(n, **STRONG, **LIKELY)
    color_rows, views = packed(color, size, LEVELS, torch.float32), torch.zeros(n, size, size, 3)

    def fill(part: slice, scratch: Any) -> None:
        for _ in range(5):
            augment_into(views, part, images[part].numpy(), color_rows, scratch)

    with ThreadPoolExecutor(2) as pool:
        halves = slice(0, n // 2), slice(n // 2, n)
        for future in [pool.submit(fill, part, color_scratch(size, size)) for part in halves]:
            future.result()
    assert torch.equal(views.permute(0, 3, 1, 2), stepwise(images, color, LEVELS, torch.float32))
