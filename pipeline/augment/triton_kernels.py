"""Triton kernels of the data path. With TRITON_INTERPRET=1 they also run on CPU tensors, slowly."""

from typing import Any

import torch
import triton
import triton.language as tl

# Launches name `enable_fp_fusion`, multiply and add in one rounding: its default is true up to Triton 3.7, then false.
_BLOCK = 256  # pixels of one program


def crop_view(
    pixels: torch.Tensor,
    starts: torch.Tensor,
    widths: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Return crops of the images in `pixels`, resized with antialiasing and flipped: uint8 [B, size, size, 3].

    pixels: uint8, flat, RGB. starts, widths: int64 [B], first byte of each image, and its width in pixels. boxes: int32
    [B, 4], top, left, height, width. flips: uint8 [B], as in `Plan`.
    """
    out = torch.empty((len(boxes), size, size, 3), dtype=torch.uint8, device=pixels.device)
    grid = (triton.cdiv(size * size, _BLOCK), len(boxes))
    options: dict[str, Any] = {"SIZE": size, "BLOCK": _BLOCK, "enable_fp_fusion": True}
    _crop_view[grid](pixels, starts, widths, boxes, flips, out, **options)
    return out


@triton.jit
def _crop_view(pixels, starts, widths, boxes, flips, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Fill BLOCK pixels of one crop, each the triangle filter's weighted sum over its source pixels, in one pass."""
    sample = tl.program_id(1)
    box = boxes + 4 * sample
    top, left, height, width = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    stride = 3 * tl.load(widths + sample)
    corner = tl.load(starts + sample) + top * stride + 3 * left
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < SIZE * SIZE
    x, y = index % SIZE, index // SIZE
    flip = tl.load(flips + sample)
    x = tl.where(flip & 1 != 0, SIZE - 1 - x, x)
    y = tl.where(flip & 2 != 0, SIZE - 1 - y, y)

    # The filter of each output pixel: its center, half its width, and its first source row and column.
    scale_y, scale_x = height.to(tl.float32) / SIZE, width.to(tl.float32) / SIZE
    support_y, support_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    center_y = (y.to(tl.float32) + 0.5) * scale_y
    center_x = (x.to(tl.float32) + 0.5) * scale_x
    first_y = tl.maximum((center_y - support_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((center_x - support_x + 0.5).to(tl.int32), 0)

    r, g, b, weights = _zeros(BLOCK), _zeros(BLOCK), _zeros(BLOCK), _zeros(BLOCK)
    for tap_y in range((2 * support_y).to(tl.int32) + 2):
        source_y = first_y + tap_y
        weight_y = tl.maximum(1.0 - tl.abs((source_y.to(tl.float32) - center_y + 0.5) / support_y), 0.0)
        weight_y = tl.where(source_y < height, weight_y, 0.0)
        row = corner + source_y * stride
        for tap_x in range((2 * support_x).to(tl.int32) + 2):
            column = first_x + tap_x
            weight = tl.maximum(1.0 - tl.abs((column.to(tl.float32) - center_x + 0.5) / support_x), 0.0)
            weight = tl.where(column < width, weight, 0.0) * weight_y
            source_r, source_g, source_b = _load(pixels + row + 3 * column, inside & (weight > 0))
            r += weight * source_r
            g += weight * source_g
            b += weight * source_b
            weights += weight
    weights = tl.where(inside, weights, 1.0)
    pointers = out + 3 * (sample.to(tl.int64) * SIZE * SIZE + index)
    _store(pointers, r / weights + 0.5, g / weights + 0.5, b / weights + 0.5, inside)


@triton.jit
def _zeros(BLOCK: tl.constexpr):
    return tl.zeros((BLOCK,), tl.float32)


@triton.jit
def _load(pointers, mask):
    """Return the three channels of the RGB pixels at `pointers`, as float32."""
    r = tl.load(pointers, mask=mask, other=0).to(tl.float32)
    g = tl.load(pointers + 1, mask=mask, other=0).to(tl.float32)
    b = tl.load(pointers + 2, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _store(pointers, r, g, b, mask):
    """Write RGB pixels to `pointers`, in the type of that memory."""
    kind = pointers.dtype.element_ty
    tl.store(pointers, r.to(kind), mask=mask)
    tl.store(pointers + 1, g.to(kind), mask=mask)
    tl.store(pointers + 2, b.to(kind), mask=mask)


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

    parameters: float32 [B, 20], as `color.pack` returns. blurs: int64 [M], the samples to blur, by kernels of `radius`
    pixels.
    """
    batch, size = crops.shape[0], crops.shape[1]
    sums = torch.zeros(batch, dtype=torch.int32, device=crops.device)
    grid = (triton.cdiv(size * size, _BLOCK), batch)
    # Not fused, so that products are rounded as on the CPU, and each level below equals `stepwise`'s.
    common: dict[str, Any] = {"PIXELS": size * size, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    colored = torch.empty_like(crops) if len(blurs) else crops
    _sum_luma[grid](crops, parameters, sums, GRAY_FIRST=gray_first, **common)
    _color[grid](crops, parameters, sums, colored, out, GRAY_FIRST=gray_first, **common)
    if len(blurs):
        rows = torch.empty((len(blurs), size, size, 3), dtype=torch.float32, device=crops.device)
        grid = (grid[0], len(blurs))
        _blur_rows[grid](colored, parameters, blurs, rows, SIZE=size, RADIUS=radius, **common)
        _blur_columns[grid](rows, parameters, blurs, out, SIZE=size, RADIUS=radius, **common)


# Columns of a row of parameters, and their number, as in `pipeline.augment.color.pack`.
_ROW = tl.constexpr(20)
_JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _SHIFT = (tl.constexpr(i) for i in (0, 1, 5, 6, 7, 8))
_GRAY, _BLUR, _SIGMA, _SOLARIZE, _MEAN, _SCALE, _THRESHOLD = (tl.constexpr(i) for i in (9, 10, 11, 12, 13, 16, 19))


@triton.jit
def _luma(r, g, b):
    return tl.floor(r * (19595 / 65536) + g * (38470 / 65536) + b * (7471 / 65536) + 0.5)


@triton.jit
def _blend(x, other, factor):
    return tl.floor(tl.minimum(tl.maximum((x - other) * factor + other, 0.0), 255.0))


@triton.jit
def _wrap(x, period):
    return tl.where(x >= period, x - period, x)


@triton.jit
def _hue(r, g, b, shift):
    """Shift the hue by `shift` levels of 256 through PIL's 8-bit HSV, as `color.hue` does."""
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    chroma = high - low
    share = tl.div_rn(high - (r + g + b - high - low), tl.maximum(chroma, 1.0))
    red = tl.where(b == low, 1.0 - share, share - 1.0)
    green = tl.where(b == low, share + 1.0, 3.0 - share)
    blue = tl.where(r == low, share + 3.0, 5.0 - share)
    turn = tl.div_rn(tl.where(r == high, red, tl.where(g == high, green, blue)), 6.0)
    h = tl.where(chroma > 0, tl.floor(tl.where(turn < 0, turn + 1.0, turn) * 255.0), 0.0)
    s = tl.floor(tl.div_rn(chroma * 255.0, tl.maximum(high, 1.0)))
    h6 = _wrap(_wrap(h + shift, 256.0) + 256.0, 256.0) * (6 / 255)
    vs = s * high * (1 / 255)
    red, green, blue = _wrap(h6 + 5.0, 6.0), _wrap(h6 + 3.0, 6.0), _wrap(h6 + 1.0, 6.0)
    red = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(red, 4.0 - red), 0.0), 1.0) + 0.5)
    green = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(green, 4.0 - green), 0.0), 1.0) + 0.5)
    blue = tl.floor(high - vs * tl.minimum(tl.maximum(tl.minimum(blue, 4.0 - blue), 0.0), 1.0) + 0.5)
    return red, green, blue


