"""The random numbers of the augmentation: pure functions of (seed, epoch, sample id, view).

No draw depends on rank, world size, workers, backend, batch size or the point of a resume. Each has a fixed position in
the random stream of (seed, epoch, id, view): a new draw never changes another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.system.counter_rng import keyed, uniforms
from pipeline.views import View

TRIES = 10  # tries of RandomResizedCrop, before it takes the center
_COLUMNS = 16  # positions 0..15: flip and color, named below; after them the crop's tries, four numbers each
(_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _OPERATIONS, _GRAY, _BLUR, _SIGMA, _SOLARIZE) = range(11)
_VFLIP = 11
_SKIPPED = 4  # in the order of operations: none
_ORDERS = np.array(
    [[a, b, c, 6 - a - b - c] for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
)


@dataclass(frozen=True)
class Color:
    """The color operations of one view of n samples: arrays [n], except `order`."""

    jitter: np.ndarray
    """bool: apply color jitter."""
    order: np.ndarray
    """int64 [n, 4]: the order of brightness (0), contrast (1), saturation (2) and hue (3); 4 for one of strength 0."""
    brightness: np.ndarray
    """float32 factor, like contrast and saturation."""
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    """float32 shift, turns."""
    gray: np.ndarray
    """bool."""
    blur: np.ndarray
    """bool."""
    sigma: np.ndarray
    """float32 standard deviation, pixels."""
    solarize: np.ndarray
    """bool."""
    gray_first: bool = False
    """Apply grayscale before the jitter, not after it."""
    threshold: int = 128
    """Solarization inverts levels from this on."""

    @staticmethod
    def unchanged(n: int) -> "Color":
        """Return no operation on any of n samples."""
        off, one = np.zeros(n, bool), np.ones(n, np.float32)
        return Color(off, np.tile(np.arange(4), (n, 1)), one, one, one, 0 * one, off, off, one, off)


@dataclass(frozen=True)
class ViewDraws:
    """All draws of one view of n samples."""

    boxes: np.ndarray
    """int32 [n, 4]: top, left, height, width of the crop, in pixels of the stored image."""
    flips: np.ndarray
    """bool [n]: horizontal."""
    vflips: np.ndarray
    """bool [n]: vertical."""
    color: Color


def draw_view(
    view: View, index: int, *, seed: int, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> ViewDraws:
    """Draw view number `index` of samples `ids` (int64 [n]), images of `heights` by `widths` pixels ([n])."""
    u = uniforms(keyed(seed, epoch, ids, index), _COLUMNS + 4 * TRIES)  # [n, 16 + 40]
    boxes = crop_boxes(u[:, _COLUMNS:].reshape(-1, TRIES, 4), heights, widths, view.crop_scale, view.crop_ratio)
    return ViewDraws(boxes, u[:, _FLIP] < view.hflip, u[:, _VFLIP] < view.vflip, _color(view, u))


def draw_views(
    views: Sequence[View], *, seed: int, epoch: int, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> list[ViewDraws]:
    """Draw all views of samples `ids`, each as `draw_view` does."""
    sides = {"heights": heights, "widths": widths}
    return [draw_view(view, index, seed=seed, epoch=epoch, ids=ids, **sides) for index, view in enumerate(views)]


def draw_color(view: View, index: int, *, seed: int, epoch: int, ids: np.ndarray) -> Color:
    """Draw only the color operations of view number `index` of samples `ids` (int64 [n]), as `draw_view` does."""
    return _color(view, uniforms(keyed(seed, epoch, ids, index), _COLUMNS))


def _color(view: View, u: np.ndarray) -> Color:
    def factor(column: int, strength: float) -> np.ndarray:
        return between(u[:, column], max(0.0, 1.0 - strength), 1.0 + strength).astype(np.float32)

    order = _ORDERS[(u[:, _OPERATIONS] * len(_ORDERS)).astype(np.int64)]
    # As in ColorJitter, a strength of 0 skips the operation: even a hue shifted by 0 passes through 8-bit HSV.
    strengths = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    return Color(
        jitter=u[:, _JITTER] < view.jitter_p,
        order=np.where(strengths[order] > 0, order, _SKIPPED),
        brightness=factor(_BRIGHTNESS, view.brightness),
        contrast=factor(_CONTRAST, view.contrast),
        saturation=factor(_SATURATION, view.saturation),
        hue=between(u[:, _HUE], -view.hue, view.hue).astype(np.float32),
        gray=u[:, _GRAY] < view.gray_p,
        blur=u[:, _BLUR] < view.blur_p,
        sigma=between(u[:, _SIGMA], *view.blur_sigma).astype(np.float32),
        solarize=u[:, _SOLARIZE] < view.solarize_p,
        gray_first=view.gray_first,
        threshold=view.solarize_threshold,
    )


def between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `u` from U[0, 1) to U[low, high)."""
    return low + u * (high - low)


def crop_boxes(
    u: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Return RandomResizedCrop's boxes, int32 [n, 4] (top, left, height, width), from uniforms u [n, tries, 4].

    The first try that fits; if none does, the largest centered box within `ratio`
    (torchvision.transforms.RandomResizedCrop.get_params).
    """
    high, wide = heights.astype(np.float64)[:, None], widths.astype(np.float64)[:, None]
    area = high * wide * between(u[..., 0], *scale)  # [n, tries]
    aspect = np.exp(between(u[..., 1], np.log(ratio[0]), np.log(ratio[1])))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    top, left = np.floor(u[..., 2] * (high - h + 1)), np.floor(u[..., 3] * (wide - w + 1))
    fits = (w > 0) & (w <= wide) & (h > 0) & (h <= high)
    first = fits.argmax(axis=1)
    boxes = np.stack([top, left, h, w], axis=-1)[np.arange(len(u)), first].astype(np.int32)
    missed = ~fits.any(axis=1)
    boxes[missed] = _largest_centered(heights[missed], widths[missed], ratio)
    return boxes


def _largest_centered(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    high, wide = heights.astype(np.float64), widths.astype(np.float64)
    h = np.where(wide / high < ratio[0], np.rint(wide / ratio[0]), high)
    w = np.where(wide / high > ratio[1], np.rint(high * ratio[1]), wide)
    h, w = np.minimum(h, high), np.minimum(w, wide)
    return np.stack([(high - h) // 2, (wide - w) // 2, h, w], axis=-1).astype(np.int32)


def center_boxes(heights: np.ndarray, widths: np.ndarray, crop_ratio: float) -> np.ndarray:
    """Return centered square boxes, int32 [n, 4], of `crop_ratio` of the image's shorter side (0.875 is 224 of 256)."""
    side = np.maximum(np.rint(np.minimum(heights, widths) * crop_ratio), 1).astype(np.int32)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=-1).astype(np.int32)
