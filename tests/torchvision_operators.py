"""torchvision without its compiled operators, as where its wheel is for another build of torch: plain ones stand in.

Only what detectors need, and slow: overlapping boxes are weeded out in a loop, and regions are pooled from a grid of
2 x 2 samples a cell.
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
    """Return the library, with operators; skip the test where it is not installed."""
    if not _libraries and not _whole():
        _stand_in()
    return pytest.importorskip("torchvision", exc_type=ImportError)


def _whole() -> bool:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # it asks for operators that are not there
        return False
    except ImportError:
        pass
    return True


def _stand_in() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # what a failed import left
    library = torch.library.Library("torchvision", "DEF")
    for name in _NAMES:
        for one in (name, f"_{name}_backward"):
            library.define(_SCHEMAS.get(one, f"{one}(Tensor x) -> Tensor"))
    library.impl("nms", _nms, "CPU")
    library.impl("roi_align", _roi_align, "CompositeImplicitAutograd")
    _libraries.append(library)
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
    torchvision.ops.roi_align.__globals__["_has_ops"] = lambda: True


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return which boxes no more confident one overlaps above the threshold, most confident first."""
    order = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        sides = torch.minimum(boxes[order, 2:], boxes[best, 2:]) - torch.maximum(boxes[order, :2], boxes[best, :2])
        both = sides.clamp(min=0).prod(dim=1)
        order = order[both / (areas[order] + areas[best] - both) <= threshold]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)


def _roi_align(
    maps: torch.Tensor, regions: torch.Tensor, scale: float, high: int, wide: int, ratio: int, aligned: bool
) -> torch.Tensor:
    """Return regions [R, 5] (image, left, top, right, bottom), pooled: [R, C, high, wide]."""
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
        mine = regions[:, 0] == image
        if mine.any():
            own = maps[image : image + 1].expand(int(mine.sum()), -1, -1, -1)
            sampled = sampled.index_put(
                (mine.nonzero()[:, 0],),
                F.grid_sample(own, grid[mine].to(maps.dtype), padding_mode="border", align_corners=True),
            )
    return F.avg_pool2d(sampled, 2)
