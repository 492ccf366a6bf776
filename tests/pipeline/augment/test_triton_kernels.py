"""Tests of the Triton kernels, without a GPU by Triton's interpreter, against compiled code and stepwise operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment.color import IMAGENET, Statistics, fused, stepwise
from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.draws import draw_view
from pipeline.augment.plan import Plan
from pipeline.views import AUGMENTATIONS, changed_views
from tests.pipeline.augment.test_color import CHANGES

pytest.importorskip("triton")
from pipeline.augment import triton_kernels

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [16, 7])
def test_crops_equal_compiled_ones_to_one_level(size: int) -> None:
    rng = np.random.default_rng(size)
    shapes = [(int(h), int(w)) for h, w in rng.integers(1, 60, (8, 2))] + [(16, 16), (1, 1), (90, 30)]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    starts = np.cumsum([0] + [image.size for image in images])[:-1].astype(np.int64)
    boxes = np.zeros((1, len(images), 4), np.int32)
    for i, (h, w) in enumerate(shapes):
        height, width = rng.integers(1, h + 1), rng.integers(1, w + 1)
        boxes[0, i] = rng.integers(0, h - height + 1), rng.integers(0, w - width + 1), height, width
    boxes[0, -3] = 0, 0, 16, 16
    flips = (np.arange(len(images), dtype=np.uint8) % 4)[None]
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images]))
    widths = np.array([w for _, w in shapes], np.int64)
    plan = Plan(np.arange(len(images)), boxes, flips, (size,))
    (expected,) = crop_views(Ragged(pixels, starts, widths), plan)
    arguments = [torch.from_numpy(a).to(DEVICE) for a in (starts, widths, boxes[0], flips[0])]
    result = triton_kernels.crop_view(pixels.to(DEVICE), *arguments, size).cpu()
    difference = (result.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert expected.float().std() > 10


@pytest.mark.parametrize(
    ("name", "view"),
    [
        *(("moco_v3", 0), ("moco_v3", 1), ("simclr", 1)),
        *(pytest.param("moco_v1", view, marks=pytest.mark.slow) for view in (0, 1)),
        *(pytest.param("moco_v2", view, marks=pytest.mark.slow) for view in (0, 1)),
        pytest.param("simclr", 0, marks=pytest.mark.slow),
    ],
)
def test_fused_augmentation_equals_stepwise(name: str, view: int) -> None:
    """Equal except for rounding in the blur, whose sums have another order."""
    rng = np.random.default_rng(view)
    batch, size = 12, 18
    crops = torch.from_numpy(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)).to(DEVICE)
    one = np.full(batch, 64)
    drawn = draw_view(AUGMENTATIONS[name][view], view, seed=1, epoch=0, ids=np.arange(batch), heights=one, widths=one)
    expected = stepwise(crops, drawn.color, IMAGENET, torch.float32)
    result = fused(crops, drawn.color, IMAGENET, torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    levels = (result - expected).abs() * (torch.tensor(IMAGENET.std, device=DEVICE).view(3, 1, 1) * 255)
    assert levels.max() < 1.01
    assert (levels > 0.01).float().mean() < 1e-3
    sharp = torch.from_numpy(~drawn.color.blur)
    assert torch.equal(result[sharp], expected[sharp])


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_changed_views_equal_stepwise(changes: dict[str, Any]) -> None:
    """By other statistics than ImageNet's; one level of 255 is 1 / 255 / std."""
    (view,) = changed_views([changes], "moco_v2")
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)).to(DEVICE)
    one, statistics = np.full(6, 64), Statistics((0.1, 0.5, 0.9), (0.5, 0.5, 0.5))
    color = draw_view(view, 0, seed=1, epoch=0, ids=np.arange(6), heights=one, widths=one).color
    expected, result = (f(crops, color, statistics, torch.float32) for f in (stepwise, fused))
    assert (result - expected).abs().max() < 1.01 / 255 / 0.5
    sharp = torch.from_numpy(~color.blur)
    assert torch.equal(result[sharp], expected[sharp])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_have_the_requested_type(dtype: torch.dtype) -> None:
    """The tolerance is a unit in the last place: the interpreter truncates to bfloat16 where a GPU rounds."""
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)).to(DEVICE)
    one = np.full(6, 64)
    drawn = draw_view(AUGMENTATIONS["moco_v2"][0], 0, seed=1, epoch=0, ids=np.arange(6), heights=one, widths=one)
    exact = fused(crops, drawn.color, IMAGENET, torch.float32)
    result = fused(crops, drawn.color, IMAGENET, dtype)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(2**-6)
    assert ((result.float() - exact).abs() <= unit).all()
