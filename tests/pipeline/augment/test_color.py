"""Tests of the batched augmentation against Pillow, one image at a time, in torchvision's terms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.augment import color as operations
from pipeline.augment.color import (
    IMAGENET,
    Statistics,
    augment,
    blur_kernels,
    compiled,
    gaussian_blur,
    normalize,
    stepwise,
)
from pipeline.augment.draws import Color, draw_view
from pipeline.sources.synthetic import draw
from pipeline.views import AUGMENTATIONS, View, changed_views
from tests.pipeline.loading import LEVELS

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

_DRAWN, _NOISE = 24, 8  # images of either kind
_N = _DRAWN + _NOISE
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _images(size: int = 96) -> Pixels:
    """Return synthetic images, then noise; a copy, so that tests do not affect each other."""
    return _made(size).copy()


@functools.cache
def _made(size: int) -> Pixels:
    noise = [np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8) for i in range(_NOISE)]
    return np.stack([draw(3, i, size)[0] for i in range(_DRAWN)] + noise)


def _planes(images: Pixels) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()


def _pixels(x: torch.Tensor) -> npt.NDArray[np.float32]:
    out: npt.NDArray[np.float32] = x.permute(0, 2, 3, 1).numpy()
    return out


def _color(n: int = _N, **chosen: object) -> Color:
    """Return no operation on any sample, except those `chosen`."""
    off, one = np.zeros(n, bool), np.ones(n, np.float32)
    color = Color(off, np.tile(np.arange(4), (n, 1)), one, one, one, 0 * one, off, off, one, off)
    return replace(color, **chosen)  # type: ignore[arg-type]


def _augmented(images: Pixels, color: Color) -> npt.NDArray[np.float32]:
    """Return the views with levels 0..255, not normalized."""
    return _pixels(augment(torch.from_numpy(images), color, LEVELS))


def _drawn_color(view: View, n: int = _N, seed: int = 5) -> Color:
    sides = np.full(n, 96)
    return draw_view(view, 0, seed=seed, epoch=0, ids=np.arange(n), heights=sides, widths=sides).color


# ---- the references ----


def _pil_hue(image: Image.Image, factor: float) -> Image.Image:
    """torchvision's F_pil.adjust_hue."""
    h, s, v = image.convert("HSV").split()
    shifted = (np.array(h).astype(int) + np.int32(factor * 255)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")


_PIL: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "saturation": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "hue": _pil_hue,
}


def _pil(name: str, image: Pixels, factor: float) -> Pixels:
    return np.asarray(_PIL[name](Image.fromarray(image), float(factor)))


def _pil_gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _direct_blur(image: npt.NDArray[np.floating] | Pixels, sigma: float) -> Floats:
    """Return a float64 convolution of [H, W, 3] with a Gaussian of 13 by 13 taps, edges reflected."""
    height, width, _ = image.shape
    radius = min(6, height - 1, width - 1)
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(image.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), "reflect")
    out = np.zeros(image.shape)
    for i, down in enumerate(kernel):
        for j, right in enumerate(kernel):
            out += down * right * padded[i : i + height, j : j + width]
    return out


def _pil_chain(pixels: Pixels, color: Color, i: int) -> Pixels:
    """Return sample i's full chain, composed like torchvision; the blur is the direct one, rounded."""
    image = Image.fromarray(pixels)
    if color.gray_first and color.gray[i]:
        image = _pil_gray(image)
    if color.jitter[i]:
        for number in color.order[i]:
            if number == 4:  # of strength 0
                continue
            name = list(_PIL)[number]
            image = _PIL[name](image, float(getattr(color, name)[i]))
    if not color.gray_first and color.gray[i]:
        image = _pil_gray(image)
    if color.blur[i]:
        image = Image.fromarray(np.rint(_direct_blur(np.asarray(image), float(color.sigma[i]))).astype(np.uint8))
    if color.solarize[i]:
        image = ImageOps.solarize(image, color.threshold)
    return np.asarray(image)


