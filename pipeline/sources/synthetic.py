"""Synthetic images of ten pattern classes, drawn from a seed: the source `synthetic:N`.

An image shows one repeating pattern (stripes, checker, dots, ...) inside a large soft-edged patch on a plain
background, with thin lines and blobs in front, slow waves of light over all of it, and mild noise on top. The class is
the kind of pattern alone: colors, contrast, position, scale, rotation, share of inked pixels, shading and clutter have
one distribution for all classes. So neither color nor raw pixels separate the classes; local structure does, which
survives random crops and color jitter.

Each image is a function of `(seed, index, size)` alone. Its random numbers are the raw output of the counter-based
generator Philox4x64-10 with key `(seed, index)`: any process can draw any image, in any order.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.system.errors import InputError

MIN_SIZE = 16
"""Smallest side, pixels, at which the patterns can be distinguished."""

_SCALARS = 64  # random numbers of an image before its pixel noise
_NOISE_LEVELS = 16  # width of the uniform pixel noise, gray levels

_Array = npt.NDArray[np.float32]
_Field = Callable[[_Array, _Array], _Array]


def draw(seed: int, index: int, size: int = 48) -> tuple[npt.NDArray[np.uint8], int]:
    """Return image `index` of the data set `seed`, uint8 [size, size, 3], and its label, `index % 10`, in `CLASSES`.

    seed, index: 0 to 2^64 - 1. size: the side, at least 16 pixels. Raises InputError for other values.
    """
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise InputError(f"{name} is {value}: choose a whole number from 0 to 2**64 - 1")
    if size < MIN_SIZE:
        raise InputError(f"size is {size} pixels: choose {MIN_SIZE} or more to keep the patterns visible")
    label = index % len(CLASSES)
    source = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    dice = _Dice(source.random_raw(_SCALARS))
    image = _compose(dice, _FIELDS[CLASSES[label]], size)
    words = source.random_raw(-(-3 * size * size // 8)).astype("<u8", copy=False)
    noise = words.view(np.uint8)[: 3 * size * size].reshape(size, size, 3)
    image *= 255.0
    image += noise * np.float32(_NOISE_LEVELS / 255.0) + np.float32(0.5 - _NOISE_LEVELS / 2)
    return np.clip(image, 0.0, 255.0).astype(np.uint8), label


def jpeg(seed: int, index: int) -> bytes:
    """Return the image of `draw`, 48 pixels a side, as a JPEG file. Raises InputError as `draw`.

    The same arguments give the same bytes with one build of NumPy and the JPEG library; another build may round or
    encode differently.
    """
    buffer = io.BytesIO()
    Image.fromarray(draw(seed, index)[0]).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


class _Dice:
    """Uniform random numbers, one after another from raw 64-bit words."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        self._values: Iterator[float] = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())

    def uniform(self, low: float, high: float) -> float:
        """Return the next number, in [low, high)."""
        return low + (high - low) * next(self._values)


def _compose(dice: _Dice, field: _Field, size: int) -> _Array:
    """Paint the layers from back to front. Returns RGB in about 0..1, float32 [size, size, 3]."""
    line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    paper, ink = _colors(dice)
    cover = _pattern(dice, field, x, y) * _patch(dice, x, y)
    image = paper + cover[..., None] * (ink - paper)
    for clutter in (_stroke, _stroke, _blob, _blob):
        cover = clutter(dice, x, y)
        image += cover[..., None] * (_color(dice, dice.uniform(0.1, 0.9)) - image)
    image += _shade(dice, x, y)[..., None]
    return image


def _colors(dice: _Dice) -> tuple[_Array, _Array]:
    """Return two colors of clearly different lightness, in random order."""
    middle, half = dice.uniform(0.4, 0.6), dice.uniform(0.16, 0.28)
    if dice.uniform(0.0, 1.0) < 0.5:
        half = -half
    return _color(dice, middle - half), _color(dice, middle + half)


def _color(dice: _Dice, lightness: float) -> _Array:
    """Return a muted color of random hue, RGB [3]."""
    hue, chroma = dice.uniform(0.0, 2.0 * math.pi), dice.uniform(0.0, 0.12)
    third = 2.0 * math.pi / 3.0
    return np.array([lightness + chroma * math.cos(hue + k * third) for k in range(3)], dtype=np.float32)


def _pattern(dice: _Dice, field: _Field, x: _Array, y: _Array) -> _Array:
    """Return the ink's cover in 0..1: the lowest values of the field, with an edge of about one pixel."""
    angle, cells = dice.uniform(0.0, 2.0 * math.pi), dice.uniform(1.8, 2.8)
    across, down = cells * dice.uniform(0.85, 1.15), cells * dice.uniform(0.85, 1.15)
    cos, sin = math.cos(angle), math.sin(angle)
    dx, dy = x - dice.uniform(-0.7, 0.7), y - dice.uniform(-0.7, 0.7)
    values = field(across * cos * dx + across * sin * dy, down * cos * dy - down * sin * dx)
    rank = int(dice.uniform(0.35, 0.5) * values.size)
    level = np.partition(values, rank, axis=None)[rank]
    pixel = 2.0 * cells / x.size
    cover: _Array = np.clip((level - values) / pixel + 0.5, 0.0, 1.0)
    return cover


