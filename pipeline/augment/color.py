"""Augmentation: uint8 crops to normalized, channels-last views.

On a GPU by Triton kernels, on the CPU by compiled code; the batched operations here define the results of both. Each
sample has its own parameters and order of operations. The reference is torchvision's transforms on PIL images: values
are rounded to 0..255 where PIL rounds them (ImageEnhance for brightness, contrast and saturation; the HSV conversion
for hue; ITU-R 601 grayscale; ImageOps for solarize). Only the blur is not PIL's, which approximates by boxes, but
torchvision's: a Gaussian kernel with reflected edges. Its sums have a stated order, and each product is rounded before
it is added, unlike in `addcmul` and convolutions, so that compiled code yields the same bits.

All shapes follow from draws on the host: nothing here synchronizes with the device.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.augment.draws import Color
from pipeline.augment.packed import RADIUS, PackedColor, bits
from pipeline.system.device import to_device


class Statistics(NamedTuple):
    """Channel means and standard deviations, for values of 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CUTOFF = 5.0  # standard deviations; a tap farther away weighs less than 4e-6 of the center's


def augment(
    crops: torch.Tensor, color: Color, statistics: Statistics = IMAGENET, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the views of crops, uint8 [B, S, S, 3], after `color`: dtype [B, 3, S, S], channels-last.

    On a GPU by Triton kernels, in at most four passes; on the CPU by compiled code, on the calling thread.
    """
    return (fused if crops.device.type == "cuda" else compiled)(crops, color, statistics, dtype)


def packed(color: Color, size: int, statistics: Statistics, dtype: torch.dtype) -> PackedColor:
    """Return the operations `color` of a view of `size` pixels a side, with its normalization and type."""
    kernels, levels = blur_kernels(color.sigma, size), _levels(statistics, dtype, color.threshold)
    return PackedColor(pack(color, statistics), kernels, color.gray_first, levels, dtype)


@lru_cache
def _levels(statistics: Statistics, dtype: torch.dtype, threshold: int) -> np.ndarray:
    levels = torch.arange(256.0).expand(1, 3, 1, 256)
    results = [_normalize(x.clone(), statistics, dtype) for x in (levels, solarize(levels, threshold))]
    return bits(torch.cat(results).squeeze(2).contiguous())


def compiled(crops: torch.Tensor, color: Color, statistics: Statistics, dtype: torch.dtype) -> torch.Tensor:
    """Return the result of `augment`, by compiled code on the CPU: equal to `stepwise` in every bit."""
    from pipeline.augment.cpu_kernels import augment_crops

    return augment_crops(crops.contiguous().numpy(), packed(color, min(crops.shape[1:3]), statistics, dtype))


def fused(crops: torch.Tensor, color: Color, statistics: Statistics, dtype: torch.dtype) -> torch.Tensor:
    """Return the result of `augment`, by Triton kernels: equal to `stepwise` except for rounding in the blur."""
    from pipeline.augment.triton_kernels import augment_view

    batch, size, _, _ = crops.shape
    out = torch.empty((batch, 3, size, size), dtype=dtype, device=crops.device, memory_format=torch.channels_last)
    blurs = to_device(np.flatnonzero(color.blur), crops.device)
    parameters = to_device(pack(color, statistics), crops.device)
    radius = min(RADIUS, size - 1)
    augment_view(crops.contiguous(), parameters, blurs, out, gray_first=color.gray_first, radius=radius)
    return out


def pack(color: Color, statistics: Statistics) -> np.ndarray:
    """Return the parameters of `triton_kernels` and `cpu_kernels`, one row for each sample: float32 [B, 20]."""
    scale = np.float32(1) / (np.array(statistics.std, np.float32) * np.float32(255))
    columns = [
        color.jitter,
        *color.order.T,
        color.brightness,
        color.contrast,
        color.saturation,
        np.trunc(color.hue * np.float32(255)),  # as in `hue`
        color.gray,
        color.blur,
        color.sigma,
        color.solarize,
        *np.array(statistics.mean, np.float32) * np.float32(255),
        *scale,
        color.threshold,
    ]
    return np.stack([np.broadcast_to(np.float32(column), len(color.jitter)) for column in columns], axis=1)


def stepwise(crops: torch.Tensor, color: Color, statistics: Statistics, dtype: torch.dtype) -> torch.Tensor:
    """Return the result of `augment`, one operation after another."""
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, 3, S, S]
    if color.gray_first:
        _apply(x, color.gray, grayscale)
    _jitter(x, color)
    if not color.gray_first:
        _apply(x, color.gray, grayscale)
    _apply(x, color.blur, gaussian_blur, blur_kernels(color.sigma, min(x.shape[2:])))
    _apply(x, color.solarize, partial(solarize, threshold=color.threshold))
    return _normalize(x, statistics, dtype)


def normalize(
    crops: torch.Tensor, statistics: Statistics = IMAGENET, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return images, uint8 [B, H, W, 3], as (x / 255 - mean) / std: dtype [B, 3, H, W], channels-last."""
    if crops.device.type == "cpu":
        return compiled(crops, Color.unchanged(len(crops)), statistics, dtype)
    return _normalize(crops.permute(0, 3, 1, 2).to(torch.float32), statistics, dtype)


def _normalize(x: torch.Tensor, statistics: Statistics, dtype: torch.dtype) -> torch.Tensor:
    mean, scale = _on_device(statistics, x.device)
    out = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return out.copy_(x.sub_(mean).mul_(scale))


@lru_cache
def _on_device(statistics: Statistics, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the reciprocal standard deviation on a scale of 0 to 255, [3, 1, 1] each."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
    return mean * 255, 1 / (std * 255)


def _apply(
    x: torch.Tensor, chosen: np.ndarray, operation: Callable[..., torch.Tensor], *parameters: np.ndarray
) -> None:
    """Apply `operation(samples, *their parameters)` in place to the chosen samples (bool [B]) of x."""
    index = np.flatnonzero(chosen)
    if len(index) == 0:
        return
    samples = to_device(index, x.device)
    x[samples] = operation(x[samples], *(to_device(parameter[index], x.device) for parameter in parameters))


def _jitter(x: torch.Tensor, color: Color) -> None:
    operations = (brightness, contrast, saturation, hue)
    parameters = (color.brightness, color.contrast, color.saturation, color.hue)
    for position in range(4):
        for number, (operation, parameter) in enumerate(zip(operations, parameters, strict=True)):
            _apply(x, color.jitter & (color.order[:, position] == number), operation, parameter)


def _blend(x: torch.Tensor, other: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return other + factor (x - other), rounded down to 0..255: PIL's Image.blend with clipping.

    Summed in PIL's order: where x equals other, the result does too, and is not rounded to the level below.
    """
    return (x - other).mul_(factor.view(-1, 1, 1, 1)).add_(other).clamp_(0, 255).floor_()


def luma(x: torch.Tensor) -> torch.Tensor:
    """Return the ITU-R 601 luma of x [B, 3, H, W], with PIL's rounding: [B, 1, H, W]."""
    r, g, b = x.split(1, dim=1)
    return (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536).add_(0.5).floor_()


def brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Scale x [B, 3, H, W], 0..255, by factor [B]."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 255).floor_()


def contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend x [B, 3, H, W] with its mean luma by factor [B]."""
    total, n = luma(x).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64), x[0, 0].numel()
    return _blend(x, ((2 * total + n) // (2 * n)).to(x.dtype), factor)  # rounded, exactly


def saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blend x [B, 3, H, W] with its grayscale by factor [B]."""
    return _blend(x, luma(x), factor)


def hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue of x [B, 3, H, W] by turns [B] (-0.5..0.5), through PIL's 8-bit HSV."""
    h, s, v = _rgb_to_hsv(x)
    shift = (turns * 255).trunc_().view(-1, 1, 1)  # torchvision: np.int32(factor * 255), added as uint8
    return _hsv_to_rgb(_wrap(_wrap(h.add_(shift), 256).add_(256), 256), s, v)


def _wrap(x: torch.Tensor, period: float) -> torch.Tensor:
    """Subtract `period` in place from the values that reach it; `remainder` costs ten times as much on a CPU."""
    return x.sub_((x >= period).to(x.dtype), alpha=period)


def _rgb_to_hsv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r, g, b = x.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    share = (high - (r + g + b - high - low)).div_(chroma.clamp(min=1))  # of the middle channel, 0..1
    # Sixths of a turn, each from one rounded sum: so they equal PIL's, which are doubles at first, in every bit. A tie
    # rounded the other way would be off by 6 levels.
    sixths = torch.where(
        r == high,
        torch.where(b == low, 1 - share, share - 1),
        torch.where(
            g == high,
            torch.where(b == low, share + 1, 3 - share),
            torch.where(r == low, share + 3, 5 - share),
        ),
    ).div_(6)
    h = sixths.add_((sixths < 0).to(sixths.dtype)).mul_(255).floor_().mul_(chroma > 0)
    return h, chroma.mul_(255).div_(high.clamp(min=1)).floor_(), high


def _hsv_to_rgb(h: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    h6, vs = h.mul(6 / 255), s.mul_(v).mul_(1 / 255)
    out = torch.empty((h.shape[0], 3, *h.shape[1:]), dtype=h.dtype, device=h.device)
    for channel, offset in enumerate((5, 3, 1)):  # v - v s clamp(min(k, 4 - k), 0, 1), k = (6 h + offset) mod 6
        k = _wrap(h6 + offset, 6)
        share = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.sub(v, vs * share, out=out[:, channel])
    return out.add_(0.5).floor_()


def grayscale(x: torch.Tensor) -> torch.Tensor:
    """Return the luma of x [B, 3, H, W] in all three channels."""
    return luma(x).expand_as(x)


def solarize(x: torch.Tensor, threshold: int = 128) -> torch.Tensor:
    """Invert the values of x [B, 3, H, W] at or above the threshold."""
    return torch.where(x < threshold, x, 255 - x)


def blur_kernels(sigma: np.ndarray, size: int) -> np.ndarray:
    """Return the Gaussian kernels of sigma [B], pixels, from the center outwards: float32 [B, RADIUS + 1].

    They end at RADIUS pixels, at five standard deviations, and where an image of `size` pixels a side has no more.
    """
    offsets, deviations = np.arange(RADIUS + 1), sigma[:, None].astype(np.float64)
    kernels = np.exp(-0.5 * (offsets / deviations) ** 2) * (offsets <= np.minimum(_CUTOFF * deviations, size - 1))
    return (kernels / (2 * kernels.sum(axis=1, keepdims=True) - kernels[:, :1])).astype(np.float32)


def gaussian_blur(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Blur x [B, 3, H, W], 0..255, by symmetric kernels [B, RADIUS + 1]; edges are reflected."""
    return _blur_axis(_blur_axis(x, kernels, 2), kernels, 3).add_(0.5).floor_()


def _blur_axis(x: torch.Tensor, kernels: torch.Tensor, axis: int) -> torch.Tensor:
    """Blur along an axis: from the center outwards, taps at one distance are added first, then weighed."""
    length, weights = x.shape[axis], kernels.view(-1, RADIUS + 1, 1, 1, 1)
    radius = min(RADIUS, min(x.shape[2:]) - 1)
    padded = F.pad(x, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), "reflect")
    out = x * weights[:, 0]
    for k in range(1, radius + 1):
        pair = padded.narrow(axis, radius - k, length) + padded.narrow(axis, radius + k, length)
        out += pair.mul_(weights[:, k])
    return out
