"""Tests on real images: `MILLRACE_TEST_IMAGES` names a beton, tar or folder of at least 200."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.augment.color import augment
from pipeline.augment.draws import draw_view
from pipeline.backends import BACKENDS
from pipeline.beton import Beton
from pipeline.loader import Loader
from pipeline.storage.decode import decode
from pipeline.storage.in_place import open_data
from pipeline.views import AUGMENTATIONS
from tests.pipeline.augment.test_color import _pil_chain
from tests.pipeline.loading import LEVELS, PLAIN, pillow
from tests.pipeline.orders import epoch_order

IMAGES = os.environ.get("MILLRACE_TEST_IMAGES", "")
pytestmark = pytest.mark.skipif(not IMAGES, reason="MILLRACE_TEST_IMAGES is not set")
COUNT = 200


@pytest.fixture(scope="module")
def images() -> Beton:
    return open_data(IMAGES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_equal_pillow(backend: str, images: Beton) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"size": 224, "batch": COUNT, "backend": backend, "statistics": LEVELS, "device": device}
    loader = Loader(images, (PLAIN, PLAIN), **settings)  # type: ignore[arg-type]
    batch = next(iter(loader))
    views = [torch.clone(view).cpu().permute(0, 2, 3, 1).numpy() for view in batch.views if view is not None]
    loader.close()
    assert batch.ids.tolist() == epoch_order(0, 0, len(images))[:COUNT].tolist()
    gaps = []
    for index, view in enumerate(views):
        sides = {"heights": images.heights[batch.ids], "widths": images.widths[batch.ids]}
        drawn = draw_view(PLAIN, index, seed=0, epoch=0, ids=batch.ids, **sides)
        for row, sample in enumerate(batch.ids):
            expected = pillow(images, int(sample), drawn.boxes[row], 224)
            gaps.append(np.abs(view[row] - (expected[:, ::-1] if drawn.flips[row] else expected)))
    mean, square = float(np.mean(gaps)), float(np.square(gaps).mean())
    print(f"{backend}: mean {mean:.3f}, largest {np.max(gaps):.0f}, PSNR {10 * np.log10(255**2 / square):.1f} dB")
    assert mean <= (1 if backend == "ffcv" else 2)
    assert 10 * np.log10(255**2 / square) > 38


@pytest.mark.parametrize("name", ["moco_v2", "moco_v3"])
def test_augmented_views_equal_pillow(name: str, images: Beton) -> None:
    """Triton augments on a GPU, stepwise operations elsewhere."""
    size, ids = 96, np.arange(COUNT)
    crops = np.stack(
        [decode(images, int(index))[:size, :size] for index in ids if min(decode(images, int(index)).shape[:2]) >= size]
    )
    device, one = torch.device("cuda" if torch.cuda.is_available() else "cpu"), np.full(len(crops), size)
    view = replace(AUGMENTATIONS[name][1], solarize_p=0.2)
    color = draw_view(view, 1, seed=0, epoch=0, ids=ids[: len(crops)], heights=one, widths=one).color
    augmented = (
        augment(torch.from_numpy(crops).to(device), color, LEVELS, torch.float32).cpu().permute(0, 2, 3, 1).numpy()
    )
    gaps = [np.abs(augmented[i] - _pil_chain(crop, color, i)) for i, crop in enumerate(crops)]
    print(f"{name}: mean {np.mean(gaps):.2e}, largest {np.max(gaps):.2f}, of {len(crops)} images")
    assert len(crops) > COUNT / 2
    assert np.mean(gaps) <= 2
