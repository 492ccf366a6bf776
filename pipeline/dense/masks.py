"""Images and their masks of class numbers, from PASCAL VOC's layout or from two folders, `images/` and `masks/`.

A mask is a PNG of the image's size, of palette indices (as VOC's) or gray levels; 255 is left out of training and of
scores. Betons cannot hold masks: files are read one by one, by PIL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.dense.image_files import decoded, header
from pipeline.system.errors import InputError
from pipeline.system.thread_pool import Workers

IGNORED = 255
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_INDEXED = ("P", "L", "1")
_HELD_OUT = 10
_AHEAD = 64  # masks that are checked at once, at most
Pair = tuple[Image.Image, np.ndarray]


@dataclass(frozen=True)
class Masked:
    """Images with masks, sorted by name."""

    path: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    shapes: np.ndarray
    """int64 [N, 2]: height and width, pixels, from the files' headers."""
    fingerprint: str
    """Of names and sizes of all files, bytes."""

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Pair:
        """Return an image, RGB, and its mask, uint8 [H, W]. Raises InputError where one cannot be decoded."""
        return decoded(self.images[index]).convert("RGB"), self.mask(index)

    def mask(self, index: int) -> np.ndarray:
        """Return a mask of class numbers, uint8 [H, W]. Raises InputError where it cannot be decoded."""
        return np.asarray(decoded(self.masks[index])).astype(np.uint8)

    def part(self, indices: Iterable[int]) -> Masked:
        """Return those of the images alone."""
        chosen = list(indices)
        images, masks = (tuple(files[index] for index in chosen) for files in (self.images, self.masks))
        about = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        return replace(self, images=images, masks=masks, shapes=self.shapes[chosen], fingerprint=about)

    def held_out(self) -> tuple[Masked, Masked]:
        """Return nine tenths of the images, and every tenth, the first among them."""
        if len(self) < 2:
            raise InputError(f"{self.path}: {len(self)} images, of which every tenth is to be for testing: give --test")
        every = range(len(self))
        return self.part(i for i in every if i % _HELD_OUT), self.part(range(0, len(self), _HELD_OUT))


def is_voc(path: Path) -> bool:
    """Return whether a folder has VOC's layout."""
    return (path / "JPEGImages").is_dir()


def open_masked(path: Path, which: str = "train", masks: str = "SegmentationClass") -> Masked:
    """Return the images and masks in a folder.

    which: of VOC's layout, the set in `ImageSets/Segmentation/WHICH.txt`; masks: its folder of masks. Raises InputError
    where a file is missing, or an image and its mask cannot belong together, by their headers.
    """
    images, found = _of_voc(path, which, masks) if is_voc(path) else _of_folders(path)
    shapes, about = [], hashlib.sha256()
    for image, mask in zip(images, found, strict=True):
        shapes.append(_shape(image, mask))
        about.update(f"{image.name} {image.stat().st_size} {mask.stat().st_size}\n".encode())
    return Masked(path, tuple(images), tuple(found), np.array(shapes, np.int64), about.hexdigest())


def _of_voc(path: Path, which: str, folder: str) -> tuple[list[Path], list[Path]]:
    """Return the files of a set: its lines name images, by themselves or as two paths (the augmented set's)."""
    listed = path / "ImageSets" / "Segmentation" / f"{which}.txt"
    try:
        lines = [line.split() for line in listed.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(p.stem for p in listed.parent.glob("*.txt"))) or "none"
        raise InputError(f"{listed}: cannot be read ({error}): sets there are {there}: name one of them") from None
    if not lines:
        raise InputError(f"{listed}: names no image: name another set")
    names = sorted({PurePosixPath(line[0]).stem for line in lines})
    images = [path / "JPEGImages" / f"{name}.jpg" for name in names]
    masks = [path / folder / f"{name}.png" for name in names]
    for kind, files in (("images", images), ("masks", masks)):
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: is not there, nor are {len(missing) - 1} other {kind} that {listed} names: unpack the "
                "data again, or name another set or folder of masks"
            )
    return images, masks


def _of_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of `images/` and `masks/`, which have to be of the same names."""
    folders = [path / "images", path / "masks"]
    if not all(folder.is_dir() for folder in folders):
        raise InputError(
            f"{path}: has neither VOC's layout (JPEGImages, SegmentationClass, ImageSets) nor folders images and "
            "masks: give a folder with one of them"
        )
    images, masks = _by_name(folders[0], _IMAGES), _by_name(folders[1], (".png",))
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        name = alone[0]
        file, other = (images[name], folders[1]) if name in images else (masks[name], folders[0])
        raise InputError(f"{file}: has no counterpart in {other}, nor have {len(alone) - 1} others: add or remove them")
    if not images:
        raise InputError(f"{path}: no images in it: give a folder with images and masks")
    names = sorted(images)
    return [images[name] for name in names], [masks[name] for name in names]


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Return the files with those suffixes by their names without them."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in suffixes:
            if file.stem in found:
                raise InputError(f"{file}: has the name of {found[file.stem]}: rename or remove one of them")
            found[file.stem] = file
    return found


def _shape(image: Path, mask: Path) -> tuple[int, int]:
    """Return height and width of an image and its mask. Raises InputError where they differ, or it is none."""
    of_image, of_mask = (header(file) for file in (image, mask))
    if of_mask.mode not in _INDEXED:
        raise InputError(
            f"{mask}: is {of_mask.mode}, not class numbers: save it as an 8-bit PNG of palette indices or gray levels"
        )
    if of_image.size != of_mask.size:
        raise InputError(
            f"{mask}: {of_mask.width} x {of_mask.height} pixels, but {image} has {of_image.width} x "
            f"{of_image.height}: give the mask that was drawn on it"
        )
    return of_image.height, of_image.width


def classes_in(data: Masked, indices: Iterable[int], classes: int, workers: Workers) -> set[int]:
    """Return the class numbers in those masks, after decoding all of them.

    classes: their number, 0 for any. Raises InputError for a mask that cannot be decoded or has other numbers.
    """
    found: set[int] = set()
    for index, numbers in _numbers(data, list(indices), workers):
        if classes and max(numbers, default=0) >= classes:
            raise InputError(
                f"{data.masks[index]}: has class {max(numbers)}, and there are {classes}, 0 to {classes - 1}, besides "
                f"{IGNORED}: mend it, or give other --classes"
            )
        found |= numbers
    return found


def _numbers(data: Masked, indices: list[int], workers: Workers) -> Iterator[tuple[int, set[int]]]:
    """Yield each mask's index and its class numbers."""

    def of(_: None, index: int) -> set[int]:
        counts = np.bincount(data.mask(index).reshape(-1), minlength=IGNORED + 1)
        return set(np.flatnonzero(counts[:IGNORED]).tolist())

    yield from zip(indices, workers.in_order(of, indices, ahead=_AHEAD), strict=True)