# ---- single operations ----


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.0, 2.0),
        ("brightness", 0.6, 1.4),
        ("contrast", 0.0, 2.0),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.0, 2.0),
        ("saturation", 0.6, 1.4),
        ("hue", -0.5, 0.5),
        ("hue", -0.1, 0.1),
    ],
)
def test_color_operations_equal_pillow(name: str, low: float, high: float) -> None:
    """Measured: brightness, contrast and saturation equal; hue differs by one level in 1 of a million values."""
    images, rng = _images(), np.random.default_rng(len(name))
    for _ in range(2):
        factors = rng.uniform(low, high, _N).astype(np.float32)
        factors[0], factors[1] = low, high
        got = _pixels(getattr(operations, name)(_planes(images), torch.from_numpy(factors)))
        expected = np.stack([_pil(name, image, factor) for image, factor in zip(images, factors, strict=True)])
        gap = np.abs(got - expected)
        assert gap.max() <= 1
        assert gap.mean() < 1e-4


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_hsv_of_the_color_cube_equals_pillow(step: int) -> None:
    """All 2^24 colors where slow."""
    levels = torch.arange(0.0, 256.0, step)
    for red in levels:
        plane = torch.stack(torch.meshgrid(red[None], levels, levels, indexing="ij"))  # [3, 1, n, n]
        found = torch.stack(operations._rgb_to_hsv(plane.transpose(0, 1)), dim=-1)[0]
        image = Image.fromarray(plane[:, 0].permute(1, 2, 0).to(torch.uint8).numpy())
        assert np.array_equal(found.numpy(), np.asarray(image.convert("HSV")))


