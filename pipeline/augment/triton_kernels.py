"""Triton kernels of the data path. They run on CPU tensors too, slowly, where TRITON_INTERPRET=1 is set."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 256


def crop_view(
    pixels: torch.Tensor,
    starts: torch.Tensor,
    widths: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Return crops of the images in `pixels`, resized antialiased and mirrored: uint8 [B, size, size, 3].

    pixels: uint8, flat; starts, widths int64 [B]: each image's first byte and its width in pixels; boxes int32 [B, 4]:
    top, left, height, width; flips bool [B].
    """
    out = torch.empty((len(boxes), size, size, 3), dtype=torch.uint8, device=pixels.device)
    grid = (triton.cdiv(size * size, _BLOCK), len(boxes))
    _crop_view[grid](pixels, starts, widths, boxes, flips, out, SIZE=size, BLOCK=_BLOCK)
    return out


@triton.jit
def _crop_view(pixels, starts, widths, boxes, flips, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fill BLOCK pixels of one crop: the triangle filter's weighted sum of the source pixels under each, directly."""
    sample = tl.program_id(1)
    box = boxes + 4 * sample
    top, left, height, width = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    stride = 3 * tl.load(widths + sample)
    corner = tl.load(starts + sample) + top * stride + 3 * left
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE * SIZE
    x = index % SIZE
    x = tl.where(tl.load(flips + sample) != 0, SIZE - 1 - x, x)

    scale_y, scale_x = height.to(tl.float32) / SIZE, width.to(tl.float32) / SIZE
    support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    center_y = ((index // SIZE).to(tl.float32) + 0.5) * scale_y
    center_x = (x.to(tl.float32) + 0.5) * scale_x
    first_y = tl.maximum((center_y - support_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((center_x - support_x + 0.5).to(tl.int32), 0)

    red = tl.zeros((BLOCK,), tl.float32)
    green = tl.zeros((BLOCK,), tl.float32)
    blue = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for tap_y in range((2 * support_y).to(tl.int32) + 2):
        y = first_y + tap_y
        weight_y = tl.maximum(1.0 - tl.abs((y.to(tl.float32) - center_y + 0.5) / support_y), 0.0)
        weight_y = tl.where(y < height, weight_y, 0.0)
        row = corner + y * stride
        for tap_x in range((2 * support_x).to(tl.int32) + 2):
            column = first_x + tap_x
            weight = tl.maximum(1.0 - tl.abs((column.to(tl.float32) - center_x + 0.5) / support_x), 0.0)
            weight = tl.where(column < width, weight, 0.0) * weight_y
            used = inside & (weight > 0)
            at = pixels + row + 3 * column
            red += weight * tl.load(at, mask=used, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=used, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=used, other=0).to(tl.float32)
            weights += weight
    weights = tl.where(inside, weights, 1.0)
    to = out + 3 * (sample.to(tl.int64) * SIZE * SIZE + index)
    tl.store(to, (red / weights + 0.5).to(tl.uint8), mask=inside)
    tl.store(to + 1, (green / weights + 0.5).to(tl.uint8), mask=inside)
    tl.store(to + 2, (blue / weights + 0.5).to(tl.uint8), mask=inside)


def augment_view(
    crops: torch.Tensor,
    parameters: torch.Tensor,
    blurs: torch.Tensor,
    out: torch.Tensor,
    *,
    gray_first: bool,
    radius: int,
) -> None:
    """Write the augmented views of crops, uint8 [B, S, S, 3], into `out` [B, 3, S, S], channels-last.

    parameters: float32 [B, 20], of `color.pack`; blurs int64 [M]: the samples that are blurred, by kernels
    of `radius` pixels.
    """
    batch, size = crops.shape[0], crops.shape[1]
    sums = torch.zeros(batch, dtype=torch.int32, device=crops.device)
    grid = (triton.cdiv(size * size, _BLOCK), batch)
    common: dict[str, Any] = {"PIXELS": size * size, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    colored = torch.empty_like(crops) if len(blurs) else crops
    _sum_luma[grid](crops, parameters, sums, GRAY_FIRST=gray_first, **common)
    _color[grid](crops, parameters, sums, colored, out, GRAY_FIRST=gray_first, **common)
    if len(blurs):
        rows = torch.empty((len(blurs), size, size, 3), dtype=torch.float32, device=crops.device)
        grid = (grid[0], len(blurs))
        _blur_rows[grid](colored, parameters, blurs, rows, SIZE=size, RADIUS=radius, **common)
        _blur_columns[grid](rows, parameters, blurs, out, SIZE=size, RADIUS=radius, **common)


# A sample's parameters: their number, and the columns of each, in the order of `pipeline.augment.color.pack`.
_ROW = tl.constexpr(20)
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _SHIFT = (tl.constexpr(i) for i in (0, 1, 5, 6, 7, 8))
_GRAY, _BLUR, _SIGMA, _SOLARIZE, _MEAN, _SCALE = (tl.constexpr(i) for i in (9, 10, 11, 12, 13, 16))


@triton.jit
def _luma(r, g, b):  # type: ignore[no-untyped-def]
    return tl.floor(r * (19595 / 65536) + g * (38470 / 65536) + b * (7471 / 65536) + 0.5)


@triton.jit
def _blend(x, other, factor):  # type: ignore[no-untyped-def]
    return tl.floor(tl.minimum(tl.maximum((x - other) * factor + other, 0.0), 255.0))


@triton.jit
def _wrapped(x, period):  # type: ignore[no-untyped-def]
    return tl.where(x >= period, x - period, x)


@triton.jit
def _turned(r, g, b, shift):  # type: ignore[no-untyped-def]
    """Turn the hue by `shift` levels of 256, with PIL's 8-bit HSV in between, as `augment.hue` does."""
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = high - low
    safe = tl.maximum(chroma, 1.0)
    rc = tl.div_rn(high - r, safe).to(tl.float64)
    gc = tl.div_rn(high - g, safe).to(tl.float64)
    bc = tl.div_rn(high - b, safe).to(tl.float64)
    sixths = tl.where(r == high, bc - gc, tl.where(g == high, (rc - bc) + 2.0, (gc - rc) + 4.0)).to(tl.float32)
    turn = _wrapped(sixths.to(tl.float64) / 6.0 + 1.0, 1.0).to(tl.float32)
    h = tl.where(chroma > 0, tl.floor(turn.to(tl.float64) * 255.0).to(tl.float32), 0.0)
    s = tl.floor(tl.div_rn(chroma * 255.0, tl.maximum(high, 1.0)))
    h6 = _wrapped(_wrapped(h + shift, 256.0) + 256.0, 256.0) * (6 / 255)
    vs = s * high * (1 / 255)
    red, green, blue = _wrapped(h6 + 5.0, 6.0), _wrapped(h6 + 3.0, 6.0), _wrapped(h6 + 1.0, 6.0)
    red = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(red, 4.0 - red), 0.0), 1.0) + 0.5)
    green = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(green, 4.0 - green), 0.0), 1.0) + 0.5)
    blue = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(blue, 4.0 - blue), 0.0), 1.0) + 0.5)
    return red, green, blue