@triton.jit
def _jittered(r, g, b, row, operation, mean):
    """Apply operation 0 (brightness), 1 (contrast), 2 (saturation), 3 (hue) or 4 (none)."""
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
    elif operation == 3:
        r, g, b = _hue(r, g, b, tl.load(row + _SHIFT))
    return r, g, b


@triton.jit
def _to_gray(r, g, b, row):
    """Replace the channels of a sample that becomes gray by their luma."""
    if tl.load(row + _GRAY) != 0:
        level = _luma(r, g, b)
        r, g, b = level, level, level
    return r, g, b


@triton.jit
def _load_block(crops, sample, PIXELS, BLOCK):
    """Return a block of a sample's pixels: three channels, their offset, and the mask of existing pixels."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    offset = (sample.to(tl.int64) * PIXELS + index) * 3
    r, g, b = _load(crops + offset, inside)
    return r, g, b, offset, inside


@triton.jit
def _store_view(r, g, b, pointers, inside, row):
    """Solarize where drawn, normalize and write."""
    if tl.load(row + _SOLARIZE) != 0:
        threshold = tl.load(row + _THRESHOLD)
        r = tl.where(r < threshold, r, 255 - r)
        g = tl.where(g < threshold, g, 255 - g)
        b = tl.where(b < threshold, b, 255 - b)
    r = (r - tl.load(row + _MEAN)) * tl.load(row + _SCALE)
    g = (g - tl.load(row + _MEAN + 1)) * tl.load(row + _SCALE + 1)
    b = (b - tl.load(row + _MEAN + 2)) * tl.load(row + _SCALE + 2)
    _store(pointers, r, g, b, inside)


@triton.jit
def _sum_luma(crops, parameters, sums, GRAY_FIRST: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum each sample's luma as it enters the contrast operation; of integers, so that any order gives the same."""
    sample = tl.program_id(1)
    row = parameters + sample * _ROW
    if tl.load(row + _JITTER) != 0:
        r, g, b, _, inside = _load_block(crops, sample, PIXELS, BLOCK)
        if GRAY_FIRST:
            r, g, b = _to_gray(r, g, b, row)
        before = 1
        for position in range(4):
            operation = tl.load(row + _ORDER + position)
            if operation == 1:
                before = 0
            if before == 1:
                r, g, b = _jittered(r, g, b, row, operation, 0.0)
        total = tl.sum(tl.where(inside, _luma(r, g, b), 0.0).to(tl.int32))
        tl.atomic_add(sums + sample, total)


