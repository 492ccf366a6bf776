"""Triton kernels of BatchNorm with statistics of parts of a batch. With TRITON_INTERPRET=1 they run on CPU tensors.

x is [parts, rows, C] in memory: a channels-last batch [B, C, H, W] has rows = B / parts * H * W, a batch of vectors
[B, C] rows = B / parts. Sums are float32, or float64 of float64 tensors, and always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_CHANNELS = 64  # of one program
_ROWS = 64  # read at once
_MAX_SPLITS = 64
_PROGRAMS = 512  # enough for every multiprocessor of a large GPU
_FUSED: dict[str, Any] = {"enable_fp_fusion": True}  # multiply and add in one rounding: Triton's default up to 3.7
_Grid = tuple[int, int, int]


def moments(x: torch.Tensor, parts: int) -> tuple[torch.Tensor, int]:
    """Return means and biased variances [splits, parts, 2, C] of splits of each part, and the rows of a split."""
    return _over_splits(_moments, x, parts, (), ())


def combine(
    partial: torch.Tensor, rows: int, total: int, running: tuple[torch.Tensor, torch.Tensor] | None, momentum: float
) -> torch.Tensor:
    """Return mean and biased variance of each part, [parts, 2, C], from those of its splits or ranks [N, parts, 2, C].

    rows: of each split but the last; total: of all. running: running mean and variance, moved by each part in turn.
    """
    splits, parts, _, channels = partial.shape
    out = partial.new_empty(parts, 2, channels)
    moves = running is not None
    numbers = (momentum, splits, parts, channels, rows, total, moves, _CHANNELS)
    _combine((_quotient(channels, _CHANNELS), 1, 1), (partial, out, *(running or (out, out))), numbers)
    return out


def normalize(
    x: torch.Tensor, statistics: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, of x's dtype."""
    out = torch.empty_like(x)
    rows, channels, grid = _elementwise(x, len(statistics))
    affine = (statistics, statistics) if weight is None or bias is None else (weight, bias)
    numbers = (eps, rows, channels, weight is not None, _ROWS, _CHANNELS)
    _normalize(grid, (x, out, statistics, *affine), numbers)
    return out


def gradient_sums(gradient: torch.Tensor, x: torch.Tensor, statistics: torch.Tensor, eps: float) -> torch.Tensor:
    """Return sums over each part of the gradient, and of its product with the normalized x: [parts, 2, C]."""
    partial, _ = _over_splits(_gradient_sums, x, len(statistics), (gradient, statistics), (eps,))
    return partial.sum(dim=0) if len(partial) > 1 else partial[0]


def input_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    sums: torch.Tensor,
    count: int,
    eps: float,
) -> torch.Tensor:
    """Return the gradient of x; sums: of `gradient_sums`, over `count` rows on all ranks."""
    out = torch.empty_like(x)
    rows, channels, grid = _elementwise(x, len(statistics))
    tensors = (gradient, x, out, statistics, statistics if weight is None else weight, sums)
    _input_gradient(grid, tensors, (eps, 1 / count, rows, channels, weight is not None, _ROWS, _CHANNELS))
    return out


