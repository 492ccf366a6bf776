"""Images with boxes in PASCAL VOC's layout: `JPEGImages/`, `Annotations/`, `ImageSets/Main/SET.txt`."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from pipeline.dense.image_files import open_image, read_set
from pipeline.system.errors import InputError

_NAMES = """
aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa
train tvmonitor
"""
CLASSES = tuple(_NAMES.split())
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Objects(NamedTuple):
    """The objects in an image."""

    boxes: np.ndarray
    """float32 [n, 4]: left, top, right, bottom, in pixels from the image's corner (VOC counts from 1, inclusively)."""
    labels: np.ndarray
    """int64 [n]: indices of the classes."""
    difficult: np.ndarray
    """bool [n]: not scored."""


@dataclass(frozen=True)
class Boxed:
    """Images with boxes."""

    path: Path
    images: tuple[Path, ...]
    objects: tuple[Objects, ...]
    classes: tuple[str, ...]
    fingerprint: str
    """A hash of names, boxes and classes."""

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Return an image, uint8 [H, W, 3]. Raises InputError where it cannot be decoded."""
        return np.array(open_image(self.images[index]).convert("RGB"))

    def part(self, count: int) -> "Boxed":
        """Return the first `count` images."""
        fingerprint = hashlib.sha256(f"{self.fingerprint} {count}".encode()).hexdigest()
        return replace(self, images=self.images[:count], objects=self.objects[:count], fingerprint=fingerprint)


def open_boxed(parts: Sequence[tuple[Path, str]], classes: Sequence[str] | None = None) -> Boxed:
    """Return the images of sets in `ImageSets/Main`. parts: (folder, set), such as VOC2007's and VOC2012's trainval.

    classes: their names; None for VOC's, or all that occur where some are not VOC's. Raises InputError where a file is
    missing or invalid, or a box is not in its image.
    """
    files = [file for folder, which in parts for file in _set_files(folder, which)]
    annotations = [_read_annotation(image, annotation) for image, annotation in files]
    occurring = {name for names, _, _ in annotations for name in names}
    classes = tuple(classes or (CLASSES if occurring <= set(CLASSES) else sorted(occurring)))
    number = {name: label for label, name in enumerate(classes)}
    objects, digest = [], hashlib.sha256(repr(classes).encode())
    for (image, annotation), (names, boxes, difficult) in zip(files, annotations, strict=True):
        unknown = sorted(set(names) - number.keys())
        if unknown:
            raise InputError(f"{annotation}: has {unknown[0]!r}, which no training image has: mend it")
        objects.append(Objects(boxes, np.array([number[name] for name in names], np.int64), difficult))
        digest.update(f"{image.name} {names}".encode() + boxes.tobytes() + difficult.tobytes())
    return Boxed(parts[0][0], tuple(image for image, _ in files), tuple(objects), classes, digest.hexdigest())


def _set_files(folder: Path, which: str) -> Iterable[tuple[Path, Path]]:
    """Return the image and the annotation of each name in a set."""
    listed = folder / "ImageSets" / "Main" / f"{which}.txt"
    names = read_set(listed, "give FOLDER:SET")
    files = [(folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml") for name in names]
    missing = [file for pair in files for file in pair if not file.is_file()]
    if missing or not files:
        fault = f"{missing[0]} and {len(missing) - 1} other files are missing" if missing else "it names no image"
        raise InputError(f"{listed}: {fault}: unpack the data again, or name another set")
    return files


def _read_annotation(image: Path, annotation: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return names, boxes and difficulty of the objects in an image."""
    try:
        objects = ElementTree.parse(annotation).getroot().findall("object")
        names = [str(element.findtext("name")) for element in objects]
        difficult = np.array([element.findtext("difficult", "0").strip() == "1" for element in objects], bool)
        corners = [[float(element.findtext(f"bndbox/{side}", "")) for side in _SIDES] for element in objects]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise InputError(f"{annotation}: not an annotation in VOC's format ({error}): fetch it again") from None
    boxes = np.array(corners, np.float32).reshape(-1, 4) - np.array([1, 1, 0, 0], np.float32)
    width, height = open_image(image, pixels=False).size
    inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
    wrong = ~(inside & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    if wrong.any():
        where = ", ".join(f"{value:g}" for value in corners[int(wrong.argmax())])
        raise InputError(f"{annotation}: the box {where} is not in {image}, of {width} x {height} pixels: mend it")
    return names, boxes, difficult
