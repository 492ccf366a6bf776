"""Color, blur and normalization on the CPU, compiled: one sample at a time, equal to `color.stepwise` in every bit.

Every operation rounds to 0..255, so a sample stays uint8 until the end, as planes that the compiler vectorizes over;
solarization and normalization are then one table lookup for each value. Products are not contracted with sums, which
`fastmath` would allow: levels would differ between machines.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.augment.packed import RADIUS, PackedColor, bits
from pipeline.native.numba_cache import compiled

# Columns of a row of parameters, as in `color.pack`.
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _SHIFT, _GRAY, _BLUR, _SOLARIZE = 0, 1, 5, 6, 7, 8, 9, 10, 12
_JIT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_F = np.float32
_0, _HALF, _1, _3, _4, _5, _6, _255 = (_F(value) for value in (0, 0.5, 1, 3, 4, 5, 6, 255))
_RED, _GREEN, _BLUE = (_F(share / 65536) for share in (19595, 38470, 7471))
_HUE_SIXTHS, _INVERSE_255 = _F(6 / 255), _F(1 / 255)


class ColorScratch(NamedTuple):
    """Buffers of one worker for `augment_into`."""

    planes: np.ndarray
    """uint8 [6, pixels]: the three channels of a sample, and of its blurred version."""
    lines: np.ndarray
    """float32 [2, width + 2 RADIUS]: a row of one channel, blurred along columns, then along both."""


def color_scratch(height: int, width: int) -> ColorScratch:
    """Return buffers for samples of that many pixels."""
    return ColorScratch(np.empty((6, height * width), np.uint8), np.empty((2, width + 2 * RADIUS), np.float32))


@compiled(**_JIT)
def _level(x: Any) -> Any:
    """Round x down to 0..255."""
    return np.uint8(np.int32(min(max(x, _0), _255)))


@compiled(**_JIT)
def _luma(r: Any, g: Any, b: Any) -> Any:
    """Return the luma of levels; exact, as 2^16 times each product and sum is below 2^24."""
    return np.int32(_F(r) * _RED + _F(g) * _GREEN + _F(b) * _BLUE + _HALF)


@compiled(**_JIT)
def _to_gray(r: Any, g: Any, b: Any) -> None:
    for i in range(r.size):
        r[i] = g[i] = b[i] = np.uint8(_luma(r[i], g[i], b[i]))


@compiled(**_JIT)
def _blend(x: Any, other: Any, factor: Any) -> Any:
    return _level((_F(x) - other) * factor + other)


@compiled(**_JIT)
def _contrast(r: Any, g: Any, b: Any, factor: Any) -> None:
    total, n = np.int64(0), r.size
    for i in range(n):
        total += _luma(r[i], g[i], b[i])
    mean = _F((2 * total + n) // (2 * n))
    for plane in (r, g, b):
        for i in range(n):
            plane[i] = _blend(plane[i], mean, factor)


@compiled(**_JIT)
def _saturation(r: Any, g: Any, b: Any, factor: Any) -> None:
    for i in range(r.size):
        luma = _F(_luma(r[i], g[i], b[i]))
        r[i], g[i], b[i] = _blend(r[i], luma, factor), _blend(g[i], luma, factor), _blend(b[i], luma, factor)


@compiled(**_JIT)
def _channel(h6: Any, offset: Any, vs: Any, v: Any) -> Any:
    k = h6 + offset
    k = k - _6 if k >= _6 else k
    return np.uint8(np.int32(v - vs * min(max(min(k, _4 - k), _0), _1) + _HALF))


@compiled(**_JIT)
def _hue(reds: Any, greens: Any, blues: Any, shift: Any) -> None:
    """Shift the hue by `shift` levels of 256, as `color.hue` does."""
    for i in range(reds.size):
        r, g, b = _F(reds[i]), _F(greens[i]), _F(blues[i])
        high, low = max(max(r, g), b), min(min(r, g), b)
        chroma = high - low
        share = (high - (r + g + b - high - low)) / max(chroma, _1)
        if r == high:
            sixths = _1 - share if b == low else share - _1
        elif g == high:
            sixths = share + _1 if b == low else _3 - share
        else:
            sixths = share + _3 if r == low else _5 - share
        sixths /= _6
        h = np.int32((sixths + _1 if sixths < _0 else sixths) * _255) if chroma > _0 else np.int32(0)
        s = _F(np.int32(chroma * _255 / max(high, _1)))
        h6 = _F((h + shift) & np.int32(255)) * _HUE_SIXTHS
        vs = s * high * _INVERSE_255
        reds[i], greens[i], blues[i] = (
            _channel(h6, _5, vs, high),
            _channel(h6, _3, vs, high),
            _channel(h6, _1, vs, high),
        )


@compiled(**_JIT)
def _mirrored(position: int, size: int) -> Any:
    position = abs(position)
    return position if position < size else 2 * size - 2 - position


@compiled(**_JIT)
def _add_pair(total: Any, a: Any, b: Any, weight: Any) -> None:
    """Add the taps a and b, at one distance, to total."""
    for i in range(total.size):
        total[i] += weight * (_F(a[i]) + _F(b[i]))


@compiled(**_JIT)
def _blur(plane: Any, out: Any, width: int, kernel: Any, lines: Any) -> None:
    """Blur a channel, uint8, row by row of `width` pixels, as `color.gaussian_blur` does."""
    height, reach = plane.size // width, RADIUS
    while reach > 0 and kernel[reach] == _0:
        reach -= 1
    padded, total = lines[0], lines[1, :width]
    middle = padded[RADIUS : RADIUS + width]
    for y in range(height):
        center, line = plane[y * width : (y + 1) * width], out[y * width : (y + 1) * width]
        for i in range(width):
            middle[i] = kernel[0] * _F(center[i])
        for k in range(1, reach + 1):
            above, below = width * _mirrored(y - k, height), width * _mirrored(y + k, height)
            _add_pair(middle, plane[above : above + width], plane[below : below + width], kernel[k])
        for k in range(1, reach + 1):
            padded[RADIUS - k] = middle[k]
            padded[RADIUS + width - 1 + k] = middle[width - 1 - k]
        for i in range(width):
            total[i] = kernel[0] * middle[i]
        for k in range(1, reach + 1):
            left, right = padded[RADIUS - k : RADIUS - k + width], padded[RADIUS + k : RADIUS + k + width]
            _add_pair(total, left, right, kernel[k])
        for i in range(width):
            line[i] = np.uint8(np.int32(total[i] + _HALF))


@compiled(**_JIT)
def _jitter(r: Any, g: Any, b: Any, row: Any) -> None:
    for position in range(4):
        operation = row[_ORDER + position]
        if operation == 0:
            for plane in (r, g, b):
                for i in range(r.size):
                    plane[i] = _level(_F(plane[i]) * row[_BRIGHTNESS])
        elif operation == 1:
            _contrast(r, g, b, row[_CONTRAST])
        elif operation == 2:
            _saturation(r, g, b, row[_SATURATION])
        elif operation == 3:
            _hue(r, g, b, np.int32(row[_SHIFT]))


@compiled(**_JIT)
def _augment_sample(crop: Any, row: Any, kernel: Any, gray_first: bool, levels: Any, out: Any, scratch: Any) -> None:
    """Write the view of crop, uint8 [H, W, 3], to out [H * W * 3]; the others as in `PackedColor`, of one sample."""
    height, width, _ = crop.shape
    n, flat = height * width, crop.reshape(-1)
    planes = scratch.planes
    r, g, b = planes[0, :n], planes[1, :n], planes[2, :n]
    for i in range(n):
        r[i], g[i], b[i] = flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]
    if gray_first and row[_GRAY] != 0:
        _to_gray(r, g, b)
    if row[_JITTER] != 0:
        _jitter(r, g, b, row)
    if not gray_first and row[_GRAY] != 0:
        _to_gray(r, g, b)
    if row[_BLUR] != 0:
        for channel in range(3):
            _blur(planes[channel, :n], planes[3 + channel, :n], width, kernel, scratch.lines)
        r, g, b = planes[3, :n], planes[4, :n], planes[5, :n]
    table = levels[1] if row[_SOLARIZE] != 0 else levels[0]
    for i in range(n):
        out[3 * i], out[3 * i + 1], out[3 * i + 2] = table[0, r[i]], table[1, g[i]], table[2, b[i]]


@compiled(**_JIT)
def _augment(crops: Any, rows: Any, kernels: Any, gray_first: bool, levels: Any, outs: Any, scratch: Any) -> None:
    for i in range(len(outs)):
        _augment_sample(crops[i], rows[i], kernels[i], gray_first, levels, outs[i], scratch)


def augment_crops(crops: np.ndarray, color: PackedColor) -> torch.Tensor:
    """Return the views of crops, uint8 [B, H, W, 3]: dtype [B, 3, H, W], channels-last."""
    views = torch.empty(crops.shape, dtype=color.dtype)
    augment_into(views, slice(None), crops, color, color_scratch(*crops.shape[1:3]))
    return views.permute(0, 3, 1, 2)


def augment_into(
    views: torch.Tensor, samples: slice, crops: np.ndarray, color: PackedColor, scratch: ColorScratch
) -> None:
    """Write the `samples` of a batch of views [B, H, W, 3]: of the first crops, uint8 [n, H, W, 3].

    scratch: for crops of this size, and for one thread.
    """
    outs = bits(views.flatten(1))[samples]
    _augment(crops, color.rows[samples], color.kernels[samples], color.gray_first, color.levels, outs, scratch)