@triton.jit
def _color(crops, parameters, sums, colored, out, GRAY_FIRST: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """Apply a sample's color operations; write its view or, if it is blurred later, its pixels."""
    sample = tl.program_id(1)
    row = parameters + sample * _ROW
    r, g, b, offset, inside = _load_block(crops, sample, PIXELS, BLOCK)
    if GRAY_FIRST:
        r, g, b = _to_gray(r, g, b, row)
    if tl.load(row + _JITTER) != 0:
        mean = ((2 * tl.load(sums + sample) + PIXELS) // (2 * PIXELS)).to(tl.float32)  # below 2^30
        for position in range(4):
            r, g, b = _jittered(r, g, b, row, tl.load(row + _ORDER + position), mean)
    if not GRAY_FIRST:
        r, g, b = _to_gray(r, g, b, row)
    if tl.load(row + _BLUR) != 0:
        _store(colored + offset, r, g, b, inside)
    else:
        _store_view(r, g, b, out + offset, inside, row)


@triton.jit
def _reflected(position, SIZE):
    position = tl.abs(position)
    return tl.where(position >= SIZE, 2 * SIZE - 2 - position, position)


@triton.jit
def _blurred(line, step, position, inside, sigma, SIZE: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the Gaussian mean around `position` of lines of pixels `step` apart, three channels, edges reflected."""
    r, g, b, total = _zeros(BLOCK), _zeros(BLOCK), _zeros(BLOCK), 0.0
    for tap in range(-RADIUS, RADIUS + 1):
        weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
        tap_r, tap_g, tap_b = _load(line + _reflected(position + tap, SIZE) * step, inside)
        r += weight * tap_r
        g += weight * tap_g
        b += weight * tap_b
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
):
    """Blur the samples `blurs` along rows."""
    number = tl.program_id(1)
    sample = tl.load(blurs + number)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    line = colored + (sample.to(tl.int64) * PIXELS + index // SIZE * SIZE) * 3
    sigma = tl.load(parameters + sample * _ROW + _SIGMA)
    r, g, b = _blurred(line, 3, index % SIZE, inside, sigma, SIZE, RADIUS, BLOCK)
    _store(rows + (number.to(tl.int64) * PIXELS + index) * 3, r, g, b, inside)


@triton.jit
def _blur_columns(
    rows, parameters, blurs, out, SIZE: tl.constexpr, RADIUS: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):
    """Blur the result of `_blur_rows` along columns, round, and write the views."""
    number = tl.program_id(1)
    sample = tl.load(blurs + number)
    row = parameters + sample * _ROW
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < PIXELS
    line = rows + (number.to(tl.int64) * PIXELS + index % SIZE) * 3
    r, g, b = _blurred(line, 3 * SIZE, index // SIZE, inside, tl.load(row + _SIGMA), SIZE, RADIUS, BLOCK)
    pointers = out + (sample.to(tl.int64) * PIXELS + index) * 3
    _store_view(tl.floor(r + 0.5), tl.floor(g + 0.5), tl.floor(b + 0.5), pointers, inside, row)