@triton.jit
def _jittered(r, g, b, row, operation, mean):  # type: ignore[no-untyped-def]
    """Apply one of brightness (0), contrast (1), saturation (2) and hue (3); a scalar says which."""
    if operation == 0:
        factor = tl.load(row + _BRIGHTNESS)
        r = tl.floor(tl.minimum(tl.maximum(r * factor, 0.0), 255.0))
        g = tl.floor(tl.minimum(tl.maximum(g * factor, 0.0), 255.0))
        b = tl.floor(tl.minimum(tl.maximum(b * factor, 0.0), 255.0))
    elif operation == 1:
        factor = tl.load(row + _CONTRAST)
        r, g, b = _blend(r, mean, factor), _blend(g, mean, factor), _blend(b, mean, factor)
    elif operation == 2:
        factor = tl.load(row + _SATURATION)
        gray = _luma(r, g, b)
        r, g, b = _blend(r, gray, factor), _blend(g, gray, factor), _blend(b, gray, factor)
    else:
        r, g, b = _turned(r, g, b, tl.load(row + _SHIFT))
    return r, g, b


@triton.jit
def _load(crops, sample, PIXELS, BLOCK):  # type: ignore[no-untyped-def]
    """Return a block of a sample's pixels in three channels, their places, and which of them there are."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    at = (sample.to(tl.int64) * PIXELS + index) * 3
    r = tl.load(crops + at, mask=inside, other=0).to(tl.float32)
    g = tl.load(crops + at + 1, mask=inside, other=0).to(tl.float32)
    b = tl.load(crops + at + 2, mask=inside, other=0).to(tl.float32)
    return r, g, b, at, inside


@triton.jit
def _store_view(r, g, b, out, at, inside, row):  # type: ignore[no-untyped-def]
    """Solarize where asked, normalize and write."""
    if tl.load(row + _SOLARIZE) != 0:
        r = tl.where(r < 128, r, 255 - r)
        g = tl.where(g < 128, g, 255 - g)
        b = tl.where(b < 128, b, 255 - b)
    kind = out.dtype.element_ty
    tl.store(out + at, ((r - tl.load(row + _MEAN)) * tl.load(row + _SCALE)).to(kind), mask=inside)
    tl.store(out + at + 1, ((g - tl.load(row + _MEAN + 1)) * tl.load(row + _SCALE + 1)).to(kind), mask=inside)
    tl.store(out + at + 2, ((b - tl.load(row + _MEAN + 2)) * tl.load(row + _SCALE + 2)).to(kind), mask=inside)


@triton.jit
def _sum_luma(crops, parameters, sums, GRAY_FIRST: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up each sample's luma as it is before its contrast; whole numbers, so that the order does not matter."""
    sample = tl.program_id(1)
    row = parameters + sample * _ROW
    if tl.load(row + _JITTER) != 0:
        r, g, b, _, inside = _load(crops, sample, PIXELS, BLOCK)
        if GRAY_FIRST:
            if tl.load(row + _GRAY) != 0:
                gray = _luma(r, g, b)
                r, g, b = gray, gray, gray
        before = 1
        for place in range(4):
            operation = tl.load(row + _ORDER + place)
            if operation == 1:
                before = 0
            if before == 1:
                r, g, b = _jittered(r, g, b, row, operation, 0.0)
        total = tl.sum(tl.where(inside, _luma(r, g, b), 0.0).to(tl.int32))
        tl.atomic_add(sums + sample, total)


