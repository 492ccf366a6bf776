"""Small loaders for tests, and the comparison of their batches."""

from __future__ import annotations

import io
import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.augment.color import Statistics
from pipeline.beton import Beton
from pipeline.beton_format import JPEG
from pipeline.loader import Batch, Loader
from pipeline.views import AUGMENTATIONS, View

SIZE, BATCH = 16, 32
PLAIN = View(jitter_p=0.0, gray_p=0.0, blur_p=0.0)
LEVELS = Statistics((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # leaves the levels 0..255 unchanged


def small_loader(path: Path, backend: str = "ffcv", **options: Any) -> Any:
    """Return a context manager of a small loader, which it closes."""
    chosen = {"size": SIZE, "batch": BATCH, "workers": 1, "seed": 3} | options
    views = chosen.pop("views", AUGMENTATIONS["moco_v2"])
    return closing(Loader(Beton(path), views, backend=backend, **chosen))


def take(loader: Loader, count: int) -> list[Batch]:
    """Return the next batches, over epochs."""
    return list(itertools.islice(loader.endless(), count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    """Return whether the batches are equal bit for bit."""
    return len(a) == len(b) and all(
        (x.epoch, x.step, x.ids.tolist()) == (y.epoch, y.step, y.ids.tolist())
        and all(torch.equal(v, w) for v, w in zip(x.views, y.views, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def pillow(beton: Beton, index: int, box: np.ndarray, size: int) -> np.ndarray:
    """Return the crop of a record as PIL decodes, crops and resizes it."""
    record = beton.record(index).tobytes()
    if beton.modes[index] == JPEG:
        image = Image.open(io.BytesIO(record)).convert("RGB")
    else:
        image = Image.frombytes("RGB", (int(beton.widths[index]), int(beton.heights[index])), record)
    top, left, height, width = (int(value) for value in box)
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