def _quotient(a: int, b: int) -> int:
    """Return a / b, rounded up; `triton.cdiv` takes 3 us."""
    return -(-a // b)


def _elementwise(x: torch.Tensor, parts: int) -> tuple[int, int, _Grid]:
    channels = x.shape[1]
    rows = x.numel() // channels // parts
    return rows, channels, (_quotient(rows, _ROWS), _quotient(channels, _CHANNELS), parts)


def _over_splits(
    kernel: _Kernel, x: torch.Tensor, parts: int, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]
) -> tuple[torch.Tensor, int]:
    """Call a kernel that reduces the rows of each part in splits; return its output and the rows of a split."""
    channels = x.shape[1]
    rows = x.numel() // channels // parts
    blocks = _quotient(channels, _CHANNELS)
    splits = max(1, min(_PROGRAMS // (blocks * parts), _MAX_SPLITS, _quotient(rows, _ROWS)))
    length = _quotient(_quotient(rows, splits), _ROWS) * _ROWS if splits > 1 else rows
    splits = _quotient(rows, length)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_empty((splits, parts, 2, channels), dtype=dtype)
    kernel((blocks, splits, parts), (x, out, *tensors), (*numbers, rows, channels, length, _ROWS, _CHANNELS))
    return out, length


class _Kernel:
    """A kernel that is launched on tensors and numbers, its arguments in this order.

    It looks up compiled code by itself: Triton's look-up takes three times as long as the launch. Triton compiles for
    dtypes, for numbers, and for addresses divisible by 16 or not; others than divisible ones are left to it.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: _Grid, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]) -> None:
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        key = (tensors[0].get_device(), numbers, *[tensor.dtype for tensor in tensors])
        compiled = None if addresses % 16 else self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*tensors, *numbers)
            return
        compiled = self.function[grid](*tensors, *numbers, **_FUSED)
        if not addresses % 16:
            self._compiled[key] = compiled  # None of an interpreted kernel


@_Kernel
@triton.jit
def _moments(x, out, rows, channels, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    split, part = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first = split * length
    last = tl.minimum(first + length, rows)
    x += part.to(tl.int64) * rows * channels + channel
    dtype = out.dtype.element_ty
    # Sums of differences from the first row: no cancellation where the mean is large.
    origin = tl.load(x + first.to(tl.int64) * channels, inside, 0.0).to(dtype)
    one = tl.zeros([CHANNELS], dtype)
    two = tl.zeros([CHANNELS], dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        value = tl.load(x + row.to(tl.int64)[:, None] * channels, mask, 0.0).to(dtype)
        value = tl.where(mask, value - origin[None, :], 0.0)
        one += tl.sum(value, 0)
        two += tl.sum(value * value, 0)
    one /= last - first
    out += (split * tl.num_programs(2) + part) * 2 * channels + channel
    tl.store(out, origin + one, inside)
    tl.store(out + channels, tl.maximum(two / (last - first) - one * one, 0.0), inside)


@_Kernel
@triton.jit
def _combine(
    partial,
    out,
    running_mean,
    running_var,
    momentum,
    splits,
    parts,
    channels,
    rows,
    total,
    RUNNING: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    dtype = out.dtype.element_ty
    for part in range(parts):
        mean = tl.zeros([CHANNELS], dtype)
        for split in range(splits):
            count = tl.minimum(rows, total - split * rows)
            mean += count * tl.load(partial + (split * parts + part) * 2 * channels + channel, inside, 0.0)
        mean /= total
        var = tl.zeros([CHANNELS], dtype)
        for split in range(splits):
            count = tl.minimum(rows, total - split * rows)
            at = partial + (split * parts + part) * 2 * channels + channel
            distance = tl.load(at, inside, 0.0) - mean
            var += count * (tl.load(at + channels, inside, 0.0) + distance * distance)
        var /= total
        tl.store(out + part * 2 * channels + channel, mean, inside)
        tl.store(out + part * 2 * channels + channels + channel, var, inside)
        if RUNNING:
            old_mean = tl.load(running_mean + channel, inside, 0.0)
            old_var = tl.load(running_var + channel, inside, 0.0)
            tl.store(running_mean + channel, old_mean + momentum * (mean - old_mean), inside)
            tl.store(running_var + channel, old_var + momentum * (var * total / (total - 1) - old_var), inside)


@triton.jit
def _tile(rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the program's part, its channels and whether they exist, and offsets and mask of its values in x."""
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    at = (part.to(tl.int64) * rows + row)[:, None] * channels + channel[None, :]
    return part, channel, inside, at, (row < rows)[:, None] & inside[None, :]


@_Kernel
@triton.jit
def _normalize(
    x,
    out,
    statistics,
    weight,
    bias,
    eps,
    rows,
    channels,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside, at, mask = _tile(rows, channels, ROWS, CHANNELS)
    statistics += part * 2 * channels + channel
    mean = tl.load(statistics, inside, 0.0)
    scale = 1 / tl.sqrt(tl.load(statistics + channels, inside, 1.0) + eps)
    shift = tl.zeros_like(mean)
    if AFFINE:
        scale *= tl.load(weight + channel, inside, 0.0)
        shift += tl.load(bias + channel, inside, 0.0)
    value = (tl.load(x + at, mask, 0.0).to(mean.dtype) - mean[None, :]) * scale[None, :] + shift[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


@_Kernel
@triton.jit
def _gradient_sums(
    x, out, gradient, statistics, eps, rows, channels, length, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    split, part = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first = split * length
    last = tl.minimum(first + length, rows)
    base = part.to(tl.int64) * rows * channels + channel
    statistics += part * 2 * channels + channel
    mean = tl.load(statistics, inside, 0.0)
    scale = 1 / tl.sqrt(tl.load(statistics + channels, inside, 1.0) + eps)
    one = tl.zeros([CHANNELS], mean.dtype)
    two = tl.zeros([CHANNELS], mean.dtype)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        at = base[None, :] + row.to(tl.int64)[:, None] * channels
        slope = tl.load(gradient + at, mask, 0.0).to(mean.dtype)
        one += tl.sum(slope, 0)
        two += tl.sum(slope * (tl.load(x + at, mask, 0.0).to(mean.dtype) - mean[None, :]), 0)
    out += (split * tl.num_programs(2) + part) * 2 * channels + channel
    tl.store(out, one, inside)
    tl.store(out + channels, two * scale, inside)


@_Kernel
@triton.jit
def _input_gradient(
    gradient,
    x,
    out,
    statistics,
    weight,
    sums,
    eps,
    share,
    rows,
    channels,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    part, channel, inside, at, mask = _tile(rows, channels, ROWS, CHANNELS)
    statistics += part * 2 * channels + channel
    sums += part * 2 * channels + channel
    mean = tl.load(statistics, inside, 0.0)
    scale = 1 / tl.sqrt(tl.load(statistics + channels, inside, 1.0) + eps)
    bias_share = tl.load(sums, inside, 0.0) * share
    slope_share = tl.load(sums + channels, inside, 0.0) * share * scale
    if AFFINE:
        weighted = scale * tl.load(weight + channel, inside, 0.0)
    else:
        weighted = scale
    distance = tl.load(x + at, mask, 0.0).to(mean.dtype) - mean[None, :]
    slope = tl.load(gradient + at, mask, 0.0).to(mean.dtype)
    value = (slope - bias_share[None, :] - distance * slope_share[None, :]) * weighted[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask)