def _patch(dice: _Dice, x: _Array, y: _Array) -> _Array:
    """Return the cover in 0..1 of the elliptic patch with the pattern."""
    across, down = 1.0 / dice.uniform(0.85, 1.3), 1.0 / dice.uniform(0.85, 1.3)
    dx, dy = (x - dice.uniform(-0.2, 0.2)) * across, (y - dice.uniform(-0.2, 0.2)) * down
    return np.clip(6.5 - 6.0 * (dx * dx + dy * dy), 0.0, 1.0)


def _stroke(dice: _Dice, x: _Array, y: _Array) -> _Array:
    """Return the cover in 0..1 of a thin straight line across the image."""
    angle, offset = dice.uniform(0.0, math.pi), dice.uniform(-0.8, 0.8)
    distance = np.abs(math.cos(angle) * x + (math.sin(angle) * y - offset))
    half, pixel = dice.uniform(0.01, 0.03), 2.0 / x.size
    return np.clip((half - distance) / pixel + 0.5, 0.0, 1.0)


def _blob(dice: _Dice, x: _Array, y: _Array) -> _Array:
    """Return the cover in 0..1 of a small disc with a blurred rim."""
    dx, dy = x - dice.uniform(-1.0, 1.0), y - dice.uniform(-1.0, 1.0)
    radius = dice.uniform(0.06, 0.16)
    return np.clip(1.5 - (dx * dx + dy * dy) * (1.0 / radius**2), 0.0, 1.0)


def _shade(dice: _Dice, x: _Array, y: _Array) -> _Array:
    """Return the lightness added to every layer: two slow waves across the image."""
    total = np.zeros((y.size, x.size), dtype=np.float32)
    for _ in range(2):
        angle, speed = dice.uniform(0.0, 2.0 * math.pi), dice.uniform(1.0, 4.0)
        strength, phase = dice.uniform(0.03, 0.1), dice.uniform(0.0, 2.0 * math.pi)
        total += strength * np.cos(speed * math.cos(angle) * x + (speed * math.sin(angle) * y + phase))
    return total


def _wave(u: _Array) -> _Array:
    """Return the distance to the nearest integer, 0..0.5."""
    distance: _Array = np.abs(u - np.rint(u))
    return distance


def _stripes(u: _Array, v: _Array) -> _Array:
    return _wave(u)


def _checker(u: _Array, v: _Array) -> _Array:
    a, b = _wave(0.7 * u) - np.float32(0.25), _wave(0.7 * v) - np.float32(0.25)
    depth: _Array = np.minimum(np.abs(a), np.abs(b))
    return np.sign(a * b) * depth


def _dots(u: _Array, v: _Array) -> _Array:
    return np.hypot(_wave(u), _wave(v))


def _rings(u: _Array, v: _Array) -> _Array:
    return np.abs(np.hypot(_wave(0.8 * u), _wave(0.8 * v)) - np.float32(0.32))


def _crosses(u: _Array, v: _Array) -> _Array:
    a, b = _wave(0.8 * u), _wave(0.8 * v)
    return np.maximum(np.minimum(a, b), np.maximum(a, b) - np.float32(0.28))


def _zigzag(u: _Array, v: _Array) -> _Array:
    return _wave(u + np.float32(1.5) * _wave(0.8 * v))


def _triangles(u: _Array, v: _Array) -> _Array:
    b = v - np.rint(v)
    return np.maximum(-b, np.float32(0.87) * _wave(u) + np.float32(0.5) * b)


def _bricks(u: _Array, v: _Array) -> _Array:
    row = np.rint(1.2 * v)
    along = _wave(0.6 * u + np.float32(0.5) * row)
    distance: _Array = np.maximum(along - np.float32(0.15), np.abs(1.2 * v - row))
    return distance


def _spokes(u: _Array, v: _Array) -> _Array:
    return _wave(np.arctan2(v, u) * np.float32(9.0 / (2.0 * math.pi)))


def _target(u: _Array, v: _Array) -> _Array:
    return _wave(np.hypot(u, v))


_FIELDS: dict[str, _Field] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "crosses": _crosses,
    "zigzag": _zigzag,
    "triangles": _triangles,
    "bricks": _bricks,
    "spokes": _spokes,
    "target": _target,
}
CLASSES = tuple(_FIELDS)
"""Class names by label."""
