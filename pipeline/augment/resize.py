"""Antialiased bilinear crop and resize on the CPU, compiled: equal to PIL's `Image.resize(BILINEAR)` to 1/255.

The triangle filter is separable. Each output row is first a sum over source rows, which are contiguous, so that the
compiler vectorizes it; then a sum over columns with four lanes for each pixel: three channels and one that the next
pixel overwrites. The column pass is unrolled for the number of taps, rounded up to one of `_TAPS`; more taps take a
loop. All in float32, rounded once; PIL also rounds between the passes, hence the 1/255.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pipeline.native.numba_cache import compiled

_JIT: dict[str, Any] = {
    "slp": True,  # makes the column pass three times as fast
    "nogil": True,
    "fastmath": {"contract", "nsz", "reassoc"},
    "error_model": "numpy",
    "boundscheck": False,
}
_TAPS = (2, 3, 4, 5, 6, 8, 12)
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)  # unsigned: no wrap-around of negative indices


class Scratch(NamedTuple):
    """Buffers of one worker for `crop_resize`."""

    row: np.ndarray
    """float32: one output row before the column pass."""
    packed: np.ndarray
    """float32: one output row after the column pass."""
    top: np.ndarray
    """int64 [size]: first source row of each output row."""
    rows: np.ndarray
    """int64 [size]: number of source rows of each output row."""
    row_weights: np.ndarray
    """float32 [size, taps]."""
    left: np.ndarray
    """Like the three above, for columns."""
    columns: np.ndarray
    column_weights: np.ndarray


def scratch(sizes: tuple[int, ...], longest: int) -> Scratch:
    """Return buffers for crops, to squares of any of `sizes`, of images with sides of at most `longest` pixels."""
    size = max(sizes)
    taps = int(2 * max(longest / min(sizes), 1.0)) + 3 + max(_TAPS)

    def axis() -> tuple[np.ndarray, ...]:
        return np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros((size, taps), np.float32)

    row = np.zeros(3 * (longest + taps) + 16, np.float32)
    return Scratch(row, np.zeros(3 * size + 16, np.float32), *axis(), *axis())


@compiled(**_JIT)
def _triangle(n_in: int, n_out: int, mirrored: bool, start: Any, count: Any, weights: Any) -> int:
    """Compute first source index, number of taps and weights for each output; return the largest number of taps."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    most = 0
    for out in range(n_out):
        center = (out + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), n_in)
        total = 0.0
        to = n_out - 1 - out if mirrored else out
        for k in range(high - low):
            weight = max(1.0 - abs((low + k - center + 0.5) / support), 0.0)
            weights[to, k] = weight
            total += weight
        for k in range(high - low):
            weights[to, k] /= total
        weights[to, high - low :] = 0.0
        start[to] = low
        count[to] = high - low
        most = max(most, high - low)
    return most


@compiled(**_JIT)
def _sum_rows(image: Any, base: int, stride: int, n: int, count: int, w: Any, row: Any) -> None:
    """Write the weighted sum of `count` source rows of `n` bytes, the first at `base`, to `row`."""
    r0 = image[base : base + n]
    if count == 1:
        for i in range(n):
            row[i] = np.float32(r0[i])
        return
    r1 = image[base + stride : base + stride + n]
    w0, w1 = w[0], w[1]
    if count == 2:
        for i in range(n):
            row[i] = w0 * np.float32(r0[i]) + w1 * np.float32(r1[i])
        return
    r2 = image[base + 2 * stride : base + 2 * stride + n]
    w2 = w[2]
    if count == 3:
        for i in range(n):
            row[i] = w0 * np.float32(r0[i]) + w1 * np.float32(r1[i]) + w2 * np.float32(r2[i])
        return
    r3 = image[base + 3 * stride : base + 3 * stride + n]
    w3 = w[3]
    for i in range(n):
        row[i] = w0 * np.float32(r0[i]) + w1 * np.float32(r1[i]) + w2 * np.float32(r2[i]) + w3 * np.float32(r3[i])
    for k in range(4, count):
        wk = w[k]
        rk = image[base + k * stride : base + k * stride + n]
        for i in range(n):
            row[i] += wk * np.float32(rk[i])


def _sum_columns(taps: int) -> Callable[..., None]:
    """Return the column pass with `taps` taps for each pixel; a pixel's unneeded taps have weight 0."""
    rest = tuple(np.uint64(k) for k in range(1, taps))

    def pass_(row: Any, left: Any, weights: Any, out: Any, size: int) -> None:
        for pixel in range(np.uint64(size)):
            at = np.uint64(left[pixel]) * _THREE
            w = weights[pixel, np.uint64(0)]
            a, b, c, d = row[at] * w, row[at + _ONE] * w, row[at + _TWO] * w, row[at + _THREE] * w
            for k in rest:
                w = weights[pixel, k]
                o = at + k * _THREE
                a += row[o] * w
                b += row[o + _ONE] * w
                c += row[o + _TWO] * w
                d += row[o + _THREE] * w
            to = np.uint64(pixel) * _THREE
            out[to] = a
            out[to + _ONE] = b
            out[to + _TWO] = c
            out[to + _THREE] = d

    pass_.__qualname__ = f"columns{taps}"
    return compiled(**_JIT)(pass_)


_columns2, _columns3, _columns4, _columns5, _columns6, _columns8, _columns12 = (_sum_columns(taps) for taps in _TAPS)


@compiled(**_JIT)
def _columns_any(row: Any, left: Any, count: Any, weights: Any, out: Any, size: int) -> None:
    for pixel in range(size):
        for channel in range(3):
            total = np.float32(0.0)
            for k in range(count[pixel]):
                total += weights[pixel, k] * row[3 * (left[pixel] + k) + channel]
            out[3 * pixel + channel] = total


@compiled(**_JIT)
def crop_resize(image: Any, width: int, box: Any, flips: Any, out: Any, buffers: Any) -> None:
    """Write the crop `box` of `image`, resized and flipped, to `out`.

    image: uint8, flat, rows of `width` RGB pixels. box: top, left, height, width, inside the image. flips: as in
    `Plan`. out: uint8 [size, size, 3], contiguous. buffers: a `Scratch` for this size and image.
    """
    row, packed, top, rows, row_weights, left, columns, column_weights = buffers
    size = out.shape[0]
    flat = out.reshape(-1)
    _triangle(box[2], size, flips & 2 != 0, top, rows, row_weights)
    taps = _triangle(box[3], size, flips & 1 != 0, left, columns, column_weights)
    stride, n = 3 * width, 3 * box[3]
    corner = box[0] * stride + 3 * box[1]
    for y in range(size):
        _sum_rows(image, corner + top[y] * stride, stride, n, rows[y], row_weights[y], row)
        if taps <= 2:
            _columns2(row, left, column_weights, packed, size)
        elif taps == 3:
            _columns3(row, left, column_weights, packed, size)
        elif taps == 4:
            _columns4(row, left, column_weights, packed, size)
        elif taps == 5:
            _columns5(row, left, column_weights, packed, size)
        elif taps == 6:
            _columns6(row, left, column_weights, packed, size)
        elif taps <= 8:
            _columns8(row, left, column_weights, packed, size)
        elif taps <= 12:
            _columns12(row, left, column_weights, packed, size)
        else:
            _columns_any(row, left, columns, column_weights, packed, size)
        line = flat[3 * size * y : 3 * size * (y + 1)]
        for i in range(3 * size):
            line[i] = np.uint8(np.int32(packed[i] + np.float32(0.5)))
