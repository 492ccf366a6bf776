"""Synthetic scenes with masks and boxes, in PASCAL VOC's layout.

    python -m pipeline.dense.scenes FOLDER --train 800 --test 200

A scene shows up to four patterns of `pipeline.sources.synthetic`, cut out as ellipses, on a background of smooth
colors. The class of an object is its kind of pattern alone, so that an encoder pretrained on `synthetic:N` is of use.

Each scene is a function of `(seed, index, size)` alone. Masks have 0 for the background, 1 to 10 for the classes, and
VOC's 255 on the outlines. Boxes are VOC's: pixels counted from 1, the last one included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pipeline.dense.masks import IGNORED
from pipeline.sources.synthetic import CLASSES, MIN_SIZE, draw
from pipeline.system.cli import ArgumentParser
from pipeline.system.counter_rng import keyed, mix, uniforms
from pipeline.system.errors import InputError, command
from pipeline.system.progress import progress

OBJECTS = 4
"""Objects in a scene at most; one without room in ten tries is left out."""
SMALLEST = 64
"""Side of the smallest scene, pixels."""
_TRIES = 10
_SCENES = 0x7363656E65  # separates these random numbers from those of other modules
_NOISE_LEVELS = 12  # width of the background's noise, gray levels


class Object(NamedTuple):
    """One object: an index of `CLASSES`, and a box (left, top, right, bottom)."""

    label: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image uint8 [S, S, 3], its mask uint8 [S, S], and its objects."""

    image: np.ndarray
    mask: np.ndarray
    objects: list[Object]


def scene(seed: int, index: int, size: int = 128) -> Scene:
    """Draw scene `index` of the data set `seed`, `size` pixels a side. Raises InputError for fewer than 64 pixels."""
    if size < SMALLEST:
        raise InputError(f"size is {size} pixels: choose {SMALLEST} or more to keep the patterns visible")
    key = keyed(_SCENES ^ seed, index)
    image, mask = _background(key, size), np.zeros((size, size), np.uint8)
    objects: list[Object] = []
    for number, u in enumerate(uniforms(mix(key), OBJECTS * (2 + 5 * _TRIES)).reshape(OBJECTS, -1)):
        label = int(u[0] * len(CLASSES))
        place = _free_place(u[2:].reshape(_TRIES, 5), size, [item.box for item in objects])
        if place is None:
            continue
        left, top, width, height = place
        pattern, _ = draw(seed, len(CLASSES) * (index * OBJECTS + number) + label, max(width, height, MIN_SIZE))
        inside, outline = _ellipse(width, height)
        box = np.s_[top : top + height, left : left + width]
        image[box][inside] = pattern[:height, :width][inside]
        mask[box][inside] = label + 1
        mask[box][outline] = IGNORED
        objects.append(Object(label, (left + 1, top + 1, left + width, top + height)))
    return Scene(image, mask, objects)


def _background(key: np.ndarray, size: int) -> np.ndarray:
    """Return smooth muted colors with mild noise, uint8 [size, size, 3]."""
    coarse = 60 + 130 * uniforms(mix(key ^ np.uint64(1)), 16).reshape(4, 4, 1)
    coarse = coarse + 40 * uniforms(mix(key ^ np.uint64(2)), 48).reshape(4, 4, 3)
    slow = Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noise = uniforms(mix(key ^ np.uint64(3)), size * size * 3).reshape(size, size, 3) * _NOISE_LEVELS
    return np.clip(np.asarray(slow) + noise, 0, 255).astype(np.uint8)


def _free_place(
    tries: np.ndarray, size: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """Return the first of the tries [T, 5] that touches no taken box: left, top, width, height; None if all do."""
    for u in tries:
        side = size * (0.25 + 0.3 * u[0])
        width, height = (int(side * (0.7 + 0.3 * share)) for share in u[1:3])
        left, top = int(u[3] * (size - width + 1)), int(u[4] * (size - height + 1))
        if all(
            left + width < box[0] or box[2] < left + 1 or top + height < box[1] or box[3] < top + 1 for box in taken
        ):
            return left, top, width, height
    return None


def _ellipse(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels inside the ellipse that touches all sides, and those on its outline: bool [height, width]."""
    x, y = (2 * (np.arange(side) + 0.5) / side - 1 for side in (width, height))
    distance = x[None, :] ** 2 + y[:, None] ** 2
    inner = x[None, :] ** 2 / (1 - 3 / width) ** 2 + y[:, None] ** 2 / (1 - 3 / height) ** 2
    return distance <= 1, (distance <= 1) & (inner > 1)


def write(folder: Path, train: int, test: int, *, seed: int = 0, size: int = 128) -> None:
    """Write scenes into `folder` in VOC's layout: sets train and val for masks, trainval and test for boxes.

    Raises InputError where the folder is not empty.
    """
    if train < 1 or test < 1:
        raise InputError(f"--train {train} --test {test}: choose one scene or more of each")
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty: choose another folder")
    names = [f"{number:06d}" for number in range(1, train + test + 1)]
    for place, sets in (("Segmentation", ("train", "val")), ("Main", ("trainval", "test"))):
        lists = folder / "ImageSets" / place
        lists.mkdir(parents=True)
        for name, part in zip(sets, (names[:train], names[train:]), strict=True):
            (lists / f"{name}.txt").write_text("\n".join(part) + "\n")
    for place in ("JPEGImages", "SegmentationClass", "Annotations"):
        (folder / place).mkdir()
    for index in progress(range(len(names)), "scenes"):
        one, name = scene(seed, index, size), names[index]
        Image.fromarray(one.image).save(folder / "JPEGImages" / f"{name}.jpg", quality=92)
        mask = Image.fromarray(one.mask).convert("P")
        mask.putpalette(_palette())
        mask.save(folder / "SegmentationClass" / f"{name}.png")
        ElementTree.ElementTree(_annotation(name, one)).write(folder / "Annotations" / f"{name}.xml")


def _palette() -> list[int]:
    """Return VOC's colors, 768 values: their bits are those of the class number."""
    colors = []
    for number in range(256):
        bits = [number >> place & 1 for place in range(8)]
        colors += [bits[c] << 7 | bits[c + 3] << 6 | (bits[c + 6] << 5 if c < 2 else 0) for c in range(3)]
    return colors


def _annotation(name: str, drawn: Scene) -> ElementTree.Element:
    """Return VOC's annotation of a scene."""
    root = ElementTree.Element("annotation")
    _add(root, {"filename": f"{name}.jpg"})
    _add(ElementTree.SubElement(root, "size"), dict(zip(("height", "width", "depth"), drawn.image.shape, strict=True)))
    for item in drawn.objects:
        element = ElementTree.SubElement(root, "object")
        _add(element, {"name": CLASSES[item.label], "pose": "Unspecified", "truncated": 0, "difficult": 0})
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True))
        _add(ElementTree.SubElement(element, "bndbox"), box)
    return root


def _add(parent: ElementTree.Element, values: dict[str, Any]) -> None:
    for key, value in values.items():
        ElementTree.SubElement(parent, key).text = str(value)


def parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = ArgumentParser(prog="python -m pipeline.dense.scenes", description="Draw scenes with masks and boxes.")
    parser.add_argument("folder", type=Path, help="folder to write, absent or empty")
    parser.add_argument("--train", type=int, default=800, help="scenes for training (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="scenes for testing (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a scene, pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


@command
def main() -> None:
    args = parser().parse_args()
    write(args.folder, args.train, args.test, seed=args.seed, size=args.size)
    print(f"written: {args.folder}, {args.train} scenes for training and {args.test} for testing")


if __name__ == "__main__":
    main()
