"""Plain torch versions of torchvision's compiled operators, for a torchvision built for another torch.

Only those that detectors need, and slow: non-maximum suppression in a loop, and pooling of regions from a grid of 2 x 2
samples a cell.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

_NAMES = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "nms", "qnms", "qroi_align", "deform_conv2d")
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
}
_libraries: list[torch.library.Library] = []


def torchvision_or_skip() -> Any:
    """Return torchvision with operators; skip the test if it is not installed."""
    if not _libraries and not _imports():
        _register_operators()
    return pytest.importorskip("torchvision", exc_type=ImportError)


def _imports() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # its operators are missing
        return False
    except ImportError:
        pass
    return True


def _register_operators() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # left by the failed import
    library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        for operator in (name, f"_{name}_backward"):
            library.define(_SCHEMAS.get(operator, f"{operator}(Tensor x) -> Tensor"))
    library.impl("nms", _nms, "CPU")
    library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    _libraries.append(library)
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
    torchvision.ops.roi_align.__globals__["_has_ops"] = lambda: True


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the indices of boxes without a more confident overlapping one, most confident first."""
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    selected = []
    while len(order):
        best, order = order[0], order[1:]
        selected.append(best)
        sides = torch.minimum(boxes[order, 2:], boxes[best, 2:]) - torch.maximum(boxes[order, :2], boxes[best, :2])
        intersection = sides.clamp(min=0).prod(dim=1)
        order = order[intersection / (areas[order] + areas[best] - intersection) <= threshold]
    return torch.stack(selected) if selected else torch.zeros(0, dtype=torch.int64)


def _roi_align(
    maps: torch.Tensor, regions: torch.Tensor, scale: float, high: int, wide: int, ratio: int, aligned: bool
) -> torch.Tensor:
    """Pool regions [R, 5] (image, left, top, right, bottom) to [R, C, high, wide]."""
    shift = 0.5 if aligned else 0.0
    low, up = regions[:, 1:3] * scale - shift, regions[:, 3:5] * scale - shift
    at = [(torch.arange(2 * cells) + 0.5) / (2 * cells) for cells in (wide, high)]
    x, y = (low[:, i, None] + at[i] * (up - low)[:, i, None] for i in range(2))  # [R, samples]
    height, width = maps.shape[2:]
    grid = torch.stack(
        [
            (2 * x[:, None, :] / max(width - 1, 1) - 1).expand(-1, 2 * high, -1),
            (2 * y[:, :, None] / max(height - 1, 1) - 1).expand(-1, -1, 2 * wide),
        ],
        dim=-1,
    )
    sampled = maps.new_zeros(len(regions), maps.shape[1], 2 * high, 2 * wide)
    for image in range(len(maps)):
        of_image = regions[:, 0] == image
        if of_image.any():
            image_maps = maps[image : image + 1].expand(int(of_image.sum()), -1, -1, -1)
            sampled = sampled.index_put(
                (of_image.nonzero()[:, 0],),
                F.grid_sample(image_maps, grid[of_image].to(maps.dtype), padding_mode="border", align_corners=True),
            )
    return F.avg_pool2d(sampled, 2)