def test_hue_of_a_coarse_color_cube_equals_pillow() -> None:
    """52^3 colors, with grays, primaries and hue ties, by shifts that wrap around in both directions."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(52, 52 * 52, 3)
    for turns in (0.0, 0.1, -0.1, 0.4, -0.4, 0.5, -0.5):
        got = _pixels(operations.hue(_planes(cube[None]), torch.tensor([turns])))[0]
        gap = np.abs(got - np.asarray(_pil_hue(Image.fromarray(cube), turns)))
        assert gap.max() <= 1
        assert gap.mean() < 0.001


def test_neutral_parameters_change_little() -> None:
    images, one = _images(), torch.ones(_N)
    for name in ("brightness", "contrast", "saturation"):
        assert np.array_equal(_pixels(getattr(operations, name)(_planes(images), one)), images)


def test_grayscale_equals_pillow() -> None:
    expected = np.stack([np.asarray(_pil_gray(Image.fromarray(image))) for image in _images()])
    assert np.array_equal(_pixels(operations.grayscale(_planes(_images()))), expected)


@pytest.mark.parametrize("threshold", [0, 1, 100, 128, 255, 256])
def test_solarize_equals_pillow(threshold: int) -> None:
    levels = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (1, 1, 3))
    for image in (levels, *_images()):
        got = _pixels(operations.solarize(_planes(image[None]), threshold))[0]
        assert np.array_equal(got, np.asarray(ImageOps.solarize(Image.fromarray(image), threshold)))


@pytest.mark.parametrize("size", [96, 32, 7, 4, 1])
def test_blur_equals_a_direct_convolution(size: int) -> None:
    """The tolerance is the rounding: 0.5 of a level.

    Pillow's own GaussianBlur(radius=sigma) is made of boxes and repeats edge pixels; for sigma from 0.1 to 2.0 the
    measured mean difference from it is 0.6 levels on drawn images and 3 on noise, where sigma below 1 counts most.
    """
    images = np.stack([np.ascontiguousarray(image[:size, :size]) for image in _images()])
    sigma = np.random.default_rng(0).uniform(0.1, 2.0, _N).astype(np.float32)
    sigma[0], sigma[1] = 0.1, 2.0
    got = _pixels(gaussian_blur(_planes(images), torch.from_numpy(blur_kernels(sigma, size))))
    expected = np.stack([_direct_blur(image, float(s)) for image, s in zip(images, sigma, strict=True)])
    assert np.abs(got - expected).max() < 0.51
    assert np.array_equal(got, np.rint(got))


def test_blur_is_close_to_pillow() -> None:
    sigma = np.random.default_rng(1).uniform(0.1, 2.0, _N).astype(np.float32)
    got = _pixels(gaussian_blur(_planes(_images()), torch.from_numpy(blur_kernels(sigma, 96))))
    for image, blurred, s in zip(_images()[:_DRAWN], got, sigma, strict=False):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(float(s))))
        assert np.abs(blurred - expected).mean() < 2.5


# ---- full chains ----


@pytest.mark.parametrize("gray_first", [False, True])
@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "simclr"])
def test_full_chains_equal_pillow(name: str, gray_first: bool) -> None:
    """Each sample has its operations and order; they are likelier than published, so that all combine."""
    view = replace(AUGMENTATIONS[name][-1], gray_p=0.3, blur_p=0.5, solarize_p=0.3, gray_first=gray_first)
    color = _drawn_color(view)
    got = _augmented(_images(), color)
    gap = np.abs(got - np.stack([_pil_chain(image, color, i) for i, image in enumerate(_images())]))
    per_sample = gap.reshape(_N, -1).mean(axis=1)
    assert per_sample.max() < 2
    assert np.median(per_sample) < 0.1


CHANGES: list[dict[str, Any]] = [
    *({name: strength, "jitter_p": 1} for name in _PIL for strength in (0, 0.5)),
    {"brightness": 3, "contrast": 2, "saturation": 4, "hue": 0.5, "jitter_p": 1},
    {"jitter_p": 0, "gray_p": 1},
    {"blur_p": 1, "blur_sigma": [1.5, 1.6]},
    {"solarize_p": 1, "solarize_threshold": 70},
]
"""Changes of a view, each with another effect on the colors."""


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("augmented", [compiled, stepwise])
def test_changed_views_equal_pillow(augmented: Callable[..., torch.Tensor], changes: dict[str, Any]) -> None:
    """Exactly where neither hue nor blur is applied, which round a few values to another level."""
    exact = changes | ({} if "hue" in changes else {"hue": 0}) | ({} if "blur_p" in changes else {"blur_p": 0})
    (view,) = changed_views([exact], "moco_v2")
    color, images = _drawn_color(view), _images(48)
    got = _pixels(augmented(torch.from_numpy(images), color, LEVELS, torch.float32))
    gap = np.abs(got - np.stack([_pil_chain(image, color, i) for i, image in enumerate(images)]))
    assert gap.mean() < (0.5 if view.hue or view.blur_p else 1e-9)
    assert np.abs(got - _pixels(augmented(torch.from_numpy(images), _color(), LEVELS, torch.float32))).mean() > 1


def test_a_hue_of_zero_leaves_colors_unchanged() -> None:
    """Unlike a shift by 0 through 8-bit HSV."""
    (view,) = changed_views(
        [{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "blur_p": 0, "gray_p": 0}], "moco_v2"
    )
    assert np.array_equal(_augmented(_images(), _drawn_color(view)), _images())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]])
def test_each_sample_has_its_own_order_of_operations(order: list[int]) -> None:
    """The factors are so strong that another order gives another image."""
    factors = {"brightness": 1.8, "contrast": 0.3, "saturation": 1.7, "hue": 0.3}
    strong: dict[str, Any] = {key: np.full(_N, value, np.float32) for key, value in factors.items()}
    orders = np.tile(np.arange(4), (_N, 1))
    orders[::2] = order
    color = _color(jitter=np.ones(_N, bool), order=orders, **strong)
    expected = np.stack([_pil_chain(image, color, i) for i, image in enumerate(_images())])
    assert np.abs(_augmented(_images(), color) - expected).mean() < 0.1


def test_grayscale_before_jitter_leaves_the_hue_of_gray() -> None:
    """Saturation and hue change nothing after grayscale; before it, grayscale removes their effect."""
    on = np.ones(_N, bool)
    color = _color(jitter=on, gray=on, hue=np.full(_N, 0.3, np.float32), saturation=np.full(_N, 1.9, np.float32))
    first, last = (_augmented(_images(), replace(color, gray_first=first)) for first in (True, False))
    gray = _augmented(_images(), _color(gray=on))
    assert np.array_equal(first, gray)
    assert np.abs(last - gray).mean() > 1
    for image in (first, last):
        assert np.ptp(image, axis=-1).max() == 0


def test_a_solarized_view_was_blurred_before() -> None:
    on = np.ones(_N, bool)
    color = _color(blur=on, solarize=on, sigma=np.full(_N, 2.0, np.float32))
    blurred = _augmented(_images(), replace(color, solarize=~on))
    assert np.array_equal(_augmented(_images(), color), np.where(blurred < 128, blurred, 255 - blurred))


# ---- samples on their own ----


_PART = np.arange(_N) % 3 == 1


@pytest.mark.parametrize("chosen", ["jitter", "gray", "blur", "solarize"])
def test_unchosen_samples_are_untouched(chosen: str) -> None:
    half = np.full(_N, 0.5, np.float32)
    factors: dict[str, Any] = {"brightness": half, "contrast": half, "saturation": half, "hue": half, "sigma": 4 * half}
    got = _augmented(_images(), _color(**factors, **{chosen: _PART}))
    changed = (got != _images()).any(axis=(1, 2, 3))
    assert changed.tolist() == _PART.tolist()


def test_each_sample_has_its_own_parameters() -> None:
    """The batch equals each sample alone (blur: to one level, as sums may have another order)."""
    view = replace(AUGMENTATIONS["simclr"][0], gray_p=0.3, solarize_p=0.3)
    images, color = _images(32), _drawn_color(view)
    together = _augmented(images, color)
    for i in range(_N):
        rows = {name: value[i : i + 1] for name, value in vars(color).items() if np.ndim(value)}
        alone = Color(**rows)
        gap = np.abs(together[i] - _augmented(images[i : i + 1], alone)[0])
        assert gap.mean() <= (0.01 if color.blur[i] else 0)


def test_without_operations_crops_are_unchanged() -> None:
    assert np.array_equal(_augmented(_images(), _color()), _images())


# ---- what comes out ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_channels_last_and_normalized_by_imagenet(dtype: torch.dtype) -> None:
    crops = torch.from_numpy(_images())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (_images() / 255 - mean) / std
    assert (IMAGENET.mean, IMAGENET.std) == (tuple(mean), tuple(std))
    for views in (augment(crops, _color(), dtype=dtype), normalize(crops, dtype=dtype)):
        assert views.dtype == dtype
        assert views.shape == (_N, 3, 96, 96)
        assert views.is_contiguous(memory_format=torch.channels_last)
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * 2.7
        assert np.abs(_pixels(views.float()) - expected).max() < tolerance


def test_views_are_normalized_by_other_statistics() -> None:
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.3, 1.0])
    statistics = Statistics(tuple(mean.tolist()), tuple(std.tolist()))
    crops, expected = torch.from_numpy(_images(16)), (_images(16) / 255 - mean) / std
    for views in (augment(crops, _color(), statistics), normalize(crops, statistics)):
        assert np.abs(_pixels(views) - expected).max() < 1e-5


def test_bfloat16_views_are_rounded_float32_views() -> None:
    crops, color = torch.from_numpy(_images()), _drawn_color(AUGMENTATIONS["moco_v2"][0])
    assert torch.equal(augment(crops, color).bfloat16(), augment(crops, color, dtype=torch.bfloat16))


def test_the_input_crops_are_not_changed() -> None:
    crops = torch.from_numpy(_images())
    augment(crops, _drawn_color(AUGMENTATIONS["moco_v1"][0]))
    normalize(crops)
    assert np.array_equal(crops.numpy(), _images())


@pytest.mark.gpu
def test_gpu_views_equal_cpu_views() -> None:
    view = replace(AUGMENTATIONS["simclr"][0], gray_p=0.3, solarize_p=0.3)
    crops, color = torch.from_numpy(_images()), _drawn_color(view)
    gap = (augment(crops.cuda(), color, LEVELS).cpu() - augment(crops, color, LEVELS)).abs()
    assert gap.mean() < 0.01