@triton.jit
def _color(crops, parameters, sums, colored, out, GRAY_FIRST: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Apply a sample's color operations; write its view, or, where a blur is to come, its pixels."""
    sample = tl.program_id(1)
    row = parameters + sample * _ROW
    r, g, b, at, inside = _load(crops, sample, PIXELS, BLOCK)
    gray = tl.load(row + _GRAY)
    if GRAY_FIRST:
        if gray != 0:
            level = _luma(r, g, b)
            r, g, b = level, level, level
    if tl.load(row + _JITTER) != 0:
        mean = tl.floor(tl.load(sums + sample).to(tl.float64) / PIXELS + 0.5).to(tl.float32)
        for place in range(4):
            r, g, b = _jittered(r, g, b, row, tl.load(row + _ORDER + place), mean)
    if not GRAY_FIRST:
        if gray != 0:
            level = _luma(r, g, b)
            r, g, b = level, level, level
    if tl.load(row + _BLUR) != 0:
        tl.store(colored + at, r.to(tl.uint8), mask=inside)
        tl.store(colored + at + 1, g.to(tl.uint8), mask=inside)
        tl.store(colored + at + 2, b.to(tl.uint8), mask=inside)
    else:
        _store_view(r, g, b, out, at, inside, row)


@triton.jit
def _reflected(at, SIZE):  # type: ignore[no-untyped-def]
    at = tl.abs(at)
    return tl.where(at >= SIZE, 2 * SIZE - 2 - at, at)


@triton.jit
def _blurred(line, step, position, inside, sigma, SIZE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the Gaussian mean of three channels along lines of pixels `step` apart, around `position`, reflected."""
    r = tl.zeros((BLOCK,), tl.float32)
    g = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    total = 0.0
    for tap in range(-RADIUS, RADIUS + 1):
        weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
        at = line + _reflected(position + tap, SIZE) * step
        r += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
        g += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
        b += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
        total += weight
    return r / total, g / total, b / total


@triton.jit
def _blur_rows(
    colored,
    parameters,
    blurs,
    rows,
    SIZE: tl.constexpr,
    RADIUS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Blur the chosen samples along rows."""
    number = tl.program_id(1)
    sample = tl.load(blurs + number)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    line = colored + (sample.to(tl.int64) * PIXELS + index // SIZE * SIZE) * 3
    sigma = tl.load(parameters + sample * _ROW + _SIGMA)
    r, g, b = _blurred(line, 3, index % SIZE, inside, sigma, SIZE, RADIUS, BLOCK)
    to = rows + (number.to(tl.int64) * PIXELS + index) * 3
    tl.store(to, r, mask=inside)
    tl.store(to + 1, g, mask=inside)
    tl.store(to + 2, b, mask=inside)


@triton.jit
def _blur_columns(
    rows, parameters, blurs, out, SIZE: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Blur what `_blur_rows` wrote along columns, round, and write the views."""
    number = tl.program_id(1)
    sample = tl.load(blurs + number)
    row = parameters + sample * _ROW
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    line = rows + (number.to(tl.int64) * PIXELS + index % SIZE) * 3
    r, g, b = _blurred(line, 3 * SIZE, index // SIZE, inside, tl.load(row + _SIGMA), SIZE, RADIUS, BLOCK)
    to = (sample.to(tl.int64) * PIXELS + index) * 3
    _store_view(tl.floor(r + 0.5), tl.floor(g + 0.5), tl.floor(b + 0.5), out, to, inside, row)
