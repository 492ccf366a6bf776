"""Synthetic images of ten patterns, drawn from a seed: the source `synthetic:N`.

An image is a fabric of one pattern (stripes, checks, dots, bricks, ...), warped, in two colors that change across it,
with mild noise on top. The class is the pattern alone. Everything else has one distribution for all classes, and
differs between parts of an image as much as between images: colors, which of the two is the lighter one, contrast, and
the warp's shifts and turns. So two crops of an image share its pattern, and little else that a network could tell
images apart by. Colors do not reveal the class; by raw pixels, neighbors have the same one in a third of cases.

Each image is a function of `(seed, index, size)` alone. Its random numbers are the raw output of the counter-based
generator Philox4x64-10 with key `(seed, index)`: any process can draw any image, in any order.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.system.errors import InputError

MIN_SIZE = 16
"""Smallest side, pixels, at which the patterns can be distinguished."""

_KNOTS = 4  # knots along a side: colors and shifts are drawn there, and interpolated
_CELLS = 1.7  # periods of a pattern in half a side
_WARP = 0.45  # largest shift of a knot, periods
_CHROMA = 0.2  # largest distance of a color from gray
_INK = 0.45  # share of the pixels that are ink, before their blurred edge
_NOISE_LEVELS = 16  # width of the uniform pixel noise, gray levels
_NUMBERS = 3 + 9 * _KNOTS**2  # random numbers of an image before its pixel noise

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
    image = _compose(_uniforms(source.random_raw(_NUMBERS)), _FIELDS[CLASSES[label]], size)
    words = source.random_raw(-(-3 * size * size // 8)).astype("<u8", copy=False)
    noise = words.view(np.uint8)[: 3 * size * size].reshape(size, size, 3)
    image *= 255.0
    image += noise * np.float32(_NOISE_LEVELS / 255.0) + np.float32(0.5 - _NOISE_LEVELS / 2)
    return np.clip(image, 0.0, 255.0).astype(np.uint8), label


def jpeg(seed: int, index: int) -> bytes:
    """Return the image of `draw`, 48 pixels a side, as a JPEG file. Raises InputError as `draw`.

    The same arguments give the same bytes with one build of NumPy and the JPEG library on one kind of processor;
    others may round or encode a few pixels differently.
    """
    buffer = io.BytesIO()
    Image.fromarray(draw(seed, index)[0]).save(buffer, format="JPEG", quality=92)
    return buffer.getvalue()


def _uniforms(words: npt.NDArray[np.uint64]) -> _Array:
    """Return uniform numbers in [0, 1) from raw 64-bit words."""
    return ((words >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _compose(numbers: _Array, field: _Field, size: int) -> _Array:
    """Paint ink of a pattern on paper. Returns RGB in about 0..1, float32 [size, size, 3]."""
    knots = numbers[3:].reshape(9, _KNOTS, _KNOTS)
    paper, ink = _colors(knots[:7])
    maps = _spread(np.concatenate([paper, ink, _WARP * (2 * knots[7:] - 1)]), size)
    cover = _pattern(field, numbers[:3], maps[6:])
    image: _Array = (maps[:3] + cover * (maps[3:6] - maps[:3])).transpose(1, 2, 0)
    return image


def _colors(u: _Array) -> tuple[_Array, _Array]:
    """Return paper and ink at the knots, RGB [3, KNOTS, KNOTS]: of different lightness, in random order."""
    middle, half = 0.3 + 0.4 * u[0], 0.15 + 0.15 * u[1]
    half = np.where(u[2] < 0.5, half, -half)
    return _color(middle - half, u[3], u[4]), _color(middle + half, u[5], u[6])


def _color(lightness: _Array, hue: _Array, chroma: _Array) -> _Array:
    """Return muted colors, RGB [3, ...]; hue and chroma: uniform in 0..1."""
    turns = hue + np.arange(3, dtype=np.float32).reshape(3, 1, 1) / 3
    return lightness + _CHROMA * chroma * np.cos(2 * math.pi * turns, dtype=np.float32)


def _spread(knots: _Array, size: int) -> _Array:
    """Interpolate values [N, KNOTS, KNOTS] smoothly over an image: [N, size, size]."""
    position = np.linspace(0, _KNOTS - 1, size, dtype=np.float32)
    distance = np.abs(position[:, None] - np.arange(_KNOTS, dtype=np.float32)).clip(max=1)
    weights = 1 - distance**2 * (3 - 2 * distance)  # of each pixel's two nearest knots, with the sum 1
    return weights @ knots @ weights.T


def _pattern(field: _Field, place: _Array, shifts: _Array) -> _Array:
    """Return the ink's cover in 0..1: the lowest values of the field, with an edge of about one pixel."""
    line = _CELLS * np.linspace(-1, 1, shifts.shape[-1], dtype=np.float32)
    mirror = 1 if place[2] < 0.5 else -1
    values = field(mirror * (line + shifts[0]) + place[0], line[:, None] + shifts[1] + place[1])
    rank = int(_INK * values.size)
    level = np.partition(values, rank, axis=None)[rank]
    pixel = 2 * _CELLS / len(line)
    cover: _Array = np.clip((level - values) / pixel + 0.5, 0, 1)
    return cover


def _wave(u: _Array) -> _Array:
    """Return the distance to the nearest integer, 0..0.5."""
    distance: _Array = np.abs(u - np.rint(u))
    return distance


def _rows(u: _Array, v: _Array) -> _Array:
    return _wave(v)


def _columns(u: _Array, v: _Array) -> _Array:
    return _wave(u)


def _diagonals(u: _Array, v: _Array) -> _Array:
    return _wave(0.8 * (u + v))


def _checker(u: _Array, v: _Array) -> _Array:
    a, b = _wave(0.6 * u) - np.float32(0.25), _wave(0.6 * v) - np.float32(0.25)
    depth: _Array = np.minimum(np.abs(a), np.abs(b))
    return np.sign(a * b) * depth


def _dots(u: _Array, v: _Array) -> _Array:
    return np.hypot(_wave(u), _wave(v))


def _rings(u: _Array, v: _Array) -> _Array:
    return np.abs(np.hypot(_wave(0.7 * u), _wave(0.7 * v)) - np.float32(0.3))


def _zigzag(u: _Array, v: _Array) -> _Array:
    return _wave(v + np.float32(1.2) * _wave(0.7 * u))


def _lightning(u: _Array, v: _Array) -> _Array:
    return _zigzag(v, u)


def _bricks(u: _Array, v: _Array) -> _Array:
    row = np.rint(1.2 * v)
    along = _wave(0.6 * u + np.float32(0.5) * row)
    distance: _Array = np.maximum(along - np.float32(0.15), np.abs(1.2 * v - row))
    return distance


def _planks(u: _Array, v: _Array) -> _Array:
    return _bricks(v, u)


_FIELDS: dict[str, _Field] = {
    "rows": _rows,
    "columns": _columns,
    "diagonals": _diagonals,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "zigzag": _zigzag,
    "lightning": _lightning,
    "bricks": _bricks,
    "planks": _planks,
}
CLASSES = tuple(_FIELDS)
"""Class names by label."""
